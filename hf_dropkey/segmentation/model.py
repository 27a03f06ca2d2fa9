"""Segmentation models to train: which, from where, DropKey on them, and the class scores of each pixel."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

from ..images.classes import check_id2label, renew_class_scores
from ..images.classes import fit_classes as images_fit_classes
from ..models import (
    DropKeyCeitBackbone,
    DropKeyCeitConfig,
    DropKeyT2TViTBackbone,
    DropKeyT2TViTConfig,
    DropKeyViTBackbone,
    DropKeyViTConfig,
    DropKeyVoloBackbone,
    DropKeyVoloConfig,
)
from ..models.configuration_dropkey_host import carry_backbone_code, dropkey_backbones
from ..saved import check_model_source
from .arguments import DEFAULT_SHAPE, SegmentationDropKeyArguments, SegmentationModelArguments
from .data import SegmentationData


MASK_TYPES = ("mask2former",)
BACKBONES: dict[str, tuple[Any, Any]] = {
    "vit": (DropKeyViTConfig, DropKeyViTBackbone),
    "t2t_vit": (DropKeyT2TViTConfig, DropKeyT2TViTBackbone),
    "volo": (DropKeyVoloConfig, DropKeyVoloBackbone),
    "ceit": (DropKeyCeitConfig, DropKeyCeitBackbone),
}
# what a configuration calls the value of pixels without a class
IGNORE_FIELDS = ("semantic_loss_ignore_index", "loss_ignore_index", "ignore_value")
MAPS = 4
SMALLEST = 1e-8


def make_config(
    arguments: SegmentationModelArguments, dropkey: SegmentationDropKeyArguments, ignore_index: int
) -> PreTrainedConfig:
    """The configuration, checked, without the classes, which the data will tell.

    Raises:
        FileNotFoundError: The folder lacks files.
        ValueError: The pretrained model is of another family, or a value is not allowed.
    """
    if arguments.model_name_or_path:
        config = pretrained_config(arguments)
    else:
        config = upernet_config(backbone_config(arguments), arguments.decoder_size)
    for name in IGNORE_FIELDS:
        if hasattr(config, name):
            setattr(config, name, ignore_index)
    set_backbone_dropkey(config, dropkey)
    return config


def pretrained_config(arguments: SegmentationModelArguments) -> PreTrainedConfig:
    """The configuration of a pretrained model."""
    source = str(arguments.model_name_or_path)
    check_model_source(source)
    found, _ = PreTrainedConfig.get_config_dict(source, revision=arguments.revision)
    known = [str(kind.model_type) for kind in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING]
    kind = str(found.get("model_type"))
    if kind not in (*known, *MASK_TYPES):
        raise ValueError(
            f"{source} has model_type {kind!r}, which segments nothing in Transformers; start from one of "
            f"{', '.join(sorted((*known, *MASK_TYPES)))}, or give it as --backbone_name_or_path if it is a DropKey "
            "classifier"
        )
    check_id2label(found, source)
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_pretrained(source, revision=arguments.revision)
    return config


def backbone_config(arguments: SegmentationModelArguments) -> Any:
    """The configuration of the backbone of a new UperNet, with the stages that its decoder takes.

    Raises:
        ValueError: The checkpoint is of no DropKey family, or a value is not allowed.
    """
    if arguments.backbone_name_or_path:
        source = arguments.backbone_name_or_path
        check_model_source(source)
        found, _ = PreTrainedConfig.get_config_dict(source, revision=arguments.revision)
        kinds = {kind.model_type: kind for kind, _ in BACKBONES.values()}
        kinds["vit"] = DropKeyViTConfig
        if found.get("model_type") not in kinds:
            raise ValueError(
                f"--backbone_name_or_path {source} has model_type {found.get('model_type')!r}; give one of "
                f"{', '.join(sorted(kinds))}, or a whole model as --model_name_or_path"
            )
        config = kinds[str(found["model_type"])].from_pretrained(source, revision=arguments.revision)
        if arguments.image_size:
            config.check_image_sides(arguments.image_size, arguments.image_size)
    else:
        config = new_backbone(arguments)
    config.out_indices = decoder_stages(config)
    return config


def new_backbone(arguments: SegmentationModelArguments) -> Any:
    """The configuration of a backbone from scratch."""
    shape: dict[str, Any] = {**DEFAULT_SHAPE, **arguments.shape()}
    size = arguments.image_size or shape["image_size"]
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    common = {"image_size": size, "hidden_size": width, "num_attention_heads": shape["num_attention_heads"]}
    config_class = BACKBONES[str(arguments.backbone)][0]
    if arguments.backbone == "vit":
        own = {"num_hidden_layers": layers, "intermediate_size": 4 * width, "patch_size": shape["patch_size"]}
    elif arguments.backbone == "volo":
        # a third of the layers are outlook layers, the others two stages
        outlook = max(1, layers // 3)
        first = max(1, (layers - outlook) // 2)
        own = {
            "depths": [outlook, first, max(1, layers - outlook - first)],
            "outlook_hidden_size": width // 2,
            "num_outlook_heads": shape["num_attention_heads"],
        }
    else:
        own = {"num_hidden_layers": layers}
    return config_class(**common, **own)


def decoder_stages(config: Any) -> list[int]:
    """Four stages of a backbone, or all behind the stem if there are fewer, evenly over its depth; the last among them."""
    count = len(config.stage_names) - 1
    return sorted({max(1, round(count * part / MAPS)) for part in range(1, MAPS + 1)})


def upernet_config(backbone: Any, decoder_size: int | None) -> UperNetConfig:
    """UperNet around a backbone; without the auxiliary head, whose place in the list of maps is that of a CNN's."""
    return UperNetConfig(
        backbone_config=backbone, hidden_size=decoder_size or DEFAULT_SHAPE["decoder_size"], use_auxiliary_head=False
    )


