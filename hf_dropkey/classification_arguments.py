"""What a training job for image classification can be told: which model, how DropKey acts, how images vary.

May import Transformers and this package.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, TrainerCallback

from .callbacks import DropKeyScheduleCallback
from .families import FAMILIES
from .image_transform import Augmentation


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
        metadata={"help": "Model to start from, of any family or a plain ViT: a folder or a hub id. Default: none."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the image processor, if the model has none."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new head if the model was made for another number of classes."}
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
            "help": "Side in pixels, but for vit a multiple of 16. Default: 12 for digits (vit) or 64, else 224."
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
            ValueError: It is no JSON object, or a pretrained model and one from scratch are both asked for.
        """
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"--config_overrides {self.config_overrides} is no JSON ({error}); write for example "
                    """'{"drop_path_rate": 0.1}'"""
                ) from error
        if not isinstance(self.config_overrides, dict | None):
            raise ValueError(f"--config_overrides {self.config_overrides!r} is no JSON object of fields and values")
        shape = {name: value for name, value in self.shape().items() if value is not None}
        if self.model_name_or_path and shape:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out {shape}"
            )

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch."""
        return {name: getattr(self, name) for name in ("model_family", "model_size", *SHAPE_FIELDS)}


@dataclass
class DropKeyArguments:
    """DropKey, and the dropout it replaces. What is not given is as the model has it, or as its configuration has it."""

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
class RampArguments:
    """How DropKey changes over the steps of a training."""

    _argument_group_name = "DropKey over time"

    dropkey_warmup: float = field(
        default=0.0,
        metadata={"help": "Share of the steps, the first ones, over which the ratios grow from 0, [0, 1)."},
    )
    dropkey_alignment: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps, the last ones, without DropKey: the paper's alignment fine-tune, [0, 1)."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """What a `Trainer` needs for it: nothing if the ratios stay as they are.

        Raises:
            ValueError: A share is outside [0, 1), or both leave no step in between.
        """
        if not (self.dropkey_warmup or self.dropkey_alignment):
            return []
        return [DropKeyScheduleCallback(warmup=self.dropkey_warmup, alignment=self.dropkey_alignment)]


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
    """What happens to an output folder that is not empty, and when training goes wrong."""

    _argument_group_name = "Run"

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run in --output_dir: its checkpoints are deleted."}
    )
    on_nonfinite_loss: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "When the loss is NaN or infinite: stop, or skip that step; ten in a row stop the run."},
    )


def parse_arguments(groups: Any, command: Sequence[str]) -> tuple[Any, ...]:
    """One object for each argument group, from a JSON recipe in the first place, if any, and the rest of the command.

    A recipe's field `about` is for its readers: the command, the machine, the time it took and what came out.

    Raises:
        ValueError: The recipe has a field that is no argument.
    """
    parser = HfArgumentParser(groups)
    rest = list(command)
    if rest and rest[0].endswith(".json"):
        recipe = json.loads(Path(rest.pop(0)).read_text(encoding="utf-8"))
        recipe.pop("about", None)
        unknown = sorted(set(recipe) - set(vars(parser.parse_args([]))))
        if unknown:
            raise ValueError(f"the recipe {command[0]} has fields that are no arguments: {unknown}; see --help")
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
