"""Models of human-object interaction detection to train: from scratch, from a DETR of COCO, or pretrained."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    PreTrainedConfig,
)

from ..images.checks import name_some
from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from ..models.modeling_dropkey_hoi import RESNET_TYPES, DropKeyHoiForObjectDetection, freeze_first_stage
from ..saved import check_model_folder
from ..training.detr import small_backbone
from .arguments import DEFAULT_IMAGE_SIZE, HoiModelArguments
from .data import HoiData, model_labels, numbers_of


logger = logging.getLogger(__name__)


def make_config(arguments: HoiModelArguments, dropkey: dict[str, Any]) -> DropKeyHoiConfig:
    """The configuration, without the names of classes and verbs, which the data will tell.

    Args:
        arguments: Which model.
        dropkey: DropKey fields that were given.

    Raises:
        FileNotFoundError: The folder lacks files.
        ValueError: The pretrained model is of another family, or a value is not allowed.
    """
    source = arguments.model_name_or_path or arguments.detr
    given: dict[str, Any] = {"dropout": arguments.dropout, "attention_dropout": arguments.attention_dropout}
    given |= {"verb_loss": arguments.verb_loss}
    settings = {**dropkey, **{name: value for name, value in given.items() if value is not None}}
    if source is None:
        return config_from_scratch(arguments, settings)
    if Path(source).is_dir():
        check_model_folder(Path(source))
    found, _ = PreTrainedConfig.get_config_dict(source, revision=arguments.revision)
    wanted = "detr" if arguments.detr else DropKeyHoiConfig.model_type
    if found.get("model_type") != wanted:
        option = "--detr" if arguments.detr else "--model_name_or_path"
        raise ValueError(f"{source} has model_type {found.get('model_type')!r}; {option} takes a {wanted!r}")
    if arguments.detr:
        return config_from_detr(DetrConfig.from_pretrained(source, revision=arguments.revision), settings)
    config: DropKeyHoiConfig = DropKeyHoiConfig.from_pretrained(source, revision=arguments.revision, **settings)
    return config


def config_from_scratch(arguments: HoiModelArguments, settings: dict[str, Any]) -> DropKeyHoiConfig:
    """A small configuration on a ConvNeXt.

    Raises:
        ValueError: Heads do not divide the width.
    """
    shape = arguments.shape()
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    if width % heads or width % 4:
        raise ValueError(
            f"hidden_size={width} must be a multiple of num_attention_heads={heads} and of 4; choose for example "
            f"{16 * heads}"
        )
    return DropKeyHoiConfig(
        backbone_config=small_backbone(shape["backbone_stride"]),
        d_model=width,
        encoder_layers=shape["encoder_layers"],
        decoder_layers=shape["decoder_layers"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=shape["intermediate_size"],
        decoder_ffn_dim=shape["intermediate_size"],
        num_queries=shape["num_queries"],
        **{"dropout": shape["dropout"], **settings},
    )


# fields of a DETR that shape the model
SHAPE_FIELDS = (
    *("num_channels", "num_queries", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads"),
    *("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "activation_function", "d_model", "dropout"),
    *("attention_dropout", "activation_dropout", "position_embedding_type", "backbone_config", "dilation"),
)


def config_from_detr(detr: DetrConfig, settings: dict[str, Any]) -> DropKeyHoiConfig:
    """The configuration of a model that continues a DETR."""
    return DropKeyHoiConfig(**{**{name: getattr(detr, name) for name in SHAPE_FIELDS}, **settings})


def fit_names(data: HoiData, config: DropKeyHoiConfig, arguments: HoiModelArguments) -> HoiData:
    """The data with the model's numbers; a new model gets the data's names.

    Names are compared, never their places.

    Raises:
        ValueError: The pretrained model does not know the data's names, and new scores were not requested.
    """
    if arguments.model_name_or_path and not arguments.ignore_mismatched_sizes:
        objects = config.object_names()
        objects = objects[:-1] if config.missing_object else objects
        try:
            return data.renamed(objects, list(config.verbs or ()), missing_object=config.missing_object)
        except ValueError as error:
            raise ValueError(
                f"{error}, start with new object and verb scores with --ignore_mismatched_sizes, or choose another model"
            ) from error
    labels = model_labels(data)
    config.id2label = labels
    config.label2id = {name: number for number, name in labels.items()}
    config.verbs = list(data.verbs)
    config.missing_object = data.missing_object
    config.person_label = data.person_label
    return data


def make_model(config: DropKeyHoiConfig, arguments: HoiModelArguments) -> DropKeyHoiForObjectDetection:
    """The model with pretrained weights, those of a DETR, or new ones."""
    if arguments.model_name_or_path:
        model: DropKeyHoiForObjectDetection = DropKeyHoiForObjectDetection.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            revision=arguments.revision,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
        )
        backbone: Any = config.backbone_config
        if backbone.model_type in RESNET_TYPES:
            # what from_pretrained makes learns throughout
            freeze_first_stage(model.model.backbone)
        return model
    model = DropKeyHoiForObjectDetection(config)
    if arguments.detr:
        detr = DetrForObjectDetection.from_pretrained(arguments.detr, revision=arguments.revision)
        new = start_from_detr(model, detr)
        logger.info("object classes of %s taken over by name; new: %s", arguments.detr, name_some(new) or "none")
    return model


@torch.no_grad()
def start_from_detr(model: DropKeyHoiForObjectDetection, detr: DetrForObjectDetection) -> list[str]:
    """Gives a model the weights of a DETR: its trunk, both box heads from its own, object classes by their names.

    Returns:
        The object classes that the DETR does not know, whose scores stay new.

    Raises:
        ValueError: It knows none of them.
    """
    names = model.config.object_names()
    theirs_by_number: Any = detr.config.id2label
    known = [theirs_by_number.get(number, "") for number in range(detr.config.num_labels or 0)]
    rows = numbers_of(names, known)
    if all(row is None for row in rows):
        raise ValueError(
            f"the DETR knows none of the object classes {name_some(names)}; it knows {name_some(known)}. Name your "
            "classes as it does, or start from scratch"
        )
    model.model.load_state_dict(detr.model.state_dict())
    for head in (model.person_bbox_predictor, model.object_bbox_predictor):
        head.load_state_dict(detr.bbox_predictor.state_dict())
    ours, theirs = model.class_labels_classifier, detr.class_labels_classifier
    places: Sequence[tuple[int, int | None]] = [*enumerate(rows), (len(names), len(known))]
    for number, row in places:
        if row is not None:
            ours.weight[number] = theirs.weight[row]
            ours.bias[number] = theirs.bias[row]
    return [name for name, row in zip(names, rows, strict=True) if row is None]


def make_processor(arguments: HoiModelArguments, scene_size: int | None) -> BaseImageProcessor:
    """The pretrained model's image processor on PIL, or a new one; with the size that was requested.

    Args:
        arguments: Which model, and which size.
        scene_size: The size of generated scenes, None for other data.

    Raises:
        FileNotFoundError: A pretrained folder has none.
    """
    source = arguments.model_name_or_path or arguments.detr
    size = arguments.image_size
    if source is None:
        size = size or scene_size or DEFAULT_IMAGE_SIZE
        return DetrImageProcessorPil(size={"shortest_edge": size, "longest_edge": size})
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{source} lacks preprocessor_config.json, the image processor; add it")
    changes = {} if size is None else {"size": {"shortest_edge": size, "longest_edge": size}}
    return AutoImageProcessor.from_pretrained(source, revision=arguments.revision, backend="pil", **changes)
