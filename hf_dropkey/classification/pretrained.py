"""Any image classifier or vision model of Transformers as the start of a training, patched by `apply_dropkey`.

A ViT, and the families of this package, have a path of their own in `model.py`; everything else comes here.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..images.classes import renew_class_scores
from ..models.configuration_dropkey_features import DropKeyFeaturesConfig
from ..models.modeling_dropkey import resize_position_grid
from ..models.modeling_dropkey_features import DropKeyFeaturesForImageClassification
from ..patching.drop_path import FIELD as DROP_PATH_FIELD
from ..patching.drop_path import OWN_FIELD, apply_drop_path
from ..patching.patch_dropout import FIELD as PATCH_DROPOUT_FIELD
from ..patching.patch_dropout import apply_patch_dropout
from ..patching.sites import transformers_model
from .arguments import ClassificationDropKeyArguments, ModelArguments


logger = logging.getLogger(__name__)

AUTO_CLASS = "AutoModelForImageClassification"
# architectures that mask random patches of every image, so that their features describe only a part of it
MASKING_TYPES = ("vit_mae",)
# first parts of the names of classifiers that are not called one
HEAD_NAMES = ("head", "fc", "score")
# names of dropout on attention weights in the configurations of Transformers
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


def pretrained_config(model: ModelArguments, dropkey: ClassificationDropKeyArguments) -> PreTrainedConfig:
    """The configuration of a pretrained image classifier, or of a new classifier on a pretrained vision model.

    Raises:
        ValueError: It is not a model of these kinds, or a value is not allowed.
    """
    if model.image_size is not None and model.image_size < 1:
        raise ValueError(
            f"--image_size {model.image_size} is below 1; give the side of the images in pixels, such as 224"
        )
    source = str(model.model_name_or_path)
    found, _ = PreTrainedConfig.get_config_dict(source, revision=model.revision)
    kind = found.get("model_type")
    if kind not in CONFIG_MAPPING and not model.trust_remote_code:
        raise ValueError(
            f"{source} has model_type {kind!r}, which Transformers does not know"
            + (", and brings its own code; check it, then pass --trust_remote_code" if found.get("auto_map") else "")
        )
    config = AutoConfig.from_pretrained(
        source, revision=model.revision, trust_remote_code=model.trust_remote_code or None
    )
    remote = model.trust_remote_code and AUTO_CLASS in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        config = features_config(config, source)
    change_fields(config, model, dropkey)
    set_drop_path(vision_config(config), model)
    if model.image_size is not None:
        vision_config(config).image_size = model.image_size
        if getattr(vision_config(config), "patch_size", None) is not None:
            # patches have to fill the images
            patch_grid(config)
    # found here, before any data is read and any weights are loaded
    dropkey.settings_for(config)
    return config


def features_config(config: PreTrainedConfig, source: str) -> DropKeyFeaturesConfig:
    """The configuration of a new classifier on a vision model.

    Raises:
        ValueError: `config` is not of a vision model with features of whole images.
    """
    known = type(config) in MODEL_MAPPING
    found: Any = MODEL_MAPPING[type(config)] if known else None
    takes = getattr(found, "main_input_name", None)
    if takes != "pixel_values" or config.model_type in MASKING_TYPES:
        why = (
            "masks random patches of every image"
            if config.model_type in MASKING_TYPES
            else f"takes {takes}, not images"
            if known
            else "is not known to AutoModel"
        )
        raise ValueError(
            f"{source} (model_type {config.model_type!r}) cannot classify images: it has no image classifier in "
            f"Transformers, and as a vision model it {why}. Choose an image classifier or a vision encoder; if the "
            "checkpoint brings its own code, pass --trust_remote_code"
        )
    return DropKeyFeaturesConfig(features_config=config)


def change_fields(config: PreTrainedConfig, model: ModelArguments, dropkey: ClassificationDropKeyArguments) -> None:
    """Sets the fields of `--config_overrides` and the dropouts.

    Raises:
        ValueError: The configuration has no such field.
    """
    own: Any = vision_config(config)
    overrides: Any = model.config_overrides or {}
    changes: dict[str, Any] = dict(overrides)
    if model.hidden_dropout_prob is not None:
        changes["hidden_dropout_prob"] = model.hidden_dropout_prob
    if dropkey.attention_probs_dropout_prob is not None:
        name = next((name for name in ATTENTION_DROPOUTS if hasattr(own, name)), ATTENTION_DROPOUTS[0])
        changes[name] = dropkey.attention_probs_dropout_prob
    known = sorted(name for name in own.to_dict() if not name.startswith("_"))
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"{type(own).__name__} has no fields {unknown}; it has {known}")
    for name, value in changes.items():
        setattr(own, name, value)


def set_drop_path(config: PreTrainedConfig, model: ModelArguments) -> None:
    """Sets the rate of stochastic depth, of a model that has it; `add_drop_path` adds it to others.

    Raises:
        ValueError: The rate is outside [0, 1).
    """
    rate = model.drop_path_rate
    if rate is None:
        return
    if not 0 <= rate < 1:
        raise ValueError(f"--drop_path_rate {rate} is outside [0, 1); choose for example 0.1")
    if hasattr(config, OWN_FIELD):
        setattr(config, OWN_FIELD, rate)


def add_drop_path(model: PreTrainedModel, rate: float | None) -> None:
    """Adds stochastic depth to a model that has none of its own, as `apply_drop_path`, and logs the report.

    Args:
        model: The model, or a `PeftModel`.
        rate: The largest rate, [0, 1); None: what the model's configuration remembers.

    Raises:
        ValueError: No residual branch of the model can be reached.
    """
    own: Any = transformers_model(model)
    if any("DropPath" in type(module).__name__ for module in own.modules()):
        return
    chosen = _chosen_rate(own, rate, DROP_PATH_FIELD)
    if not chosen:
        return
    for part in own.modules():
        # a field that no module reads
        if isinstance(part, PreTrainedModel) and hasattr(part.config, OWN_FIELD):
            setattr(part.config, OWN_FIELD, 0.0)
    with _of_option("--drop_path_rate", chosen):
        logger.info("%s", apply_drop_path(model, chosen))


def add_patch_dropout(model: PreTrainedModel, rate: float | None) -> None:
    """Adds patch dropout to a model, as `apply_patch_dropout`, and logs the report.

    Args:
        model: The model, or a `PeftModel`.
        rate: The fraction of the patches, [0, 1); None: what the model's configuration remembers.

    Raises:
        ValueError: The rate is outside [0, 1), or the model has no plain sequence of patches.
    """
    chosen = _chosen_rate(transformers_model(model), rate, PATCH_DROPOUT_FIELD)
    if chosen:
        with _of_option("--patch_dropout", chosen):
            logger.info("%s", apply_patch_dropout(model, chosen))


def _chosen_rate(own: Any, rate: float | None, field: str) -> float:
    """The rate of a call, else the one that the configuration remembers; 0 makes the configuration forget it."""
    chosen = getattr(own.config, field, None) if rate is None else rate
    if not chosen:
        vars(own.config).pop(field, None)
    return chosen or 0.0


@contextmanager
def _of_option(option: str, rate: float) -> Iterator[None]:
    """Errors say which option asked for the rate."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option} {rate} cannot be had: {error}") from error


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the vision model: of CLIP and SigLIP, `vision_config`."""
    for name in ("features_config", "vision_config"):
        found = getattr(config, name, None)
        if isinstance(found, PreTrainedConfig):
            return found
    return config


def pretrained_model(
    config: PreTrainedConfig, model: ModelArguments, dropkey: ClassificationDropKeyArguments, size: tuple[int, int]
) -> tuple[PreTrainedModel, list[str]]:
    """The model with pretrained weights, positions for its image size, and DropKey.

    Args:
        config: As `pretrained_config`, with the classes.
        model: Where the weights are.
        dropkey: The settings of DropKey.
        size: Height and width of the images in pixels.

    Returns:
        The model, and the names of its modules that have new weights, the classifier among them.

    Raises:
        ValueError: Weights are missing, positions cannot be resized, the model does not take images of this size, or
            no attention can drop keys.
    """
    made, new = load_weights(config, model)
    check_images(made, size, str(model.model_name_or_path))
    dropkey.apply(made)
    return made, new


def load_weights(config: PreTrainedConfig, model: ModelArguments) -> tuple[PreTrainedModel, list[str]]:
    """As `pretrained_model`, without DropKey and without a look at the images."""
    new_classifier = isinstance(config, DropKeyFeaturesConfig) and not config.architectures
    auto: Any = AutoModel if new_classifier else AutoModelForImageClassification
    loaded, report = auto.from_pretrained(
        model.model_name_or_path,
        config=vision_config(config) if new_classifier else config,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code or None,
        # what does not fit is resized or refused below
        ignore_mismatched_sizes=True,
        attn_implementation=model.attn_implementation,
        output_loading_info=True,
    )
    check_weights(report["missing_keys"], str(model.model_name_or_path))
    resize_positions(loaded, report["mismatched_keys"], auto, model)
    if model.ignore_mismatched_sizes and not new_classifier:
        found, _ = PreTrainedConfig.get_config_dict(str(model.model_name_or_path), revision=model.revision)
        renew_class_scores(loaded, config, found, auto.from_config)
    made: PreTrainedModel = loaded
    if new_classifier:
        made = DropKeyFeaturesForImageClassification._from_config(
            config, attn_implementation=model.attn_implementation
        )
        made.features = loaded
    prefix = "features." if new_classifier else ""
    new = {f"{prefix}{name.rpartition('.')[0]}" for name in report["missing_keys"] if not is_head(name)}
    return made, [*head_modules(made), *sorted(new)]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of a model's classifiers."""
    return [name for name, _ in model.named_children() if is_head(name)]


