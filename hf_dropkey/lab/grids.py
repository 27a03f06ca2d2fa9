"""Experiments as data: a grid of cells, each the training of one model, and the metrics of its weights.

A grid names a recipe of `scripts/train_image_classification.py` and lists cells (model x regulariser x ratio x
schedule x pattern x alignment x number of images x seed). Each is trained by the code of that script, on the training
rows without a held-out part, and measured on that part. The ratio of each kind of cell is chosen there; the test
images are used once, after that.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ..classification.adapters import load_classifier
from ..classification.arguments import DataArguments
from ..classification.data import ImageData, load_image_data
from ..classification.job import ClassificationJob
from ..classification.model import fit_classes, image_size
from ..classification.transform import CorruptedTransform, ImageTransform, collate_images
from ..extras import needed
from ..hub.cards import shown_command
from ..hub.metric_names import METRICS
from ..inference import monte_carlo_predict
from ..models.dropkey import PATTERNS, SCHEDULES
from ..training.checkpoints import last_whole, prepare_output_folder
from .robustness import UNDER, corruption_accuracy, metrics_of, occlusion_accuracy, predict_logits
from .rows import CELL_COLUMNS, Row, by_cell, choose
from .timing import commit


with needed("train"):
    from datasets import Dataset


NONE = "none"
REGULARISERS = (NONE, "attention dropout", "dropkey")
MONTE_CARLO, FINE_TUNE = "monte-carlo", "fine-tune"
ALIGNMENTS = (NONE, MONTE_CARLO, FINE_TUNE)
ALL_IMAGES = "all"
# fraction of the steps, the last ones, that the fine-tune trains without DropKey
FINE_TUNE_FRACTION = 0.1
MASKS = 20
# in a cell's folder: its settings at the start, and beside them its facts at the end
BEGUN, DONE = "begun.json", "experiment.json"
# metrics of every cell
SELECTABLE = ("accuracy", "nll", "ece")
UNITS = {"nll": "nats", "train_nll": "nats", "train_seconds": "s", "parameters": "count"}
# fields that a grid may lack
OPTIONAL = {"corruptions", "held_out_images"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run, or another evaluation of its weights (Monte-Carlo inference).

    Attributes:
        model: Name of a model of the grid.
        regulariser: One of `REGULARISERS`.
        ratio: Ratio of the regulariser, (0, 1); 0 for "none".
        schedule: Of DropKey over depth; "none" for the others.
        pattern: Of DropKey; "none" for the others.
        alignment: One of `ALIGNMENTS`.
        train_images: Number of training images, or "all".
        seed: Of the weights, the order of images, and the masks.
    """

    model: str
    regulariser: str
    ratio: float = 0.0
    schedule: str = NONE
    pattern: str = NONE
    alignment: str = NONE
    train_images: int | str = ALL_IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        for name, kinds in (("ratio", (int, float)), ("seed", int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < 0:
                raise ValueError(f"unknown cell: {name} {value!r}; pass a number from 0 on, without quotes")
        # 0 and 0.0 are one cell
        object.__setattr__(self, "ratio", float(self.ratio))
        if float(f"{self.ratio:g}") != self.ratio:
            raise ValueError(f"unknown cell: ratio {self.ratio!r}; rows hold six digits, so pass at most six")
        dropkey = self.regulariser == "dropkey"
        allowed: dict[str, Sequence[Any]] = {
            "regulariser": REGULARISERS,
            "schedule": SCHEDULES if dropkey else (NONE,),
            "pattern": PATTERNS if dropkey else (NONE,),
            "alignment": ALIGNMENTS if dropkey else (NONE,),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"unknown cell: {name} {getattr(self, name)!r} with regulariser {self.regulariser!r}; allowed are "
                    f"{', '.join(map(repr, values))}"
                )
        if not (self.ratio == 0 if self.regulariser == NONE else 0 < self.ratio < 1):
            raise ValueError(
                f"unknown cell: ratio {self.ratio} with regulariser {self.regulariser!r}; it is 0 for 'none' and in "
                "(0, 1) for the others"
            )
        images = self.train_images
        if images != ALL_IMAGES and not (isinstance(images, int) and not isinstance(images, bool) and images > 0):
            raise ValueError(f"unknown cell: train_images {images!r}; pass a number from 1 on, or {ALL_IMAGES!r}")

    @property
    def trained(self) -> "Cell":
        """The cell whose weights this one uses."""
        return replace(self, alignment=NONE) if self.alignment == MONTE_CARLO else self

    @property
    def is_usual(self) -> bool:
        """Whether it is of all images and, where it has DropKey, of the usual kind: one of those that are compared first."""
        usual = {"schedule": SCHEDULES[0], "pattern": PATTERNS[0]}
        plain = all(getattr(self, name) in (NONE, value) for name, value in usual.items())
        return plain and self.alignment == NONE and self.train_images == ALL_IMAGES

    @property
    def name(self) -> str:
        """The name of the folder, one for all cells that share weights."""
        words = [str(value) for name, value in asdict(self.trained).items() if name != "seed" and value != NONE]
        return "_".join([*words, f"seed{self.seed}"]).replace(" ", "-")

    def kind(self) -> tuple[str, ...]:
        """The cell without ratio and seed: a ratio is chosen for each kind."""
        return tuple(str(value) for name, value in asdict(self).items() if name not in ("ratio", "seed"))

    def arguments(self) -> list[str]:
        """The arguments of `scripts/train_image_classification.py` beside those of recipe, model and folder."""
        given: dict[str, Any] = {"seed": self.seed, "dropkey_ratio": 0.0}
        if self.regulariser == "dropkey":
            given |= {"dropkey_ratio": self.ratio, "dropkey_schedule": self.schedule, "dropkey_pattern": self.pattern}
        elif self.regulariser == "attention dropout":
            given["attention_probs_dropout_prob"] = self.ratio
        if self.alignment == FINE_TUNE:
            given["dropkey_alignment"] = FINE_TUNE_FRACTION
        if self.train_images != ALL_IMAGES:
            given["max_train_samples"] = self.train_images
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    def columns(self, grid: "Grid") -> dict[str, str]:
        """The columns that identify the cell in a results file."""
        values = {**asdict(self), "ratio": f"{self.ratio:g}", "experiment": grid.name, "task": grid.task}
        return {name: str(values[name]) for name in (*CELL_COLUMNS, "seed")}


@dataclass(frozen=True)
class Grid:
    """Cells of one task.

    Attributes:
        name: The experiment's name in the results: that of the grid's file.
        task: Name of the data.
        recipe: The recipe that all cells start from, a path relative to the project's folder.
        models: For each model, the arguments that make it.
        cells: The cells, each once.
        select_by: The metric of the held-out images by which ratios are chosen.
        occlusion_patch: Side in pixels of the patches that occlusion hides.
        held_out_images: At most so many held-out images are measured; the test takes all. None: as the recipe says.
        corruptions: Whether the usual cells are also measured on test images that are made worse.
        about: For readers: command, machine, time and expected result.
    """

    name: str
    task: str
    recipe: str
    models: dict[str, dict[str, Any]]
    cells: tuple[Cell, ...]
    select_by: str
    occlusion_patch: int
    held_out_images: int | None = None
    corruptions: bool = False
    about: str = field(default="", compare=False)

    @classmethod
    def load(cls, file: Path) -> "Grid":
        """Reads a grid: a JSON object with the attributes' names.

        `cells` is a list of objects, each a product: every field has a list of values, or one. Defaults of DropKey
        cells are `schedule` "decreasing" and `pattern` "score"; without `model` it is all models. `seeds` holds for
        all cells. `corruptions` and `held_out_images` may be left out.

        Raises:
            ValueError: A field is missing or unknown, a cell is unknown, or there are no cells.
        """
        found = json.loads(file.read_text(encoding="utf-8"))
        wanted = {entry.name for entry in fields(cls)} - {"name"} | {"seeds"}
        wrong = sorted((wanted ^ set(found)) - (OPTIONAL - set(found)))
        if wrong:
            missing = [name for name in wrong if name in wanted]
            raise ValueError(
                f"the grid {file} {'lacks' if missing else 'has unknown fields'} {', '.join(missing or wrong)}; a grid "
                f"has {', '.join(sorted(wanted))}"
            )
        if not isinstance(found["seeds"], list):
            raise ValueError(f"the grid {file} has the seeds {found['seeds']!r}; pass a list, such as [0, 1, 2]")
        held_out = found.get("held_out_images")
        if held_out is not None and (not isinstance(held_out, int) or held_out < 1):
            raise ValueError(
                f"the grid {file} has held_out_images {held_out!r}; pass a whole number from 1 on, or none"
            )
        if not isinstance(found.get("corruptions", False), bool):
            raise ValueError(f"the grid {file} has the corruptions {found['corruptions']!r}; pass true or false")
        if found["select_by"] not in SELECTABLE:
            raise ValueError(
                f"the grid {file} selects by {found['select_by']!r}; every cell has {', '.join(SELECTABLE)}"
            )
        cells = list(cls.cells_of(found))
        if not cells:
            raise ValueError(f"the grid {file} lists no cell")
        del found["seeds"]
        return cls(name=file.stem, **{**found, "cells": tuple(dict.fromkeys(cells))})

    @staticmethod
    def cells_of(found: Mapping[str, Any]) -> Iterator[Cell]:
        """The cells that a grid's `cells`, `models` and `seeds` say.

        Raises:
            ValueError: A field is unknown, a model too, or there is no regulariser.
        """
        known = {entry.name for entry in fields(Cell)} - {"seed"}
        for product in found["cells"]:
            unknown = sorted(set(product) - known)
            if unknown:
                raise ValueError(
                    f"unknown cell: fields {unknown} in {product}; allowed are {', '.join(sorted(known))}"
                )
            if "regulariser" not in product:
                raise ValueError(
                    f"unknown cell: {product} names no regulariser; allowed are {', '.join(REGULARISERS)}"
                )
            listed = {
                name: value if isinstance(value, list) else [value]
                for name, value in {"model": list(found["models"]), **product}.items()
            }
            empty = sorted(name for name, values in listed.items() if not values)
            if empty:
                raise ValueError(f"unknown cell: no value of {', '.join(empty)} in {product}")
            strange = sorted(set(listed["model"]) - set(found["models"]))
            if strange:
                raise ValueError(f"unknown cell: models {strange}; the grid has {', '.join(found['models'])}")
            for values in itertools.product(*listed.values()):
                given = dict(zip(listed, values, strict=True))
                if given["regulariser"] == "dropkey":
                    given = {"schedule": SCHEDULES[0], "pattern": PATTERNS[0], **given}
                for seed in found["seeds"]:
                    yield Cell(**given, seed=seed)

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells grouped by weights, in the order of seeds, so that an interrupted grid has whole comparisons."""
        found: dict[Cell, list[Cell]] = {}
        for cell in sorted(cells, key=lambda cell: cell.seed):
            found.setdefault(cell.trained, []).append(cell)
        return list(found.values())


def missing_cells(grid: Grid, rows: Sequence[Row], split: str) -> list[Cell]:
    """The cells of a grid without rows of a split, or without those of the corruptions that it requests."""
    names = (*CELL_COLUMNS, "seed")
    found = choose(rows, experiment=grid.name, split=split)
    done = {tuple(row[name] for name in names) for row in found}
    corrupted = {tuple(row[name] for name in names) for row in found if row["metric"] in UNDER.values()}
    return [
        cell
        for cell in grid.cells
        if tuple(cell.columns(grid)[name] for name in names)
        not in (corrupted if measures_corruptions(grid, cell, split) else done)
    ]


def measures_corruptions(grid: Grid, cell: Cell, split: str) -> bool:
    """Whether a cell is also measured on images that are made worse."""
    return grid.corruptions and split == "test" and cell.is_usual


def new_rows(rows: Sequence[Row], found: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the rows that were found for numbers that `rows` do not have; what they have must be the same.

    Raises:
        ValueError: A number was measured before, as another one, so that new rows would not belong to those weights.
    """
    names = (*CELL_COLUMNS, "seed", "split", "metric")
    known = {tuple(row[name] for name in names): row["value"] for row in rows}
    new = []
    for row in found:
        before = known.get(tuple(row[name] for name in names))
        if before is None:
            new.append(row)
        elif row["metric"] == "accuracy" and float(before) != float(row["value"]):
            raise ValueError(
                f"the accuracy was {before} when this cell was measured before, and is {row['value']} now, so that these are other "
                "weights; to measure more of the grid, save it under another name"
            )
    return new


def chosen_cells(grid: Grid, rows: Sequence[Row]) -> list[Cell]:
    """For each kind of cell, the cells of all seeds with the ratio that is best on the held-out images.

    Raises:
        ValueError: The grid is not finished, or the test images were used with another ratio before.
    """
    missing = missing_cells(grid, rows, "validation")
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(grid.cells)} cells are not finished, such as {missing[0].name}; ratios are chosen "
            "when all are: run the grid without --test first"
        )
    held_out = by_cell(choose(rows, experiment=grid.name, split="validation"), CELL_COLUMNS, grid.select_by)
    sign = -1 if METRICS[grid.select_by].larger_is_better else 1
    means: dict[tuple[str, ...], dict[float, float]] = {}
    for cell in grid.cells:
        values = held_out[tuple(cell.columns(grid)[name] for name in CELL_COLUMNS)]
        means.setdefault(cell.kind(), {})[cell.ratio] = sign * sum(values.values()) / len(values)
    best = {kind: min(ratios, key=lambda ratio: ratios[ratio]) for kind, ratios in means.items()}
    chosen = [cell for cell in grid.cells if cell.ratio == best[cell.kind()]]
    used = {tuple(row[name] for name in CELL_COLUMNS) for row in choose(rows, experiment=grid.name, split="test")} - {
        tuple(cell.columns(grid)[name] for name in CELL_COLUMNS) for cell in chosen
    }
    if used:
        raise ValueError(
            f"the test images were used with cells that are not chosen now: {min(used)}; the ratio must not be chosen "
            "again after the test. Save the changed grid under another name"
        )
    return chosen


