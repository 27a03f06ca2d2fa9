"""Draws a logged metric over the steps of training, for several runs of each kind: mean and 95 % band over the runs.

    python scripts/draw_training_curves.py curves.png --runs DropKey=runs/a DropKey=runs/b none=runs/c

A run is the folder that a training script wrote, with its trainer_state.json.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_dropkey.lab.figures import training_curves
from hf_dropkey.training.record import STATE


@dataclass
class CurveArguments:
    """The runs, the metric, the output."""

    figure: Path = field(metadata={"help": "Image file to write; the first argument."})
    runs: list[str] = field(metadata={"help": "Runs as KIND=FOLDER; runs of one kind become one curve."})
    metric: str = field(default="loss", metadata={"help": "A logged metric: loss, eval_accuracy, learning_rate, ..."})


def histories(runs: list[str]) -> dict[str, list[list[dict[str, float]]]]:
    """The logs of the runs of each kind.

    Raises:
        FileNotFoundError: A folder does not hold a run.
        ValueError: A run is not written as KIND=FOLDER.
    """
    found: dict[str, list[list[dict[str, float]]]] = {}
    for run in runs:
        kind, equals, folder = run.partition("=")
        if not (kind and equals and folder):
            raise ValueError(f"--runs {run!r} is not of the form KIND=FOLDER; write for example DropKey=runs/digits")
        file = Path(folder) / STATE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {STATE}; pass the folder of a finished run")
        found.setdefault(kind, []).append(json.loads(file.read_text(encoding="utf-8"))["log_history"])
    return found


def main() -> None:
    """Runs the job."""
    group: Any = CurveArguments
    command = sys.argv[1:]
    if command and not command[0].startswith("--"):
        command.insert(0, "--figure")
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(command, look_for_args_file=False)
    title = f"{arguments.metric} in training; bands: 95 % intervals over runs"
    figure = training_curves(histories(arguments.runs), metric=arguments.metric, title=title)
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.figure, dpi=130)
    print(f"written: {arguments.figure}")


if __name__ == "__main__":
    main()
