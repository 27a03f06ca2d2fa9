"""Arguments that every training job has, and the reader of recipes and command lines."""

import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, PreTrainedModel, TrainerCallback

from ..patching import DropKeyReport, apply_dropkey
from .callbacks import DropKeyScheduleCallback


logger = logging.getLogger(__name__)

# of a model that remembers none
DEFAULT_RATIO = 0.1


@dataclass
class DropKeyArguments:
    """DropKey. What is not given is as the model's configuration remembers it, else as `apply_dropkey` has it."""

    _argument_group_name = "DropKey"

    dropkey_ratio: float | None = field(
        default=None,
        metadata={
            "help": f"Largest drop ratio of a layer, in [0, 1); 0 trains without. Default: {DEFAULT_RATIO} for a model "
            "whose configuration has none."
        },
    )
    dropkey_final_ratio: float | None = field(
        default=None, metadata={"help": "The other end of the schedule, from 0 to the ratio. Default: 0."}
    )
    dropkey_schedule: str | None = field(
        default=None,
        metadata={"help": "Over the depth of each stack of layers: decreasing (default), constant or increasing."},
    )
    dropkey_pattern: str | None = field(
        default=None, metadata={"help": "Dropped together: score (default, the paper's), key, token, block or cross."}
    )
    dropkey_window: int | None = field(default=None, metadata={"help": "Patches of a block's side or a cross's arm."})
    dropkey_with_attention_dropout: bool | None = field(
        default=None, metadata={"help": "Allows plain dropout on attention weights beside DropKey."}
    )

    dropkey_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell patterns of the attentions that drop keys, of models that are patched. Default: all."
        },
    )
    dropkey_exclude: list[str] | None = field(
        default=None, metadata={"help": "Shell patterns of attentions to leave out. Default: none."}
    )

    def given(self) -> dict[str, Any]:
        """The arguments that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def apply(self, model: PreTrainedModel) -> DropKeyReport:
        """Patches a model of Transformers, as `apply_dropkey`, and logs the report.

        Raises:
            ValueError: A setting is not allowed, or reaches nothing.
        """
        known = inspect.signature(apply_dropkey).parameters
        given = {name.removeprefix("dropkey_"): value for name, value in self.given().items()}
        if "ratio" not in given and getattr(model.config, "dropkey_ratio", None) is None:
            given["ratio"] = DEFAULT_RATIO
        report = apply_dropkey(model, **{name: value for name, value in given.items() if name in known})
        logger.info("%s", report)
        return report


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
