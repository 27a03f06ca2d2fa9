"""Detection models to train: which, from where, with what image processor, DropKey on them, and their `Trainer`.

May import `checkpoints`, `detection_data`, `detection_metrics`, `faults`, `patching`, `report`, torch and Transformers.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    ConditionalDetrConfig,
    ConditionalDetrImageProcessorPil,
    ConvNextConfig,
    DetrConfig,
    DetrImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    YolosConfig,
    YolosImageProcessorPil,
)

from .checkpoints import check_model_folder
from .detection_data import DetectionData
from .detection_metrics import post_process
from .faults import GuardedTrainer
from .patching import apply_dropkey
from .report import DropKeyReport


logger = logging.getLogger(__name__)

ModelType = Literal["detr", "conditional_detr", "yolos", "rt_detr"]
MODEL_TYPES: tuple[str, ...] = get_args(ModelType)
PROCESSORS = {
    "detr": DetrImageProcessorPil,
    "conditional_detr": ConditionalDetrImageProcessorPil,
    "yolos": YolosImageProcessorPil,
    "rt_detr": RTDetrImageProcessorPil,
}
# they take a mask of the padding; the others see a padded image as it is
MASKED_TYPES = ("detr", "conditional_detr")
DEFAULT_SHAPE = {
    "image_size": 320,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "num_queries": 50,
    "patch_size": 16,
}
DEFAULT_RATIO = 0.1
PRIOR_SCORE = 0.01
TOKEN_STD = 0.02
# the deepest stage's stride is 32, 16 without the last stage
BACKBONE_WIDTHS = {32: (32, 64, 128, 256), 16: (32, 64, 128)}
# Transformers' ResNet has a stem and stages 0 to 3, timm's calls the latter layer1 to layer4
RESNET_TYPES = ("resnet", "timm_backbone")
LEARNING_STAGES = (".stages.1.", ".stages.2.", ".stages.3.", ".layer2.", ".layer3.", ".layer4.")


@dataclass
class DetectionModelArguments:
    """Which model: a pretrained one, or a small one from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"Detection model to start from ({', '.join(MODEL_TYPES)}): a folder or a hub id."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with new class scores if the model does not know the data's classes."}
    )
    model_type: ModelType | None = field(default=None, metadata={"help": "Family of a model from scratch."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of the longest side (DETR, Conditional DETR), or of a square that images are stretched to "
            "(YOLOS, RT-DETR). Default: 320 from scratch, else as the model's image processor has it."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "From scratch, as the next ones. Default: 128."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads. Default: 4."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLPs. Default: 256."})
    encoder_layers: int | None = field(
        default=None, metadata={"help": "Encoder layers; all layers of YOLOS. Default: 3, RT-DETR 1."}
    )
    decoder_layers: int | None = field(default=None, metadata={"help": "Decoder layers. Default: 3."})
    num_queries: int | None = field(
        default=None, metadata={"help": "Largest number of objects in an image. Default: 50."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "Side in pixels, YOLOS only. Default: 16."})
    backbone_stride: Literal[16, 32] | None = field(
        default=None, metadata={"help": "Pixels between two keys, DETR and Conditional DETR only. Default: 32."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout outside attention, [0, 1). Default: 0.1, YOLOS and RT-DETR 0."}
    )
    auxiliary_loss: bool | None = field(
        default=None,
        metadata={
            "help": "A loss on every decoder layer. Default: off, RT-DETR on. DETR and Conditional DETR of Transformers "
            "compute differently with it than the original models, so it is for models from scratch only."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one source of the model, and what is given concerns it."""
        if bool(self.model_name_or_path) == bool(self.model_type):
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} and model_type={self.model_type!r}: give one of them, "
                f"--model_name_or_path to start from a model or --model_type {'|'.join(MODEL_TYPES)} from scratch"
            )
        if self.model_type not in (None, *MODEL_TYPES):
            raise ValueError(f"model_type={self.model_type!r} is not one of {list(MODEL_TYPES)}")
        shape = {name: value for name, value in self.shape().items() if value is not None}
        if self.model_name_or_path and shape:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out {shape}"
            )
        for name, value in {**shape, "image_size": self.image_size}.items():
            if name not in ("dropout", "auxiliary_loss") and value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1)")
        unused = {"patch_size": ("yolos",), "backbone_stride": MASKED_TYPES}
        unused["decoder_layers"] = tuple(name for name in MODEL_TYPES if name != "yolos")
        for name, types in unused.items():
            if name in shape and self.model_type not in types:
                raise ValueError(f"{name}={shape[name]} means nothing for {self.model_type}, only for {list(types)}")

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch."""
        names = (*DEFAULT_SHAPE, "backbone_stride", "dropout", "auxiliary_loss")
        return {name: getattr(self, name) for name in names if name != "image_size"}


@dataclass
class DetectionDropKeyArguments:
    """DropKey. What is not given is as the model's configuration remembers it, else as `apply_dropkey` has it."""

    _argument_group_name = "DropKey"

    dropkey_ratio: float | None = field(
        default=None,
        metadata={"help": f"Largest drop ratio of a layer, in [0, 1); 0 trains without. Default: {DEFAULT_RATIO}."},
    )
    dropkey_final_ratio: float | None = field(
        default=None, metadata={"help": "The other end of the schedule, from 0 to the ratio. Default: 0."}
    )
    dropkey_schedule: str | None = field(
        default=None,
        metadata={"help": "Over the depth of encoder and decoder each: decreasing (default), constant or increasing."},
    )
    dropkey_pattern: str | None = field(
        default=None, metadata={"help": "Dropped together: score (default, the paper's), key, token, block or cross."}
    )
    dropkey_window: int | None = field(default=None, metadata={"help": "Patches of a block's side or a cross's arm."})
    dropkey_cross_attention: bool | None = field(
        default=None, metadata={"help": "Drop keys where queries attend to the image too."}
    )
    dropkey_with_attention_dropout: bool | None = field(
        default=None, metadata={"help": "Allows plain dropout on attention weights beside DropKey."}
    )
    dropkey_backend: str | None = field(
        default=None, metadata={"help": "Attention backend of the layers that drop keys. Default: the model's own."}
    )

    def apply(self, model: PreTrainedModel) -> DropKeyReport:
        """Puts DropKey on a model and prints the report.

        Raises:
            ValueError: A setting is not allowed, or reaches nothing.
        """
        given = {name.removeprefix("dropkey_"): value for name, value in asdict(self).items()}
        if given["ratio"] is None and getattr(model.config, "dropkey_ratio", None) is None:
            given["ratio"] = DEFAULT_RATIO
        return apply_dropkey(model, **given)


def make_config(arguments: DetectionModelArguments) -> PreTrainedConfig:
    """The configuration, checked, without the classes, which the data will tell.

    Raises:
        FileNotFoundError: The folder lacks files.
        ImportError: The model's backbone is one of timm, which is not installed.
        ValueError: The pretrained model is of another family, or a value is not allowed.
    """
    if not arguments.model_name_or_path:
        return config_from_scratch(arguments)
    source = arguments.model_name_or_path
    if Path(source).is_dir():
        check_model_folder(Path(source))
    found, _ = PreTrainedConfig.get_config_dict(source, revision=arguments.revision)
    kinds: dict[str, Any] = {
        "detr": DetrConfig,
        "conditional_detr": ConditionalDetrConfig,
        "yolos": YolosConfig,
        "rt_detr": RTDetrConfig,
    }
    if found.get("model_type") not in kinds:
        raise ValueError(
            f"{source} has model_type {found.get('model_type')!r}; this script starts from {list(MODEL_TYPES)}"
        )
    config: Any = kinds[found["model_type"]].from_pretrained(source, revision=arguments.revision)
    backbone = getattr(config, "backbone_config", None)
    if getattr(backbone, "model_type", None) == "timm_backbone" and importlib.util.find_spec("timm") is None:
        raise ImportError(
            f"the backbone of {source} is one of timm, which is not installed; install it, or take a version of the "
            "model without timm (facebook/detr-resnet-50 has --revision no_timm)"
        )
    return config


def config_from_scratch(arguments: DetectionModelArguments) -> PreTrainedConfig:
    """A small configuration of the family that the arguments name.

    DETR and Conditional DETR get a ConvNeXt backbone, whose layer norms learn: of a ResNet they freeze the batch norms,
    which without pretraining would stay as they were initialised.

    Raises:
        ValueError: Heads do not divide the width.
    """
    given = {name: value for name, value in arguments.shape().items() if value is not None}
    size = arguments.image_size or DEFAULT_SHAPE["image_size"]
    shape: dict[str, Any] = {
        **DEFAULT_SHAPE,
        **({"encoder_layers": 1} if arguments.model_type == "rt_detr" else {}),
        **given,
    }
    # sine embeddings give half of the width to each of two directions, and need pairs
    unit = max(4, shape["num_attention_heads"])
    if shape["hidden_size"] % shape["num_attention_heads"] or shape["hidden_size"] % 4:
        raise ValueError(
            f"hidden_size={shape['hidden_size']} must be a multiple of num_attention_heads="
            f"{shape['num_attention_heads']} and of 4; choose for example {unit * 4 * shape['num_attention_heads']}"
        )
    dropout_name = "hidden_dropout_prob" if arguments.model_type == "yolos" else "dropout"
    more = {dropout_name: shape["dropout"]} if "dropout" in shape else {}
    more |= {"auxiliary_loss": shape["auxiliary_loss"]} if "auxiliary_loss" in shape else {}
    if arguments.model_type == "yolos":
        return YolosConfig(
            image_size=[size, size],
            patch_size=shape["patch_size"],
            hidden_size=shape["hidden_size"],
            num_hidden_layers=shape["encoder_layers"],
            num_attention_heads=shape["num_attention_heads"],
            intermediate_size=shape["intermediate_size"],
            num_detection_tokens=shape["num_queries"],
            **more,
        )
    common: dict[str, Any] = {
        "d_model": shape["hidden_size"],
        "encoder_layers": shape["encoder_layers"],
        "decoder_layers": shape["decoder_layers"],
        "encoder_attention_heads": shape["num_attention_heads"],
        "decoder_attention_heads": shape["num_attention_heads"],
        "encoder_ffn_dim": shape["intermediate_size"],
        "decoder_ffn_dim": shape["intermediate_size"],
        "num_queries": shape["num_queries"],
        **more,
    }
    if arguments.model_type == "rt_detr":
        widths = BACKBONE_WIDTHS[32]
        levels: dict[str, Any] = {"out_indices": [2, 3, 4]}
        return RTDetrConfig(
            backbone_config=RTDetrResNetConfig(
                embedding_size=widths[0],
                hidden_sizes=list(widths),
                depths=[1, 1, 1, 1],
                layer_type="basic",
                **levels,
            ),
            freeze_backbone_batch_norms=False,
            encoder_hidden_dim=shape["hidden_size"],
            encoder_in_channels=list(widths[1:]),
            decoder_in_channels=[shape["hidden_size"]] * 3,
            **common,
        )
    widths = BACKBONE_WIDTHS[shape.get("backbone_stride", 32)]
    output: dict[str, Any] = {"out_features": [f"stage{len(widths)}"]}
    backbone = ConvNextConfig(
        hidden_sizes=list(widths),
        depths=[1] * len(widths),
        num_stages=len(widths),
        # at its usual 1e-6 every block starts as nothing, and needs long training to be more
        layer_scale_init_value=1.0,
        **output,
    )
    kind = DetrConfig if arguments.model_type == "detr" else ConditionalDetrConfig
    return kind(backbone_config=backbone, **common)


def make_processor(config: PreTrainedConfig, arguments: DetectionModelArguments) -> BaseImageProcessor:
    """The pretrained model's image processor on PIL, or the family's; with the size that was asked for.

    Raises:
        FileNotFoundError: A pretrained folder has none.
    """
    size = arguments.image_size
    source = arguments.model_name_or_path
    if source is None:
        return PROCESSORS[config.model_type](
            size=processor_size(config.model_type, size or DEFAULT_SHAPE["image_size"])
        )
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{source} lacks preprocessor_config.json, the image processor; add it")
    changes = {} if size is None else {"size": processor_size(config.model_type, size)}
    return AutoImageProcessor.from_pretrained(source, revision=arguments.revision, backend="pil", **changes)


def processor_size(model_type: str, size: int) -> dict[str, int]:
    """What `image_size` means to a family's image processor."""
    if model_type in MASKED_TYPES:
        return {"shortest_edge": size, "longest_edge": size}
    return {"height": size, "width": size}


def fit_classes(data: DetectionData, config: Any, arguments: DetectionModelArguments) -> DetectionData:
    """The data with the model's class numbers; a model that does not know the classes gets them, if that was asked for.

    Raises:
        ValueError: The pretrained model does not know the classes, and new class scores were not asked for.
    """
    if arguments.model_name_or_path and not arguments.ignore_mismatched_sizes:
        try:
            return data.with_label_names([config.id2label[number] for number in range(config.num_labels)])
        except ValueError as error:
            raise ValueError(
                f"{error}, start with new class scores with --ignore_mismatched_sizes, or choose another model"
            ) from error
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: number for number, name in enumerate(data.label_names)}
    return data


def make_model(config: PreTrainedConfig, arguments: DetectionModelArguments) -> PreTrainedModel:
    """The model with pretrained weights, its ResNet learning in part as in the original, or with new weights."""
    if not arguments.model_name_or_path:
        model = AutoModelForObjectDetection.from_config(config)
        start_as_original(model)
        return model
    model = AutoModelForObjectDetection.from_pretrained(
        arguments.model_name_or_path,
        config=config,
        revision=arguments.revision,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
    )
    if config.model_type in MASKED_TYPES and config.backbone_config.model_type in RESNET_TYPES:
        freeze_first_stage(model)
    return model


@torch.no_grad()
def start_as_original(model: PreTrainedModel) -> None:
    """Gives queries, detection tokens and class scores the first values that their papers' code gives them.

    Transformers starts DETR's queries so close together, and YOLOS' tokens so exactly equal, that all find one box and
    only dropout tells them apart; and Conditional DETR's scores, of focal loss, at one half instead of one hundredth.
    Carion et al., 2020; Fang et al., 2021; Meng et al., 2021.
    """
    family: Any = model
    if model.config.model_type in MASKED_TYPES:
        nn.init.normal_(family.model.query_position_embeddings.weight)
    if model.config.model_type == "conditional_detr":
        nn.init.constant_(family.class_labels_classifier.bias, -math.log((1 - PRIOR_SCORE) / PRIOR_SCORE))
    if model.config.model_type == "yolos":
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "_tokens", "position_embeddings")):
                nn.init.trunc_normal_(parameter, std=TOKEN_STD)