def set_backbone_dropkey(config: Any, dropkey: SegmentationDropKeyArguments) -> None:
    """Puts the requested DropKey into a DropKey backbone inside, and the result beside it, where readers look.

    Raises:
        ValueError: A setting is not allowed.
    """
    for backbone in dropkey_backbones(config):
        for name, value in dropkey.given_to_native(f"the backbone {backbone.model_type}").items():
            if hasattr(backbone, name):
                setattr(backbone, name, value)
        backbone.validate_dropkey()
        for name in ("ratio", "final_ratio", "schedule", "pattern", "window"):
            setattr(config, f"dropkey_{name}", getattr(backbone, f"dropkey_{name}"))


def image_side(config: Any, processor: Any, arguments: SegmentationModelArguments) -> int:
    """The side of the images in pixels: as requested, as the image processor has it, or as the model has.

    Raises:
        ValueError: None of them says it.
    """
    if arguments.image_size:
        return arguments.image_size
    size = {name: value for name, value in dict(processor.size or {}).items() if value is not None}
    side = size.get("height") or size.get("shortest_edge") or getattr(config, "image_size", None)
    if not isinstance(side, int):
        raise ValueError(
            f"neither the image processor nor the model of {arguments.model_name_or_path} says how large images are; give --image_size"
        )
    return side


def make_processor(config: Any, arguments: SegmentationModelArguments) -> BaseImageProcessor:
    """The pretrained model's image processor on PIL, with the size that was requested, or a new one.

    Raises:
        FileNotFoundError: A pretrained folder has none.
    """
    source = arguments.model_name_or_path
    if source is None:
        side = arguments.image_size or config.backbone_config.image_size
        return SegformerImageProcessorPil(size={"height": side, "width": side})
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{source} lacks preprocessor_config.json, the image processor; add it")
    load: Any = partial(AutoImageProcessor.from_pretrained, source, revision=arguments.revision, backend="pil")
    side = arguments.image_size
    processor: BaseImageProcessor = load(**({"size": {"height": side, "width": side}} if side else {}))
    return processor


