"""Model cards of the experiments: the cell and seed of the weights, and the results of all seeds of the cell.

Every number in the results comes from rows of the test images, so that it can be computed again from them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..hub.cards import RunFacts
from ..hub.metric_names import METRICS
from ..intervals import difference, interval
from .evidence import OCCLUDED, REGULARISERS, comparison, images_of, named_ratios, seeds_of
from .grids import Cell, Grid, command_of
from .judgement import judged
from .rows import CELL_COLUMNS, Row, choose, warnings
from .tables import markdown


# the metrics of a card, in this order; the first "occlusion" is that of no patch
MEASURED = ("accuracy", "nll", "ece", *list(OCCLUDED.values())[1:])
BASELINE, DROPKEY_NAME = "none", "DropKey"
# the settings of the run that a card shows
SHOWN = (
    "train_val_split",
    "max_train_samples",
    "per_device_train_batch_size",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class CardEntry:
    """One card of `scripts/checkpoints.json`.

    Attributes:
        name: Of the model, and of the card's file.
        grid: The grid's file, relative to the project's folder.
        cell: Fields of its `Cell` without ratio and seed; the ratio is the one in the rows of the test images.
        seed: Of the weights.
        license: Of the weights, an identifier of the Hub, if there is one.
        limits: Limits of the data.
    """

    name: str
    grid: str
    cell: dict[str, Any]
    seed: int
    license: str | None = None
    limits: tuple[str, ...] = field(default=())

    @classmethod
    def load(cls, file: Path) -> "list[CardEntry]":
        """Reads the list.

        Raises:
            ValueError: An entry has a field too many or too few, or two cards have one name.
        """
        allowed = {entry.name for entry in fields(cls)}
        entries = []
        for found in json.loads(file.read_text(encoding="utf-8")):
            wrong = sorted((set(found) - allowed) | ({"name", "grid", "cell", "seed"} - set(found)))
            if wrong:
                raise ValueError(f"{file} has a card whose fields {', '.join(wrong)} are missing or unknown: {found}")
            entries.append(cls(**{**found, "limits": tuple(found.get("limits", ()))}))
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"{file} lists a card twice: {names}; choose another name for one of them")
        return entries

    def chosen(self, grid: Grid, rows: Sequence[Row]) -> Cell:
        """The cell, with the ratio that the rows of the test images have.

        Raises:
            ValueError: The cell has no test row, or test rows of several ratios.
        """
        ratios = {row["ratio"] for row in choose(tested(grid, rows), **self._columns(grid))}
        if len(ratios) != 1:
            raise ValueError(
                f"the card {self.name} needs test rows of one ratio, found {sorted(ratios) or 'none'}; run "
                f"scripts/run_experiments.py {self.grid}, then the same with --test"
            )
        return Cell(**self.cell, ratio=float(ratios.pop()), seed=self.seed)

    def _columns(self, grid: Grid) -> dict[str, str]:
        # any ratio that the regulariser allows, because a cell needs one
        known = Cell(**self.cell, ratio=0.5, seed=self.seed).columns(grid)
        return {name: known[name] for name in CELL_COLUMNS if name != "ratio"}


def tested(grid: Grid, rows: Sequence[Row]) -> list[Row]:
    """The grid's rows of the test images."""
    return choose(rows, experiment=grid.name, split="test")


def values_of(grid: Grid, rows: Sequence[Row], cell: Cell) -> dict[str, float]:
    """The measured values of the weights of one cell and seed, by metric.

    Raises:
        ValueError: A metric has no row.
    """
    wanted = cell.columns(grid)
    found = {row["metric"]: float(row["value"]) for row in choose(tested(grid, rows), **wanted)}
    missing = [metric for metric in MEASURED if metric not in found]
    if missing:
        raise ValueError(f"{cell.name} has no test row of {', '.join(missing)}; run its grid with --test first")
    return {metric: found[metric] for metric in MEASURED}


def compared(grid: Grid, rows: Sequence[Row], cell: Cell) -> dict[str, dict[str, str]]:
    """By name, the columns of the cells that a card compares: the other regularisers, then the card's own cell."""
    whole = cell.columns(grid)
    shared = {name: whole[name] for name in ("experiment", "model", "train_images")}
    cells = {name: {**wanted, **shared} for name, wanted in REGULARISERS.items()}
    cells[DROPKEY_NAME] = {name: whole[name] for name in CELL_COLUMNS}
    return named_ratios(tested(grid, rows), cells)


