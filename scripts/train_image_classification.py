"""Trains a Vision Transformer with DropKey to classify images, and saves a folder that anyone can load.

From a recipe, with anything after it taking precedence:
    python scripts/train_image_classification.py scripts/recipes/digits_vit.json --output_dir runs/digits --seed 1
From scratch on your own folders of images, one sub-folder per class:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/mine \
        --train_dir images/train --validation_dir images/validation --model_size small --dropkey_ratio 0.1
From a pretrained ViT, on a data set of the hub:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/beans \
        --dataset_name beans --model_name_or_path google/vit-base-patch16-224-in21k --dropkey_ratio 0.1
Without a data argument it trains on the built-in handwritten digits. --help lists everything.

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.checkpoints import check_model_folder, check_same_model, prepare_output_folder
from hf_dropkey.data import DataArguments, ImageData, load_image_data
from hf_dropkey.image_transform import Augmentation, AugmentationEpoch, ImageTransform, collate_images
from hf_dropkey.metrics import classification_metrics


logger = logging.getLogger(__name__)

# tiny, small and base are those of Touvron et al., DeiT, ICML 2021, table 1; nano is for images of a few pixels
MODEL_SIZES = {
    "nano": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
DIGITS_SHAPE = {"image_size": 12, "patch_size": 2}
DIGITS_AUGMENTATION = {"rotation_degrees": 5.0, "shift_fraction": 0.05}
PHOTO_AUGMENTATION = {"crop_scale": 0.35, "flip_probability": 0.5}
PRETRAINED_TYPES = ("vit", "dropkey_vit")


@dataclass
class ModelArguments:
    """Which model: a pretrained one, or a size from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "ViT or DropKeyViT to start from: a folder or a hub id. Default: from scratch."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the image processor, if the model has none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new head if the model was made for another number of classes."}
    )
    model_size: Literal["nano", "tiny", "small", "base"] | None = field(
        default=None, metadata={"help": "Size from scratch. Default: nano for the digits, else tiny."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side in pixels. Default: 12 for digits, else 224."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "Side in pixels. Default: 2 for digits, else 16."})
    num_channels: int | None = field(
        default=None, metadata={"help": "3 (default), or 1 for grey images, which the hub's pipelines do not feed."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Overrides --model_size, as the next ones."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLP."})
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout after attention and MLP."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend, such as eager or sdpa. Default: the best there is."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError if a pretrained model and a size from scratch are both asked for."""
        shape = {name: value for name, value in self.shape().items() if value is not None}
        if self.model_name_or_path and shape:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out {shape}"
            )

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch."""
        names = ("model_size", "image_size", "patch_size", "num_channels", *MODEL_SIZES["nano"])
        return {name: getattr(self, name) for name in names}


@dataclass
class DropKeyArguments:
    """DropKey, and the dropout it replaces. What is not given is as the model has it, or as DropKeyViTConfig has it."""

    _argument_group_name = "DropKey"

    dropkey_ratio: float | None = field(
        default=None, metadata={"help": "Largest drop ratio of a layer, in [0, 1); 0 trains without. Default: 0.1."}
    )
    dropkey_final_ratio: float | None = field(
        default=None, metadata={"help": "The other end of the schedule, from 0 to the ratio. Default: 0."}
    )
    dropkey_schedule: str | None = field(
        default=None, metadata={"help": "Over depth: decreasing (default), constant or increasing."}
    )
    dropkey_pattern: str | None = field(
        default=None, metadata={"help": "Dropped together: score (default, the paper's), key, token, block or cross."}
    )
    dropkey_window: int | None = field(default=None, metadata={"help": "Patches of a block's side or a cross's arm."})
    attention_probs_dropout_prob: float | None = field(
        default=None,
        metadata={"help": "Plain dropout on attention weights, to compare with; needs --dropkey_ratio 0."},
    )
    dropkey_with_attention_dropout: bool | None = field(
        default=None, metadata={"help": "Allows plain dropout on attention weights beside DropKey."}
    )

    def given(self) -> dict[str, Any]:
        """The arguments that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class AugmentationArguments:
    """How training images vary. The digits turn and shift by default; other images are cropped and mirrored."""

    _argument_group_name = "Augmentation"

    crop_scale: float | None = field(
        default=None, metadata={"help": "Smallest share of the area that a random crop keeps, (0, 1]; 1: no crops."}
    )
    flip_probability: float | None = field(default=None, metadata={"help": "Probability of a mirror image, [0, 1]."})
    rotation_degrees: float | None = field(default=None, metadata={"help": "Largest rotation to either side."})
    shift_fraction: float | None = field(default=None, metadata={"help": "Largest shift as a share of the side."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Largest change of brightness, contrast and saturation, [0, 1]."}
    )

    def augmentation(self, image_size: tuple[int, int], *, digits: bool) -> Augmentation:
        """What was given, over the defaults for the kind of image."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return Augmentation(image_size, **{**(DIGITS_AUGMENTATION if digits else PHOTO_AUGMENTATION), **given})


@dataclass
class RunArguments:
    """What happens to an output folder that is not empty."""

    _argument_group_name = "Output folder"

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run in --output_dir: its checkpoints are deleted."}
    )


ARGUMENT_GROUPS: Any = (
    ModelArguments,
    DropKeyArguments,
    DataArguments,
    AugmentationArguments,
    RunArguments,
    TrainingArguments,
)


def parse(command: Sequence[str]) -> tuple[Any, ...]:
    """One object for each argument group, from a JSON recipe in the first place, if any, and the rest of the command.

    Raises:
        ValueError: The recipe has a field that is no argument.
    """
    parser = HfArgumentParser(ARGUMENT_GROUPS)
    rest = list(command)
    if rest and rest[0].endswith(".json"):
        recipe = json.loads(Path(rest.pop(0)).read_text(encoding="utf-8"))
        unknown = sorted(set(recipe) - set(vars(parser.parse_args([]))))
        if unknown:
            raise ValueError(f"the recipe {command[0]} has fields that are no arguments: {unknown}; see --help")
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(rest, look_for_args_file=False)


def check_training_arguments(training: TrainingArguments) -> None:
    """Raises ValueError for a token among the arguments, or if there is nothing to do."""
    if training.hub_token is not None:
        raise ValueError(
            "--hub_token would be saved in training_args.bin and published with it; "
            "log in with `hf auth login` or set the environment variable HF_TOKEN"
        )
    if not (training.do_train or training.do_eval):
        raise ValueError("nothing to do; pass --do_train, --do_eval or both")


def make_config(model: ModelArguments, dropkey: DropKeyArguments, *, digits: bool) -> PreTrainedConfig:
    """The configuration, checked, without the classes, which the data will tell.

    Raises:
        ValueError: A value is not allowed, the folder lacks files, or the pretrained model is no ViT.
    """
    if model.model_name_or_path:
        if Path(model.model_name_or_path).is_dir():
            check_model_folder(Path(model.model_name_or_path))
        found, _ = PreTrainedConfig.get_config_dict(model.model_name_or_path, revision=model.revision)
        if found.get("model_type") not in PRETRAINED_TYPES:
            raise ValueError(
                f"{model.model_name_or_path} has model_type {found.get('model_type')!r}; this script starts from "
                f"{PRETRAINED_TYPES}"
            )
        config = DropKeyViTConfig.from_pretrained(model.model_name_or_path, revision=model.revision, **dropkey.given())
    else:
        config = DropKeyViTConfig(**shape_from_scratch(model, digits=digits), **dropkey.given())
    if model.hidden_dropout_prob is not None:
        config.hidden_dropout_prob = model.hidden_dropout_prob
    config.validate_dropkey()
    return config


def shape_from_scratch(model: ModelArguments, *, digits: bool) -> dict[str, Any]:
    """The shape of a model from scratch: what was given, over the size, over what suits the data.

    Raises:
        ValueError: Patches do not fill the image.
    """
    size = MODEL_SIZES[model.model_size or ("nano" if digits else "tiny")]
    usual = DIGITS_SHAPE if digits else {"image_size": 224, "patch_size": 16}
    given = {name: value for name, value in model.shape().items() if value is not None and name != "model_size"}
    shape = {**size, **usual, "num_channels": 3, **given}
    if shape["patch_size"] < 1 or shape["image_size"] % shape["patch_size"]:
        raise ValueError(
            f"image_size={shape['image_size']} is not a multiple of patch_size={shape['patch_size']}; "
            "choose sizes so that patches fill the image"
        )
    return shape


def set_classes(config: PreTrainedConfig, model: ModelArguments, label_names: list[str]) -> None:
    """Gives the configuration the classes of the data.

    Raises:
        ValueError: The pretrained head is for another number of classes, and a new one was not asked for.
    """
    had_head = model.model_name_or_path and "ForImageClassification" in str(config.architectures)
    if had_head and config.num_labels != len(label_names) and not model.ignore_mismatched_sizes:
        raise ValueError(
            f"{model.model_name_or_path} has {config.num_labels} classes and the data has {len(label_names)}; "
            "start with a new head with --ignore_mismatched_sizes, or choose another model"
        )
    # what the first loss would find out: a checkpoint says so and must match
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: number for number, name in enumerate(label_names)}


