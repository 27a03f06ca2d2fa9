"""Grids of the paper's other tasks: cells that differ in the regulariser, trained by a task's own script.

Unlike in `grids`, nothing is chosen: the ratio of each regulariser is fixed beforehand in the grid's file, and the held-out
data is scored once for each cell. A cell is a whole run of the script's job, so that readers repeat it by one command.
"""

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..hub.cards import shown_command
from ..hub.metric_names import METRICS
from .grids import ALL_IMAGES, NONE, Cell, Grid
from .rows import CELL_COLUMNS, Row, choose


HELD_OUT = "held-out"
# the argument of each script that sets dropout on attention weights
ATTENTION_DROPOUT = {"train_hoi": "attention_dropout", "train_body_mesh": "attention_probs_dropout_prob"}
JOBS = {"train_hoi": "hf_dropkey.hoi.job:HoiJob", "train_body_mesh": "hf_dropkey.mesh.job:MeshJob"}
RESULTS = "all_results.json"
# of a cell, beside what its script measures
COSTS = {"cpu_seconds": "s", "parameters": "count"}


@dataclass(frozen=True)
class TaskGrid:
    """Cells of one task and their script.

    Attributes:
        name: The experiment's name in the rows: that of the grid's file.
        task: What the tables call the data.
        script: Name of the training script, one of `ATTENTION_DROPOUT`.
        recipe: The recipe of all cells, relative to the project's folder.
        models: For each model, the arguments that make it.
        cells: The cells, each once; each regulariser has one ratio.
        metrics: Which measured numbers become rows, with their units.
        published: What the paper reports for the task, for readers.
        about: Command, machine, time.
    """

    name: str
    task: str
    script: str
    recipe: str
    models: dict[str, dict[str, Any]]
    cells: tuple[Cell, ...]
    metrics: dict[str, str]
    published: str
    about: str = field(default="", compare=False)

    @classmethod
    def load(cls, file: Path) -> "TaskGrid":
        """Reads a grid: a JSON object with the attributes' names and `seeds`; `cells` as in `Grid.load`.

        Raises:
            ValueError: A field is missing or unknown, or a value is not allowed.
        """
        found = json.loads(file.read_text(encoding="utf-8"))
        wrong = sorted(({entry.name for entry in fields(cls)} - {"name"} | {"seeds"}) ^ set(found))
        if wrong:
            raise ValueError(f"the grid {file} lacks or does not know the fields {', '.join(wrong)}")
        if found["script"] not in ATTENTION_DROPOUT:
            raise ValueError(
                f"the grid {file} has the script {found['script']!r}; allowed are {', '.join(ATTENTION_DROPOUT)}"
            )
        strange = sorted(set(found["metrics"]) - set(METRICS))
        if strange:
            raise ValueError(f"the grid {file} has the metrics {strange}, which hub/metric_names.py does not name")
        cells = tuple(dict.fromkeys(Grid.cells_of(found)))
        for cell in cells:
            if cell.alignment != NONE:
                raise ValueError(
                    f"the grid {file} has the alignment {cell.alignment!r}; only classification has those"
                )
        ratios: dict[tuple[str, ...], set[float]] = {}
        for cell in cells:
            ratios.setdefault(cell.kind(), set()).add(cell.ratio)
        several = [kind for kind, found_ratios in ratios.items() if len(found_ratios) > 1]
        if several:
            raise ValueError(
                f"the grid {file} has several ratios for {several[0]}; nothing is chosen here, so give each regulariser one"
            )
        del found["seeds"]
        return cls(name=file.stem, **{**found, "cells": cells})

    def columns(self, cell: Cell) -> dict[str, str]:
        """The columns of a cell in the rows."""
        # any grid will do: its name and task are all that is read of it
        this: Any = self
        return cell.columns(this)

    def words(self, cell: Cell, folder: Path) -> list[str]:
        """The arguments of the script after the recipe."""
        given: dict[str, Any] = {**self.models[cell.model], "seed": cell.seed, "dropkey_ratio": 0.0}
        if cell.regulariser == "dropkey":
            given |= {"dropkey_ratio": cell.ratio, "dropkey_schedule": cell.schedule, "dropkey_pattern": cell.pattern}
        elif cell.regulariser == "attention dropout":
            given[ATTENTION_DROPOUT[self.script]] = cell.ratio
        if cell.train_images != ALL_IMAGES:
            given["max_train_samples"] = cell.train_images
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*words, "--output_dir", str(folder)]

    def command(self, cell: Cell, folder: Path) -> str:
        """The command line, from the project's folder, that trains and scores a cell."""
        script = f"scripts/{self.script}.py"
        return f"OMP_NUM_THREADS=1 {shown_command(['python', script, self.recipe, *self.words(cell, folder)])}"


def missing_cells(grid: TaskGrid, rows: Sequence[Row]) -> list[Cell]:
    """The cells without rows, in the order of seeds, so that an interrupted grid has whole comparisons."""
    names = (*CELL_COLUMNS, "seed")
    done = {tuple(row[name] for name in names) for row in choose(rows, experiment=grid.name)}
    missing = [cell for cell in grid.cells if tuple(grid.columns(cell)[name] for name in names) not in done]
    return sorted(missing, key=lambda cell: cell.seed)


def run_cell(grid: TaskGrid, cell: Cell, folder: Path, *, root: Path) -> list[dict[str, str]]:
    """Trains and scores a cell in this process, as the command of its rows would; its folder is made anew.

    Returns:
        Its rows without their origin.
    """
    words = [str(root / grid.recipe), *grid.words(cell, folder), "--overwrite_output_dir", "--disable_tqdm", "true"]
    before = time.process_time()
    job_class(grid.script).parse(words).execute([*grid.command(cell, folder).split()])
    seconds = time.process_time() - before
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return rows_of(grid, cell, results, cpu_seconds=seconds)


def job_class(script: str) -> Any:
    """The job of a training script."""
    module, _, name = JOBS[script].partition(":")
    return getattr(importlib.import_module(module), name)


def rows_of(grid: TaskGrid, cell: Cell, results: Mapping[str, Any], *, cpu_seconds: float) -> list[dict[str, str]]:
    """The rows of a cell from what its run measured.

    Raises:
        KeyError: The run did not measure a metric of the grid.
    """
    values = {name: (float(results[f"eval_{name}"]), unit) for name, unit in grid.metrics.items()}
    known = {"cpu_seconds": cpu_seconds, "parameters": float(results["parameters"])}
    values |= {name: (known[name], unit) for name, unit in COSTS.items()}
    shared = {
        **grid.columns(cell),
        "epochs": f"{float(results['epoch']):.3g}",
        "split": HELD_OUT,
        "images": str(images_of(results)),
    }
    return [
        {**shared, "metric": name, "value": f"{value:.6g}", "unit": unit} for name, (value, unit) in values.items()
    ]


def images_of(results: Mapping[str, Any]) -> int:
    """The number of images that a run was scored on: seconds times images a second, which both are rounded."""
    return round(float(results["eval_runtime"]) * float(results["eval_samples_per_second"]))
