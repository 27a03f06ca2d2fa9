"""From the arguments of a training job to a checked configuration, a model, an image processor and ready data."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..images.classes import check_id2label, renew_class_scores
from ..images.classes import fit_classes as images_fit_classes
from ..saved import check_model_source
from .arguments import SHAPE_FIELDS, ClassificationDropKeyArguments, ModelArguments
from .data import ImageData
from .families import FAMILIES, SMALLEST, Family, family_of, image_processor
from .pretrained import pretrained_config, resize_positions, set_drop_path


# weights that a pretrained model need not have, because every task has its own
HEADS = ("classifier.", "token_classifier.")


def make_config(model: ModelArguments, dropkey: ClassificationDropKeyArguments, *, digits: bool) -> PreTrainedConfig:
    """The configuration, checked; its classes come later, from the data.

    Raises:
        ValueError: A value is not allowed, the folder lacks files, or the pretrained model cannot classify images.
    """
    if model.model_name_or_path:
        check_model_source(model.model_name_or_path)
        found, _ = PreTrainedConfig.get_config_dict(model.model_name_or_path, revision=model.revision)
        name = family_of(found.get("model_type"))
        check_id2label(found, model.model_name_or_path)
        if name is None or (dropkey.dropkey_patch and name == "vit"):
            return pretrained_config(model, dropkey)
        settings = {**own_settings(dropkey), **overrides(model, name)}
        if model.image_size is not None:
            settings["image_size"] = model.image_size
        config = FAMILIES[name].config_class.from_pretrained(
            model.model_name_or_path, revision=model.revision, **settings
        )
    else:
        name = model.model_family or "vit"
        settings = {**shape_from_scratch(model, digits=digits), **own_settings(dropkey), **overrides(model, name)}
        config = FAMILIES[name].config_class(**settings)
    if model.hidden_dropout_prob is not None:
        config.hidden_dropout_prob = model.hidden_dropout_prob
    set_drop_path(config, model)
    # fields of a pretrained configuration were set one by one
    config.validate()
    return config


def own_settings(dropkey: ClassificationDropKeyArguments) -> dict[str, Any]:
    """The DropKey arguments that are fields of this package's configurations.

    Raises:
        ValueError: Arguments are only for models that are patched.
    """
    settings = dropkey.given()
    patched = [name for name in ("dropkey_include", "dropkey_exclude", "dropkey_patch") if settings.pop(name, None)]
    if patched:
        raise ValueError(
            f"--{patched[0]} is for models that apply_dropkey patches, and this one has DropKey of its own; leave it out"
            + (", or pass --dropkey_patch with a plain ViT" if "dropkey_patch" not in patched else "")
        )
    return settings


def is_native(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a family of this package, whose models have DropKey without patching."""
    return any(isinstance(config, family.config_class) for family in FAMILIES.values())


def overrides(model: ModelArguments, family: str) -> dict[str, Any]:
    """The fields of --config_overrides.

    Raises:
        ValueError: The family has no such field, or the field has an argument of its own.
    """
    values: Any = model.config_overrides or {}
    arguments = {field.name for group in (ModelArguments, ClassificationDropKeyArguments) for field in fields(group)}
    # it was an override before it was an argument
    arguments -= {"drop_path_rate"}
    twice = sorted(arguments & set(values))
    if twice:
        raise ValueError(f"--config_overrides has {twice}, which are arguments of their own: pass --{twice[0]}")
    everyones = {field.name for field in fields(PreTrainedConfig)}
    known = {field.name for field in fields(FAMILIES[family].config_class)} - everyones - arguments
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"--config_overrides has {unknown}, not fields of the family {family}; it has {sorted(known)}"
        )
    return dict(values)


def model_size(model: ModelArguments, *, digits: bool) -> str:
    """The name of the size from scratch.

    Raises:
        ValueError: The family has no such size.
    """
    name = model.model_family or "vit"
    family = FAMILIES[name]
    size = model.model_size or (SMALLEST if digits else family.usual_size)
    if size not in family.sizes:
        other = next((other for other, about in FAMILIES.items() if size in about.sizes), None)
        advice = f", or pass --model_family {other}" if other else ""
        raise ValueError(
            f"--model_size {size} is not a size of the family {name}; choose from {', '.join(family.sizes)}{advice}"
        )
    return size


def shape_from_scratch(model: ModelArguments, *, digits: bool) -> dict[str, Any]:
    """The shape of a model from scratch: configured fields first, then those of the size, then those for the data.

    Raises:
        ValueError: The family has no such size or field, or patches do not fill the image.
    """
    name = model.model_family or "vit"
    family: Family = FAMILIES[name]
    size = family.sizes[model_size(model, digits=digits)]
    configured = {field: getattr(model, field) for field in SHAPE_FIELDS if getattr(model, field) is not None}
    foreign = sorted(set(configured) - {field.name for field in fields(family.config_class)})
    if foreign:
        raise ValueError(
            f"the family {name} has no {', '.join(foreign)}; leave out --{foreign[0]}, "
            "--config_overrides sets the family's own fields"
        )
    shape = {**size, **(family.digits_shape if digits else family.photo_shape), "num_channels": 3, **configured}
    patch = shape.get("patch_size")
    # the other families check their images themselves
    if patch is not None and (patch < 1 or shape["image_size"] % patch):
        raise ValueError(
            f"--image_size {shape['image_size']} is not a multiple of --patch_size {patch}; "
            "choose sizes so that patches fill the image"
        )
    return shape