def make_model(config: PreTrainedConfig, model: ModelArguments) -> DropKeyViTForImageClassification:
    """The model, with pretrained weights or new ones."""
    if not model.model_name_or_path:
        return DropKeyViTForImageClassification._from_config(config, attn_implementation=model.attn_implementation)
    return DropKeyViTForImageClassification.from_pretrained(
        model.model_name_or_path,
        config=config,
        revision=model.revision,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        attn_implementation=model.attn_implementation,
    )


def make_image_processor(config: PreTrainedConfig, model: ModelArguments) -> BaseImageProcessor:
    """The pretrained model's image processor, or one for the configuration.

    Raises:
        FileNotFoundError: A pretrained folder has none.
        ValueError: It makes images of another size than the model takes.
    """
    source = model.image_processor_name or model.model_name_or_path
    if source is None:
        middle = [0.5] * config.num_channels
        size = {"height": config.image_size, "width": config.image_size}
        color = config.num_channels == 3
        return ViTImageProcessorPil(size=size, image_mean=middle, image_std=middle, do_convert_rgb=color)
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{source} lacks preprocessor_config.json; add it, or name another source with --image_processor_name"
        )
    processor = AutoImageProcessor.from_pretrained(source, revision=model.revision, backend="pil")
    makes = tuple(dict(processor.size).get(side) for side in ("height", "width"))
    if makes != image_size(config):
        raise ValueError(
            f"the image processor of {source} makes images of {makes} and the model takes {image_size(config)}; "
            "name a matching one with --image_processor_name"
        )
    return processor


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images the model takes."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def transform_rows(
    data: ImageData, processor: BaseImageProcessor, config: PreTrainedConfig, augmentation: Augmentation, *, seed: int
) -> ImageTransform:
    """Makes the data sets give tensors from now on; returns the transform of the training rows."""
    takes = {"label_ids": data.label_ids, "num_channels": config.num_channels}
    data.evaluation.set_transform(ImageTransform(processor, **takes))
    training = ImageTransform(processor, **takes, augmentation=augmentation, seed=seed)
    if data.train is not None:
        data.train.set_transform(training)
    return training