def freeze_first_stage(model: PreTrainedModel) -> None:
    """Keeps the stem and first stage of the ResNet under DETR as they are, lets the rest learn: Carion et al., 2020.

    Transformers 5.23 means to, but looks for names ("stage.1") that its own ResNet does not have, which freezes all of
    it in a new model; and `from_pretrained` makes new parameters, all of which learn.
    """
    for name, parameter in model.named_parameters():
        if "backbone" in name.split("."):
            parameter.requires_grad_(any(stage in name for stage in LEARNING_STAGES))


class DetectionTrainer(GuardedTrainer):
    """`GuardedTrainer` whose predictions are detections `[N, K, 6]` (`post_process`) and whose labels are rows `[N]` of the split.

    Raw outputs would be larger, and of a different size in every batch. `processing_class` must be the image processor
    of the model's family.
    """

    def __init__(self, *args: Any, backbone_learning_rate: float | None = None, **kwargs: Any) -> None:
        """`backbone_learning_rate` is that of the convolutional backbone; None: as for the rest.

        Raises:
            ValueError: The rate is negative, or the model has no backbone that learns.
        """
        super().__init__(*args, **kwargs)
        self.backbone_learning_rate = backbone_learning_rate
        model: Any = self.model
        if backbone_learning_rate is None:
            return
        if backbone_learning_rate < 0:
            raise ValueError(f"backbone_learning_rate={backbone_learning_rate} is negative")
        if not list(backbone_parameters(model)):
            raise ValueError(
                f"backbone_learning_rate={backbone_learning_rate}, but {type(model).__name__} has no backbone that "
                "learns; leave it out"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's own, with the parameters of the backbone in groups of their own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.backbone_learning_rate is not None:
            model: Any = self.model
            backbone = {id(parameter) for parameter in backbone_parameters(model)}
            for group in list(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if id(parameter) in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                optimizer.add_param_group({**group, "params": inside, "lr": self.backbone_learning_rate})
        return optimizer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss, detections and rows of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        labels = inputs["labels"]
        processor: Any = self.processing_class
        detections = post_process(processor, outputs, torch.stack([label["frame"] for label in labels]))
        return loss, detections, torch.stack([label["row"] for label in labels])


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model's convolutional backbone that learn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "backbone" in name.split("."):
            yield parameter