def check_weights(missing: Iterable[str], source: str) -> None:
    """Raises ValueError if the weights lack more than a classifier and what pools for it."""
    lacking = sorted(name for name in missing if not is_head(name) and "pool" not in name)
    if lacking:
        raise ValueError(
            f"{source} lacks {len(lacking)} weights of the model, such as {lacking[0]}; use a whole checkpoint, and "
            "no --config_overrides that change its shape"
        )
    if missing:
        logger.info("new weights, which training has to learn: %s", ", ".join(sorted(missing)))


@torch.no_grad()
def resize_positions(model: PreTrainedModel, mismatched: Any, auto: Any, arguments: ModelArguments) -> None:
    """Gives position embeddings that do not fit, because the images have another size, the values of the old grid.

    Resized bicubically, once; the saved model has them. Learned tables (`position_embeddings`) and BEiT's relative
    biases are known; a classifier of other classes stays new.

    Raises:
        ValueError: Weights of another kind do not fit.
    """
    names = [entry[0] if isinstance(entry, tuple) else entry for entry in mismatched]
    names = [name for name in names if not is_head(name)]
    if not names:
        return
    before = auto.from_pretrained(
        arguments.model_name_or_path,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code or None,
    ).state_dict()
    grid = patch_grid(model.config)
    for name in names:
        parameter = model.get_parameter(name)
        if "relative_position_bias_table" in name:
            parameter.copy_(resized_bias_table(before[name], parameter, grid))
        elif "position_embedding" in name:
            parameter.copy_(resized_table(before[name], parameter, grid, name))
        else:
            raise ValueError(
                f"{name} has shape {list(before[name].shape)} in {arguments.model_name_or_path} and "
                f"{list(parameter.shape)} in the model; use no --config_overrides that change its shape"
            )
    logger.info("resized for images of %s x %s patches: %s", *grid, ", ".join(names))