def job_of(grid: Grid, cell: Cell, folder: Path, *, root: Path, data: Mapping[str, str]) -> ClassificationJob:
    """The checked job that trains a cell into a folder; `data` are arguments that replace those of the recipe."""
    job = ClassificationJob.parse([str(root / grid.recipe), *words_of(grid, cell, folder, data=data)])
    job.check()
    sides = image_size(job.config)
    if grid.occlusion_patch < 1 or any(side % grid.occlusion_patch for side in sides):
        raise ValueError(
            f"the grid {grid.name} hides patches of {grid.occlusion_patch} pixels, which do not fill images of "
            f"{sides[0]} x {sides[1]}; choose a divisor as occlusion_patch"
        )
    return job


def command_of(grid: Grid, cell: Cell, folder: Path) -> str:
    """The command line, from the project's folder, that trains the weights of a cell into a folder."""
    words = words_of(grid, cell.trained, folder, data={})
    return shown_command(["python", "scripts/train_image_classification.py", grid.recipe, *words])


def words_of(grid: Grid, cell: Cell, folder: Path, *, data: Mapping[str, str]) -> list[str]:
    """The arguments of `scripts/train_image_classification.py` after the recipe."""
    given = {**grid.models[cell.model], **data, "hold_out_validation": "True"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, *cell.arguments(), "--output_dir", str(folder)]


