"""The arguments of a training job for image classification: which model, how DropKey acts, how images vary."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ..images.augmentation import Augmentation
from ..images.mixing import Mixing
from ..images.sources import EVALUATION_SPLITS, data_name, hub_or_data_name
from ..training.arguments import DropKeyArguments
from .families import FAMILIES


DIGITS_AUGMENTATION = {"rotation_degrees": 5.0, "shift_fraction": 0.05}
PHOTO_AUGMENTATION = {"crop_scale": 0.35, "flip_probability": 0.5}
# arguments of a model from scratch that are fields of its configuration
SHAPE_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclass
class ModelArguments:
    """Which model: a pretrained one, or a size of a family from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to start from: any image classifier or vision model of Transformers, a folder or a hub id. "
            "Default: none."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the image processor, if the model has none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Train new class scores if the model does not know the data's classes; with --do_train."},
    )
    model_family: Literal["vit", "t2t_vit", "volo", "ceit"] | None = field(
        default=None, metadata={"help": "Architecture from scratch. Default: vit."}
    )
    model_size: str | None = field(
        default=None,
        metadata={
            "help": "Size from scratch. "
            + " ".join(f"{name}: {', '.join(family.sizes)}." for name, family in FAMILIES.items())
            + " Default: nano for the digits, else "
            + ", ".join(family.usual_size for family in FAMILIES.values())
            + "."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels, a multiple of the patch size; resizes the positions of a pretrained model. "
            "Default: as the pretrained model; 12 for digits (vit) or 64, else 224."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Of vit, in pixels; the others have 16. Default: 2 for digits, else 16."}
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "3 (default), or 1 for grey images, which the hub's pipelines do not feed."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Overrides --model_size, as the next ones."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers; volo has depths."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the MLP of vit; the others have mlp_ratio."}
    )
    hidden_dropout_prob: float | None = field(default=None, metadata={"help": "Dropout after attention and MLP."})
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Largest probability of leaving out a residual branch (stochastic depth), [0, 1): the model's own, or "
            "added to a model that has none."
        },
    )
    patch_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the patches of each image that training leaves out, [0, 1), of models whose tokens are a plain "
            "sequence, such as ViT. Default: what the model remembers, else 0."
        },
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'Other fields of the configuration as JSON, such as {"mix_token": true, "depths": [2, 4]}.'},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend, such as eager or sdpa. Default: the best there is."}
    )

    def __post_init__(self) -> None:
        """Reads --config_overrides.

        Raises:
            ValueError: It is not a JSON object, --patch_dropout is outside its range, or both a pretrained model and one from
                scratch are configured.
        """
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"--patch_dropout {self.patch_dropout} is outside [0, 1); choose for example 0.5")
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"--config_overrides {self.config_overrides} is not JSON ({error}); write for example "
                    """'{"drop_path_rate": 0.1}'"""
                ) from error
        if not isinstance(self.config_overrides, dict | None):
            raise ValueError(
                f"--config_overrides {self.config_overrides!r} is not a JSON object of fields and values; write for example "
                """'{"drop_path_rate": 0.1}'"""
            )
        shape = {name: value for name, value in self.shape().items() if value is not None and name != "image_size"}
        if self.model_name_or_path and shape:
            extra = ", ".join(f"--{name} {value}" for name, value in shape.items())
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out {extra}"
            )

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch."""
        return {name: getattr(self, name) for name in ("model_family", "model_size", *SHAPE_FIELDS)}


@dataclass
class ClassificationDropKeyArguments(DropKeyArguments):
    """DropKey, and the dropout it replaces. Arguments that are left out keep the values of the configuration."""

    attention_probs_dropout_prob: float | None = field(
        default=None,
        metadata={"help": "Plain dropout on attention weights, to compare with; needs --dropkey_ratio 0."},
    )
    dropkey_patch: bool = field(
        default=False,
        metadata={
            "help": "Patch a pretrained ViT with apply_dropkey, as other models, instead of loading a DropKeyViT."
        },
    )


@dataclass
class AugmentationArguments:
    """How training images vary. The digits turn and shift by default; other images are cropped and mirrored."""

    _argument_group_name = "Augmentation"

    crop_scale: float | None = field(
        default=None, metadata={"help": "Smallest fraction of the area that a random crop keeps, (0, 1]; 1: no crops."}
    )
    flip_probability: float | None = field(default=None, metadata={"help": "Probability of a mirror image, [0, 1]."})
    rotation_degrees: float | None = field(default=None, metadata={"help": "Largest rotation to either side."})
    shift_fraction: float | None = field(default=None, metadata={"help": "Largest shift as a fraction of the side."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Largest change of brightness, contrast and saturation, [0, 1]."}
    )

    augment: Literal["randaugment", "trivialaugment"] | None = field(
        default=None, metadata={"help": "Random operations on the images, by one of these recipes. Default: none."}
    )
    random_erasing: float | None = field(
        default=None, metadata={"help": "Probability that a box of the image becomes noise, [0, 1]. Default: 0."}
    )
    mixup: float = field(
        default=0.0,
        metadata={"help": "Alpha of mixup, which blends images and labels, such as 0.2. Default: 0, none."},
    )
    cutmix: float = field(
        default=0.0,
        metadata={"help": "Alpha of CutMix, which pastes boxes, such as 1; with mixup each half of the time."},
    )
    mixing_probability: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed, [0, 1]."})

    def mixing(self) -> Mixing:
        """How batches are mixed; raises ValueError for a value outside its range."""
        return Mixing(self.mixup, self.cutmix, self.mixing_probability)

    def augmentation(self, image_size: tuple[int, int], *, digits: bool) -> Augmentation:
        """The ranges that are configured, and the defaults for the kind of image for the others."""
        known = {entry.name for entry in fields(Augmentation)}
        configured = {name: value for name, value in asdict(self).items() if value is not None and name in known}
        return Augmentation(image_size, **{**(DIGITS_AUGMENTATION if digits else PHOTO_AUGMENTATION), **configured})


DIGITS = "digits"


@dataclass
class DataArguments:
    """Where the images are; without any of these, the built-in digits."""

    _argument_group_name = "Data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"'{DIGITS}' (built in: 1,797 handwritten digits), or a data set of the hub or in a folder."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_file: str | None = field(
        default=None, metadata={"help": "A parquet, csv, json or jsonl file, or a glob pattern for several."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: found by type or usual name."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: found by type or usual name."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": f"Split to evaluate on. Default: the first of {', '.join(EVALUATION_SPLITS)}."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "Fraction of each class kept for evaluation if there is no split for it. Always the same rows."
        },
    )
    hold_out_validation: bool = field(
        default=False,
        metadata={
            "help": "Keep and evaluate on that fraction although there is a split for evaluation, so that settings can "
            "be chosen without its images."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random choice of this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random choice of this many."})
    check_images: bool = field(
        default=True,
        metadata={
            "help": "Read every image once before training; without it, a bad image stops the run when it is read."
        },
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave out images that cannot be read, instead of stopping at the check."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that check the images."})

    def __post_init__(self) -> None:
        """Raises ValueError for two sources at once and for numbers outside their range."""
        sources = {
            "dataset_name": self.dataset_name,
            "train_dir" if self.train_dir else "validation_dir": self.train_dir or self.validation_dir,
            "train_file" if self.train_file else "validation_file": self.train_file or self.validation_file,
        }
        configured = [f"--{name} {value}" for name, value in sources.items() if value]
        if len(configured) > 1:
            raise ValueError(f"{' and '.join(configured)} are several data sources at once; keep one")
        if self.hold_out_validation and self.eval_split_name:
            raise ValueError(
                f"--eval_split_name {self.eval_split_name} and --hold_out_validation name two splits to evaluate on; "
                "keep one"
            )
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split {self.train_val_split} is outside (0, 1); choose for example 0.15")
        for name in ("max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is below 1; leave it out for no limit")

    @property
    def name(self) -> str:
        """The public name of the data: of a local path the last part, so that no local path is published."""
        files = (self.train_dir, self.validation_dir, self.train_file, self.validation_file)
        path = next((file for file in files if file), None)
        return data_name(path) if path else hub_or_data_name(self.dataset_name or DIGITS)

    @property
    def evaluation_name(self) -> str | None:
        """The public name of the data to evaluate on, where it has a file or folder of its own; else None."""
        path = None if self.hold_out_validation else self.validation_dir or self.validation_file
        return data_name(path) if path and (self.train_dir or self.train_file) else None

    @property
    def is_digits(self) -> bool:
        """Whether these are the built-in digits."""
        files = (self.train_dir, self.validation_dir, self.train_file, self.validation_file)
        return self.dataset_name == DIGITS or not (self.dataset_name or any(files))