def results_text(grid: Grid, rows: Sequence[Row], cell: Cell) -> str:
    """The results of a card: this seed, all seeds, the comparison in a table and in words, the origin of the rows."""
    own = tested(grid, rows)
    values = values_of(grid, rows, cell)
    cells = compared(grid, rows, cell)
    ours = list(cells.values())[-1]
    # rows of other metrics, such as of corrupted images, may be of later commits
    used = [row for wanted in cells.values() for row in choose(own, metric=MEASURED, **wanted)]
    seeds = {metric: seeds_of(own, metric, **ours) for metric in MEASURED}
    number = len(seeds["accuracy"])
    lines = [
        [METRICS[metric].full, f"{values[metric]:.3f}", str(interval(list(seeds[metric].values())))]
        for metric in MEASURED
    ]
    commits = ", ".join(f"`{commit}`" for commit in sorted({row["git_sha"] for row in used}))
    notes = warnings(used) or ["one commit, one device, one version of each package"]
    parts = [
        f"{images_of(own, grid.task)} of {grid.task}, which neither training nor the choice of the ratio saw. These "
        f"weights are of seed {cell.seed}, which nobody chose by its results; {number} seeds were trained.",
        markdown(["metric", f"these weights, seed {cell.seed}", f"mean and 95 % interval, {number} seeds"], lines),
        "Other regularisers at the ratio that was chosen for each on held-out training images by "
        f"`{grid.select_by}`; differences are taken seed by seed:",
        comparison(own, cells, BASELINE, ("accuracy", "nll", "ece")),
        verdict(own, cells),
        f"Rows of commit {commits}, in `model_cards/results.csv`. Notes on them: {'; '.join(notes)}.",
    ]
    return "\n\n".join(parts)


def verdict(rows: Sequence[Row], cells: Mapping[str, Mapping[str, str]]) -> str:
    """In words: DropKey, the last cell, against each of the others, and whether it is nowhere better."""
    *others, (name, ours) = cells.items()
    parts, pairs, is_better = [], set(), False
    for other, base in others:
        said = []
        for metric in ("accuracy", "nll"):
            found = judged(difference(seeds_of(rows, metric, **ours), seeds_of(rows, metric, **base)), metric)
            pairs.add(found.n)
            is_better |= found.word == "better"
            if found.n > 1:
                judgement = f"{found.word} than" if found.word else "not distinguishable from"
            else:
                judgement = "measured once, so not distinguishable from"
            said.append(f"{judgement} {other} in {METRICS[metric].word} ({found.numbers})")
        parts.append(", and ".join(said))
    number = " or ".join(map(str, sorted(pairs)))
    plainly = "" if is_better else f" No advantage of {name} is shown."
    return (
        f"**{name} is {'; it is '.join(parts)}** on these images: mean differences of {number} pairs of runs with the "
        f"same seed, with their 95 % intervals.{plainly}"
    )


def facts_of_card(
    entry: CardEntry, grid: Grid, rows: Sequence[Row], *, configured: Mapping[str, Any], weights: Path
) -> RunFacts:
    """The facts of a card that the files of the trained folder do not hold.

    Args:
        entry: The card.
        grid: Its grid.
        rows: Of the results file.
        configured: The settings of the run, by name.
        weights: The file of the weights.
    """
    cell = entry.chosen(grid, rows)
    (origin,) = {
        (row["device"], row["threads"], row["torch"], row["transformers"])
        for row in choose(tested(grid, rows), **cell.columns(grid), metric="accuracy")
    }
    device, threads, torch_version, transformers_version = origin
    settings = {name: configured[name] for name in SHOWN if configured[name] != "None"}
    settings |= {
        "sha256 of `model.safetensors`": f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`",
        "which the command gives with": f"device {device}, threads {threads}, torch {torch_version}; elsewhere the last "
        "bits differ, and with them the hash",
    }
    return RunFacts(
        dataset=grid.task,
        dataset_split="test",
        from_scratch=True,
        license=entry.license,
        command=f"OMP_NUM_THREADS={threads} {command_of(grid, cell, Path('runs') / entry.name)}",
        hyperparameters=settings,
        versions={"torch": torch_version, "transformers": transformers_version},
        results=results_text(grid, rows, cell),
        limits=[
            f"No weights are published: the command above makes them, in `runs/{entry.name}`, so run the usage in `runs`.",
            *entry.limits,
        ],
    )