def train_cell(job: ClassificationJob, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trained model of a job and the facts of its training, read from its folder if it is finished.

    An interrupted run continues from its last whole checkpoint, if its recipe saves any, and else starts again.

    Raises:
        ValueError: The folder holds a run with other settings, finished or not.
    """
    data = cached_data(**asdict(job.data))
    data = fit_classes(data, job.config, job.model)
    settings = job.settings()
    facts: dict[str, Any] = {}
    for facts_file in (folder / DONE, folder / BEGUN):
        if not facts_file.is_file():
            continue
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        # a setting that an older release did not record is not known to differ
        recorded = facts["told"]
        changed = sorted(name for name in settings.keys() & recorded.keys() if recorded[name] != settings[name])
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); delete it, or choose another "
                "--output_dir"
            )
        if facts_file.name == DONE:
            return load_classifier(folder), facts
    trained_at, checkpoint = commit(), None
    if last_whole(folder)[0] is not None:
        if not facts:
            raise ValueError(
                f"{folder} holds the start of a run whose settings are not known; delete it, or choose another --output_dir"
            )
        checkpoint = prepare_output_folder(folder, resume="true", overwrite=False)
        before = facts["git_sha"]
        trained_at = before if before.endswith(trained_at) else f"{before} then {trained_at}"
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"told": settings, "git_sha": trained_at}
    write_facts(folder / BEGUN, facts)
    set_seed(job.training.seed)
    trainer = job.trainer(job.make_model(data), data)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    trainer.save_state()
    trained: Any = trainer.model
    facts |= {"epochs": round(float(trainer.state.epoch or 0), 3), "parameters": trained.num_parameters()}
    # a resumed run knows the time of its last part only
    if checkpoint is None:
        facts["train_seconds"] = result.metrics["train_runtime"]
    # written last: it marks the folder as finished
    write_facts(folder / DONE, facts)
    (folder / BEGUN).unlink()
    return trained, facts


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, so that it is whole whenever this process ends."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    draft.replace(file)


@cache
def cached_data(**arguments: Any) -> ImageData:
    """The training data for some arguments, read once in a process."""
    return load_image_data(DataArguments(**arguments), training=True)


@cache
def cached_test_data(**arguments: Any) -> ImageData:
    """The same for the evaluation split, which training does not use."""
    return load_image_data(DataArguments(**arguments), training=False)


def data_to_test(data: DataArguments) -> ImageData:
    """The test images.

    Raises:
        ValueError: The data has no split for them, so that ratios would be tested on the images they were chosen on.
    """
    found = cached_test_data(**asdict(replace(data, hold_out_validation=False, max_train_samples=None)))
    if found.evaluation_split.endswith(f" of {data.train_split_name}"):
        raise ValueError(
            f"the data has no split for the test, only {data.train_split_name!r}, on whose held-out part ratios are chosen; "
            "pass one with --validation_file"
        )
    return found


def tensors(
    rows: Dataset, job: ClassificationJob, data: ImageData, make: Callable[..., ImageTransform] = ImageTransform
) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of some rows as inputs of the model, `[B, channels, H, W]`, and their labels `[B]`; `make` makes the transform."""
    transform = make(job.processor, label_ids=data.label_ids, num_channels=job.config.num_channels)
    batch = collate_images(rows.with_transform(transform).__getitems__(list(range(len(rows)))))
    return batch["pixel_values"], batch["labels"]


def corrupted_images(job: ClassificationJob, data: ImageData, kind: str, strength: int) -> torch.Tensor:
    """The images of a data set's evaluation, made worse, `[B, channels, H, W]` on the device of the job."""
    made = tensors(data.evaluation, job, data, partial(CorruptedTransform, kind, strength))
    return made[0].to(job.training.device)


def measure(
    grid: Grid, cells: Sequence[Cell], folder: Path, *, split: str, root: Path, data: Mapping[str, str]
) -> list[dict[str, str]]:
    """Trains the weights that some cells share, unless they exist, and measures each cell on a split.

    Args:
        grid: The grid.
        cells: Cells of the same weights.
        folder: The folder of these weights.
        split: "validation", the held-out part of the training rows, or "test", the evaluation split.
        root: The project's folder.
        data: Arguments of the data that replace those of the recipe.

    Returns:
        Rows without their origin, except `git_sha`, the commit that trained the weights.
    """
    job = job_of(grid, cells[0].trained, folder, root=root, data=data)
    trained, facts = train_cell(job, folder)
    model: Any = trained
    model.to(job.training.device)
    names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
    found = cached_data(**asdict(job.data)).with_label_names(names)
    evaluated = found
    if split == "test":
        evaluated = data_to_test(job.data).with_label_names(names)
    measured = evaluated.evaluation
    if split == "validation" and grid.held_out_images is not None:
        measured = measured.select(range(min(grid.held_out_images, len(measured))))
    pixel_values, labels = tensors(measured, job, evaluated)
    pixel_values = pixel_values.to(job.training.device)
    # as the trainer evaluates
    precision = torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=job.training.bf16)
    rows = []
    for cell in cells:
        if cell.alignment == MONTE_CARLO:
            metrics = monte_carlo_metrics(model, pixel_values, labels, seed=cell.seed)
        else:
            assert found.train is not None
            seen = tensors(found.train, job, found)
            with precision:
                train = metrics_of(predict_logits(model, seen[0].to(pixel_values.device)), seen[1])
                metrics = metrics_of(predict_logits(model, pixel_values), labels)
                occluded = occlusion_accuracy(model, pixel_values, labels, patch=grid.occlusion_patch)
            metrics |= {f"train_{name}": train[name] for name in ("accuracy", "nll")}
            metrics["accuracy_gap"] = train["accuracy"] - metrics["accuracy"]
            metrics |= {f"accuracy_at_occlusion_{fraction:g}": value for fraction, value in occluded.items()}
            metrics |= {name: facts[name] for name in ("train_seconds", "parameters") if name in facts}
            if measures_corruptions(grid, cell, split):
                with precision:
                    under = corruption_accuracy(model, partial(corrupted_images, job, evaluated), labels)
                metrics |= {UNDER[kind]: value for kind, value in under.items()}
        shared = {"epochs": f"{facts['epochs']:g}", "split": split, "images": str(len(labels))}
        # not recorded by older releases
        shared["git_sha"] = facts.get("git_sha", "unknown")
        rows += [
            {
                **cell.columns(grid),
                **shared,
                "metric": name,
                "value": f"{value:.6g}",
                "unit": UNITS.get(name, "fraction"),
            }
            for name, value in metrics.items()
        ]
    return rows


def monte_carlo_metrics(
    model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor, *, seed: int
) -> dict[str, float]:
    """`classification_metrics` of the mean prediction over `MASKS` masks, with a seed for each thousand images."""
    predictions = [
        monte_carlo_predict(model, {"pixel_values": part}, samples=MASKS, seed=seed + number)
        for number, part in enumerate(pixel_values.split(1000))
    ]
    probabilities = torch.cat([prediction.probabilities for prediction in predictions])
    # log-probabilities are logits; one that underflows in float32 must stay finite
    return metrics_of(probabilities.clamp_min(torch.finfo(torch.float32).tiny).log(), labels)