def check_loss(config: PreTrainedConfig, *, label_smoothing: float, mixes: bool = False) -> None:
    """Raises ValueError if label smoothing or mixing, which replace the model's own loss, would leave some of it untrained."""
    own = [name for name in ("dense_head", "mix_token") if getattr(config, name, False)]
    if mixes and own:
        raise ValueError(
            f"--mixup and --cutmix replace the model's loss, and this one has {' and '.join(own)} in its own; leave them out, "
            f"""or train without with --config_overrides '{{{", ".join(f'"{name}": false' for name in own)}}}'"""
        )
    if label_smoothing and getattr(config, "dense_head", False):
        raise ValueError(
            f"--label_smoothing_factor {label_smoothing} replaces the model's loss, so that the dense head of VOLO, "
            "which counts in its predictions, would never be trained; leave it out, or train without that head with "
            """--config_overrides '{"dense_head": false}'"""
        )


def has_head(architectures: list[str] | None) -> bool:
    """Whether a checkpoint has class scores; one without a class name may have them."""
    return not architectures or "ForImageClassification" in str(architectures)


def fit_classes(data: ImageData, config: PreTrainedConfig, model: ModelArguments) -> ImageData:
    """The data with the model's class numbers; a model that does not know the classes gets new scores on request.

    Raises:
        ValueError: As `hf_dropkey.images.classes.fit_classes`; or there is one class only.
    """
    fitted = images_fit_classes(
        data,
        config,
        source=model.model_name_or_path,
        has_head=has_head(config.architectures),
        new_head=model.ignore_mismatched_sizes,
    )
    if len(fitted.label_names) < 2:
        raise ValueError(
            f"the data has one class, {fitted.label_names[0]!r}, which any model gets right; give images of at least "
            "two classes, or a model that knows others too"
        )
    # the first loss would set it; checkpoints hold it, and a resumed run must have the same configuration
    config.problem_type = "single_label_classification"
    return fitted


def make_model(config: PreTrainedConfig, model: ModelArguments) -> PreTrainedModel:
    """The model, with pretrained weights or new ones.

    Raises:
        ValueError: The pretrained model lacks weights of the configuration, other than those of a head.
    """
    model_class = FAMILIES[str(family_of(config.model_type))].model_class

    def make(config: PreTrainedConfig) -> PreTrainedModel:
        made: PreTrainedModel = model_class._from_config(config, attn_implementation=model.attn_implementation)
        return made

    if not model.model_name_or_path:
        return make(config)
    made, report = model_class.from_pretrained(
        model.model_name_or_path,
        config=config,
        revision=model.revision,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes or model.image_size is not None,
        attn_implementation=model.attn_implementation,
        output_loading_info=True,
    )
    resize_positions(made, report["mismatched_keys"], model_class, model)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(HEADS))
    if missing:
        raise ValueError(
            f"{model.model_name_or_path} lacks {len(missing)} weights of the model, such as {missing[0]}; use a whole "
            "checkpoint, and no --config_overrides that change its shape"
        )
    if model.ignore_mismatched_sizes:
        found, _ = PreTrainedConfig.get_config_dict(model.model_name_or_path, revision=model.revision)
        if has_head(found.get("architectures")):
            renew_class_scores(made, config, found, make)
    loaded: PreTrainedModel = made
    return loaded


def make_image_processor(config: PreTrainedConfig, model: ModelArguments, *, digits: bool) -> BaseImageProcessor:
    """The pretrained model's image processor, or the family's own for the configuration.

    Raises:
        FileNotFoundError: A pretrained folder lacks it.
        ValueError: It makes images of another size than the model takes.
    """
    source = model.image_processor_name or model.model_name_or_path
    if source is None:
        name = model.model_family or "vit"
        size = model_size(model, digits=digits)
        return image_processor(name, size, config.image_size, num_channels=config.num_channels)
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{source} lacks preprocessor_config.json; add it, or name another source with --image_processor_name"
        )
    processor = AutoImageProcessor.from_pretrained(
        source, revision=model.revision, backend="pil", trust_remote_code=model.trust_remote_code or None
    )
    if model.image_size is not None:
        set_size(processor, model.image_size)
    makes = made_size(processor)
    if None in makes:
        raise ValueError(
            f"the image processor of {source} makes images of different sizes ({processor.size}); pass --image_size"
        )
    # other models are called with an image of this size before training starts
    if is_native(config) and makes != image_size(config):
        raise ValueError(
            f"the image processor of {source} makes images of {makes} and the model takes {image_size(config)}; "
            "name a matching one with --image_processor_name"
        )
    return processor


def set_size(processor: Any, side: int) -> None:
    """Lets an image processor make squares of `side` pixels; where it crops, it keeps the same part of the image."""
    if getattr(processor, "do_center_crop", None):
        before = dict(processor.crop_size)["height"]
        shortest = dict(processor.size).get("shortest_edge")
        if shortest is not None:
            processor.size = {"shortest_edge": round(shortest * side / before)}
        else:
            processor.size = {"height": side, "width": side}
        processor.crop_size = {"height": side, "width": side}
    else:
        processor.size = {"height": side, "width": side}


def made_size(processor: Any) -> tuple[int | None, int | None]:
    """Height and width of the images that an image processor makes, None where they depend on the image."""
    size = dict(processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size)
    return size.get("height"), size.get("width")


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images the model takes."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