def is_head(name: str) -> bool:
    """Whether a weight is of a classifier, by the names that Transformers gives it."""
    part = name.split(".")[0]
    return "classifier" in part or part in HEAD_NAMES


def patch_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: Patches do not fill the images.
    """
    own: Any = vision_config(config)
    sides, patches = pair(own.image_size), pair(own.patch_size)
    for side, patch in zip(sides, patches, strict=True):
        if side % patch:
            raise ValueError(
                f"--image_size {side} is not a multiple of the model's patches of {patch} pixels; choose for example "
                f"{max(side // patch, 1) * patch}"
            )
    return sides[0] // patches[0], sides[1] // patches[1]


def pair(value: Any) -> tuple[int, int]:
    """A number for both directions, or one for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def resized_table(old: torch.Tensor, new: torch.Tensor, grid: tuple[int, int], name: str) -> torch.Tensor:
    """A table of positions, `[1, P + N, C]` or `[P + N, C]` with P tokens in front of N patches, at another grid.

    Raises:
        ValueError: The old patches are not a square.
    """
    prefix = new.shape[-2] - grid[0] * grid[1]
    side = math.isqrt(max(old.shape[-2] - prefix, 0))
    if prefix < 0 or side * side != old.shape[-2] - prefix:
        raise ValueError(
            f"{name} has {old.shape[-2]} positions, not {max(prefix, 0)} and a square; leave out --image_size"
        )
    table = old.reshape(-1, old.shape[-1])
    patches = resize_position_grid(table[prefix:].unflatten(0, (1, side, side)), grid)
    return torch.cat((table[:prefix], patches.flatten(0, 2))).reshape(new.shape)


def resized_bias_table(old: torch.Tensor, new: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """BEiT's relative biases `[(2 rows - 1)(2 columns - 1) + 3, H]` at another grid; the last 3: class token."""
    extra = 3
    side = math.isqrt(len(old) - extra)
    distances = (2 * grid[0] - 1, 2 * grid[1] - 1)
    biases = resize_position_grid(old[:-extra].unflatten(0, (1, side, side)), distances)
    return torch.cat((biases.flatten(0, 2), old[-extra:])).reshape(new.shape)


def check_images(model: PreTrainedModel, size: tuple[int, int], source: str) -> None:
    """Raises ValueError if the model does not take images of `size` (height, width), by calling it with one."""
    images = torch.zeros(1, channels(model.config), *size, dtype=model.dtype)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=images)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source} does not take the images of {size[0]} x {size[1]} pixels that its image processor makes "
            f"({str(error).splitlines()[0]}); pass --image_size, which resizes the positions of the model, or name another "
            "processor with --image_processor_name"
        ) from error
    finally:
        model.train(was_training)


def channels(config: PreTrainedConfig) -> int:
    """Channels of the images; configurations that do not say are of models for colour images."""
    return int(getattr(vision_config(config), "num_channels", 3))