def has_head(architectures: list[str] | None) -> bool:
    """Whether a checkpoint has class scores; one that does not say what it is may have them."""
    return not architectures or "Segmentation" in str(architectures)


def fit_classes(data: SegmentationData, config: Any, arguments: SegmentationModelArguments) -> SegmentationData:
    """The data with the model's class numbers; a model that does not know the classes gets them, if that was requested.

    Raises:
        ValueError: As `hf_dropkey.images.classes.fit_classes`.
    """
    return images_fit_classes(
        data,
        config,
        source=arguments.model_name_or_path,
        has_head=has_head(config.architectures),
        new_head=arguments.ignore_mismatched_sizes,
    )


def auto_class(config: Any) -> Any:
    """The Auto class of a configuration."""
    return AutoModelForUniversalSegmentation if config.model_type in MASK_TYPES else AutoModelForSemanticSegmentation


def make_model(config: Any, arguments: SegmentationModelArguments) -> PreTrainedModel:
    """The model with pretrained weights, or UperNet with a new decoder on a new or pretrained backbone."""
    if not arguments.model_name_or_path:
        upernet = UperNetForSemanticSegmentation(config)
        if arguments.backbone_name_or_path:
            kind = {kind.model_type: model for kind, model in BACKBONES.values()}[config.backbone_config.model_type]
            pretrained = kind.from_pretrained(
                arguments.backbone_name_or_path, config=config.backbone_config, revision=arguments.revision
            )
            upernet.backbone.load_state_dict(pretrained.state_dict())
        return carry_backbone_code(upernet)
    auto = auto_class(config)
    model: PreTrainedModel = auto.from_pretrained(
        arguments.model_name_or_path,
        config=config,
        revision=arguments.revision,
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
    )
    if arguments.ignore_mismatched_sizes:
        found, _ = PreTrainedConfig.get_config_dict(arguments.model_name_or_path, revision=arguments.revision)
        if has_head(found.get("architectures")):
            renew_class_scores(model, config, found, auto.from_config)
    return carry_backbone_code(model) if dropkey_backbones(config) else model


def mask_targets(labels: torch.Tensor, ignore_index: int) -> dict[str, list[torch.Tensor]]:
    """What Mask2Former learns from: the classes of each image and the mask of each of them.

    Args:
        labels: Class numbers `[B, height, width]`.
        ignore_index: Value of pixels without a class.
    """
    classes = [found[found != ignore_index] for found in map(torch.unique, labels)]
    masks = [(one[None] == found[:, None, None]).float() for one, found in zip(labels, classes, strict=True)]
    return {"mask_labels": masks, "class_labels": classes}


class PixelScores(nn.Module):
    """A segmentation model as a classifier of pixels: `logits` `[B, classes, height, width]` in the size of its images."""

    def __init__(self, model: nn.Module) -> None:
        """Wraps a model; nothing is copied."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """The scores of a batch `[B, 3, height, width]`."""
        return SimpleNamespace(logits=pixel_logits(self.model(pixel_values=pixel_values), pixel_values.shape[-2:]))


def pixel_logits(outputs: Mapping[str, Any] | Any, size: Any) -> torch.Tensor:
    """Log scores of the classes of each pixel, at a size (height, width), of any of the models' outputs.

    Of Mask2Former: the masks weighted by the classes of their queries, without "no object", as its image processor has
    it, of which the logarithm of fractions is taken.
    """
    if "masks_queries_logits" not in outputs:
        logits: torch.Tensor = outputs["logits"]
    else:
        classes = outputs["class_queries_logits"].softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", classes, outputs["masks_queries_logits"].sigmoid())
        logits = (scores + SMALLEST).log()
    return nn.functional.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)
