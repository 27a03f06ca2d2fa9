"""Runs a grid of one of the paper's other tasks: every cell that has no rows yet, one after another.

    python scripts/run_task_grid.py scripts/task_grids/hoi_scenes.json
    python scripts/run_task_grid.py scripts/task_grids/hoi_scenes.json --card dropkey-hoi-scenes

Each cell is a run of the task's own training job on one thread, whose metrics become rows of --results. After an
interruption the same command continues. --card writes the card of the DropKey cell of the grid's first seed, from its
folder and the rows.
"""

import contextlib
import io
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import HfArgumentParser

from hf_dropkey.hub.cards import model_card, shown_command
from hf_dropkey.lab.grids import Cell
from hf_dropkey.lab.rows import COLUMNS, Row, read_rows
from hf_dropkey.lab.task_evidence import card_facts, values_of
from hf_dropkey.lab.task_grids import TaskGrid, missing_cells, run_cell
from hf_dropkey.lab.timing import append_rows, check_columns, commit, origin


ROOT = Path(__file__).resolve().parents[1]
# the settings of the run that a card shows
SHOWN = (
    *(
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "warmup_steps",
        "lr_scheduler_type",
        "max_grad_norm",
    ),
    "seed",
)


@dataclass
class TaskGridArguments:
    """The grid and the output."""

    grid: Path = field(metadata={"help": "JSON file with the grid; the first argument."})
    results: Path = field(
        default=ROOT / "model_cards" / "results.csv", metadata={"help": "CSV file that rows are appended to."}
    )
    output_dir: Path = field(default=Path("runs/experiments"), metadata={"help": "Folder for the weights."})
    seeds: int | None = field(default=None, metadata={"help": "Number of seeds, the first of the grid. Default: all."})
    card: str | None = field(default=None, metadata={"help": "Train nothing; write the card of this name instead."})
    limits: list[str] = field(
        default_factory=list, metadata={"help": "With --card: limits of the data, a sentence each."}
    )
    cards_dir: Path = field(default=ROOT / "model_cards", metadata={"help": "Folder for the card."})


def run(grid: TaskGrid, arguments: TaskGridArguments) -> int:
    """Runs the missing cells."""
    rows: list[Row] = list(read_rows(arguments.results)) if arguments.results.exists() else []
    if rows:
        check_columns(arguments.results, COLUMNS)
    kept = sorted({cell.seed for cell in grid.cells})[: arguments.seeds]
    cells = [cell for cell in missing_cells(grid, rows) if cell.seed in kept]
    # remembers the commit of the code that is loaded here
    commit()
    print(f"{grid.name}: {len(grid.cells)} cells, {len(cells)} of them to run", flush=True)
    failed = 0
    for number, cell in enumerate(cells, start=1):
        folder = arguments.output_dir / grid.name / cell.name
        try:
            # what the job prints would hide the progress
            with contextlib.redirect_stdout(io.StringIO()):
                found = run_cell(grid, cell, folder, root=ROOT)
        except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
            failed += 1
            print(f"FAILED {cell.name}: {type(error).__name__}: {error}", flush=True)
            continue
        source = origin(torch.device("cpu"), shown_command(["python", "scripts/run_task_grid.py", *sys.argv[1:]]))
        append_rows(arguments.results, [{name: str({**row, **source}[name]) for name in COLUMNS} for row in found])
        shown = {row["metric"]: row["value"] for row in found}
        first = next(iter(grid.metrics))
        print(f"[{number}/{len(cells)}] {cell.name}: {first} {shown[first]}, {shown['cpu_seconds']} s", flush=True)
    return min(failed, 1)


def card_cell(grid: TaskGrid) -> Cell:
    """The cell whose weights a card describes: DropKey, the first seed."""
    return next(cell for cell in grid.cells if cell.regulariser == "dropkey")


def write_card(grid: TaskGrid, arguments: TaskGridArguments, name: str) -> Path:
    """Writes a card from a cell's folder and the rows."""
    cell, rows = card_cell(grid), list(read_rows(arguments.results))
    weights = arguments.output_dir / grid.name / cell.name
    recipe = json.loads((ROOT / grid.recipe).read_text(encoding="utf-8"))
    settings = {key: str(recipe[key]) for key in SHOWN if key in recipe} | {"seed": str(cell.seed)}
    settings |= {key: str(value) for key, value in grid.models[cell.model].items()}
    card = arguments.cards_dir / f"{name}.md"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        shutil.copytree(weights, folder)
        card_facts(grid, rows, cell, name=name, settings=settings, limits=arguments.limits).save(folder)
        measured = {f"eval_{metric}": value for metric, value in values_of(grid, rows, cell).items()}
        (folder / "eval_results.json").write_text(json.dumps(measured), encoding="utf-8")
        model_card(folder, existing=card.read_text(encoding="utf-8") if card.is_file() else "").save(card)
    return card


def main() -> int:
    """Runs the job; returns 1 if a cell failed."""
    group: Any = TaskGridArguments
    command = sys.argv[1:]
    if command and not command[0].startswith("--"):
        command.insert(0, "--grid")
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(command, look_for_args_file=False)
    grid = TaskGrid.load(arguments.grid)
    if arguments.card is not None:
        print(write_card(grid, arguments, arguments.card))
        return 0
    # models so small only lose by threads
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        # another run would repeat the unfinished cells
        with FileLock(arguments.output_dir / f".{grid.name}.lock", timeout=0):
            return run(grid, arguments)
    except Timeout:
        raise SystemExit(f"another run of {grid.name} writes into {arguments.output_dir}; wait for it") from None


if __name__ == "__main__":
    sys.exit(main())
