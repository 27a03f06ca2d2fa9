"""Detection models to train: which, from where, with what image processor, DropKey on them, and their `Trainer`."""

import importlib.util
import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    ConditionalDetrConfig,
    ConditionalDetrImageProcessorPil,
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
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

from ..images.classes import check_id2label, renew_class_scores
from ..images.classes import fit_classes as images_fit_classes
from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from ..models.modeling_dropkey_hoi import RESNET_TYPES, freeze_first_stage
from ..saved import check_model_source
from ..training.detr import BACKBONE_WIDTHS, small_backbone
from .arguments import DEFAULT_SHAPE, MASKED_TYPES, DetectionModelArguments
from .data import DetectionData


PROCESSORS = {
    "detr": DetrImageProcessorPil,
    "conditional_detr": ConditionalDetrImageProcessorPil,
    "yolos": YolosImageProcessorPil,
    "rt_detr": RTDetrImageProcessorPil,
}
PRIOR_SCORE = 0.01
TOKEN_STD = 0.02


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
    check_model_source(source)
    found, _ = PreTrainedConfig.get_config_dict(source, revision=arguments.revision)
    known = [kind for kind in MODEL_FOR_OBJECT_DETECTION_MAPPING if kind.__module__.startswith("transformers.")]
    kinds: dict[str, Any] = {str(kind.model_type): kind for kind in known}
    model_type = str(found.get("model_type"))
    if model_type not in kinds:
        hint = "; train it with --task hoi" if model_type == DropKeyHoiConfig.model_type else ""
        raise ValueError(
            f"{source} has model_type {model_type!r}, which detects no objects in Transformers; start from one of "
            f"{', '.join(sorted(kinds))}{hint}"
        )
    check_id2label(found, source)
    config: Any = kinds[model_type].from_pretrained(source, revision=arguments.revision)
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
    kind = DetrConfig if arguments.model_type == "detr" else ConditionalDetrConfig
    return kind(backbone_config=small_backbone(shape.get("backbone_stride", 32)), **common)


def make_processor(config: PreTrainedConfig, arguments: DetectionModelArguments) -> BaseImageProcessor:
    """The pretrained model's image processor on PIL, or the family's; with the size that was requested.

    Raises:
        FileNotFoundError: A pretrained folder has none.
    """
    size = arguments.image_size
    source = arguments.model_name_or_path
    if source is None:
        return PROCESSORS[config.model_type](
            size=processor_size(config.model_type in MASKED_TYPES, size or DEFAULT_SHAPE["image_size"])
        )
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{source} lacks preprocessor_config.json, the image processor; add it")
    load: Any = partial(AutoImageProcessor.from_pretrained, source, revision=arguments.revision, backend="pil")
    processor: BaseImageProcessor = load()
    if size is None:
        return processor
    # YOLOS is trained on images of many sizes, but takes squares
    edges = keeps_shape(processor) and config.model_type != "yolos"
    resized: BaseImageProcessor = load(size=processor_size(edges, size))
    return resized


def keeps_shape(processor: Any) -> bool:
    """Whether an image processor keeps the ratio of height and width, so that images of a batch differ in size."""
    return "shortest_edge" in {name for name, value in dict(processor.size).items() if value is not None}


def needs_mask(model: PreTrainedModel, processor: Any) -> bool:
    """Whether a model is to know which pixels of a batch are padding: where there are some, and it takes a mask."""
    return keeps_shape(processor) and "pixel_mask" in inspect.signature(model.forward).parameters


def processor_size(edges: bool, size: int) -> dict[str, int]:
    """The size of an image processor that scales images to the longest side `size`, or to squares."""
    return {"shortest_edge": size, "longest_edge": size} if edges else {"height": size, "width": size}


def has_head(architectures: list[str] | None) -> bool:
    """Whether a checkpoint has class scores; one that does not say what it is may have them."""
    return not architectures or "ForObjectDetection" in str(architectures)


def fit_classes(data: DetectionData, config: Any, arguments: DetectionModelArguments) -> DetectionData:
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
    if arguments.ignore_mismatched_sizes:
        found, _ = PreTrainedConfig.get_config_dict(arguments.model_name_or_path, revision=arguments.revision)
        if has_head(found.get("architectures")):
            renew_class_scores(model, config, found, AutoModelForObjectDetection.from_config)
    if config.model_type in MASKED_TYPES and config.backbone_config.model_type in RESNET_TYPES:
        family: Any = model
        freeze_first_stage(family.model.backbone)
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