def train_and_save(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if there is one; saves model, image processor, metrics and trainer state."""
    model: Any = trainer.model
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        # the trainer's uploads during training leave out the code that the configuration names
        model.config.save_pretrained(output_folder(trainer.args))
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", {**metrics, "parameters": model.num_parameters()})
    trainer.save_state()


def evaluate_and_save(trainer: Trainer) -> None:
    """Evaluates, prints and saves the metrics."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def write_card(trainer: Trainer, *, dataset: str, finetuned_from: str | None) -> None:
    """Uploads everything with a model card, or writes the card beside the weights if there is none."""
    card: dict[str, Any] = {
        "tasks": "image-classification",
        "tags": ["image-classification", "vision", "dropkey"],
        "dataset": dataset,
        "finetuned_from": finetuned_from,
    }
    if finetuned_from is None:
        # an empty name makes the card say "fine-tuned", one that is a folder leaves it at "trained from scratch"
        model: Any = trainer.model
        model.config._name_or_path = str(output_folder(trainer.args))
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif trainer.is_world_process_zero() and not (output_folder(trainer.args) / "README.md").exists():
        trainer.create_model_card(**card)


def output_folder(training: TrainingArguments) -> Path:
    """The folder of the run."""
    return Path(str(training.output_dir))


def main() -> None:
    """Runs the job."""
    model_args, dropkey_args, data_args, augmentation_args, run_args, training_args = parse(sys.argv[1:])
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if training_args.should_log else "WARN")
    # one line for every request to the hub
    logging.getLogger("httpx").setLevel("WARN")

    # everything that can be wrong is looked at first, from the cheapest on
    check_training_arguments(training_args)
    config = make_config(model_args, dropkey_args, digits=data_args.is_digits)
    augmentation = augmentation_args.augmentation(image_size(config), digits=data_args.is_digits)
    processor = make_image_processor(config, model_args)
    checkpoint = None
    if training_args.do_train:
        with training_args.main_process_first(desc="preparing the output folder"):
            checkpoint = prepare_output_folder(
                output_folder(training_args),
                resume=training_args.resume_from_checkpoint,
                overwrite=run_args.overwrite_output_dir,
            )
    with training_args.main_process_first(desc="loading the data"):
        data = load_image_data(data_args, training=training_args.do_train)
    set_classes(config, model_args, data.label_names)
    if checkpoint is not None:
        check_same_model(config, checkpoint)

    set_seed(training_args.seed)
    model = make_model(config, model_args)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    transform = transform_rows(data, processor, config, augmentation, seed=seed)
    # the transform reads columns that the model does not take
    training_args.remove_unused_columns = False
    # nothing to pin for, and every data loader would warn
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=processor,
        data_collator=collate_images,
        compute_metrics=classification_metrics,
        callbacks=[AugmentationEpoch(transform)],
    )
    logger.info("%d classes, %d parameters", len(data.label_names), model.num_parameters())
    logger.info("evaluation on %s: %d images", data.evaluation_split, len(data.evaluation))

    if training_args.do_train:
        train_and_save(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_and_save(trainer)
    source = model_args.model_name_or_path
    if source is not None and Path(source).is_dir():
        # the card is for others, whom the rest of a local path does not concern
        source = Path(source).resolve().name
    write_card(trainer, dataset=data_args.name, finetuned_from=source)


if __name__ == "__main__":
    main()
