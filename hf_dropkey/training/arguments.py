"""Arguments that every training job has, and the reader of recipes and command lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, TrainerCallback

from .callbacks import DropKeyScheduleCallback


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
