"""The evidence of the paper's other tasks, from the rows of `task_grids`: tables in Markdown, with the paper's numbers beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..hub.cards import RunFacts
from ..hub.metric_names import METRICS
from ..intervals import difference, interval
from .evidence import REGULARISERS, comparison, named_ratios, report, seeds_of
from .grids import Cell
from .judgement import judged
from .rows import Row, choose, warnings
from .tables import markdown
from .task_grids import COSTS, TaskGrid


def cells_of(grid: TaskGrid, rows: Sequence[Row], train_images: str) -> dict[str, dict[str, str]]:
    """By name, the columns of the three regularisers of a grid with a number of training images."""
    shared = {"experiment": grid.name, "train_images": train_images}
    return named_ratios(rows, {name: {**wanted, **shared} for name, wanted in REGULARISERS.items()})


def sizes_of(grid: TaskGrid, rows: Sequence[Row]) -> list[str]:
    """The numbers of training images that have rows, the smallest first."""
    found = {row["train_images"] for row in choose(rows, experiment=grid.name)}
    return sorted(found, key=lambda size: (size == "all", int(size) if size != "all" else 0))


def table(grid: TaskGrid, rows: Sequence[Row], train_images: str) -> str:
    """The three regularisers: metrics with intervals, and differences to none seed by seed."""
    own = choose(rows, experiment=grid.name)
    cells, metrics = cells_of(grid, own, train_images), list(grid.metrics)
    measured = {name: wanted for name, wanted in cells.items() if seeds_of(own, metrics[0], **wanted)}
    # without runs of none, or with none that share a seed, there are values only
    base = seeds_of(own, metrics[0], **cells["none"]).keys()
    paired = all(base & seeds_of(own, metrics[0], **wanted).keys() for wanted in measured.values())
    if base and paired:
        return comparison(own, measured, "none", metrics)
    lines = [
        [name, str(len(seeds_of(own, metrics[0], **wanted)))]
        + [str(interval(list(seeds_of(own, metric, **wanted).values()))) for metric in metrics]
        for name, wanted in measured.items()
    ]
    return markdown(["", "seeds", *(METRICS[metric].label for metric in metrics)], lines)


def verdict(grid: TaskGrid, rows: Sequence[Row], train_images: str) -> str:
    """In words: attention dropout and DropKey against none in the first metric; empty where one of them has no row."""
    own, metric = choose(rows, experiment=grid.name), next(iter(grid.metrics))
    (_, base), *others = cells_of(grid, own, train_images).items()
    against, words = seeds_of(own, metric, **base), []
    for name, wanted in others:
        values = seeds_of(own, metric, **wanted)
        if values.keys() & against.keys():
            found = judged(difference(values, against), metric)
            said = f"{found.word} than none" if found.word else "not distinguishable from none"
            words.append(f"{name}: {said} in {METRICS[metric].word} ({found.numbers})")
    return f"{'; '.join(words)}." if words else ""


def costs(grid: TaskGrid, rows: Sequence[Row]) -> str:
    """Parameters and the CPU seconds of a cell, for readers who want to repeat it."""
    own = choose(rows, experiment=grid.name)
    seconds = [float(row["value"]) for row in choose(own, metric="cpu_seconds")]
    sizes = sorted({float(row["value"]) for row in choose(own, metric="parameters")})
    epochs = sorted({row["epochs"] for row in own}, key=float)
    took = " to ".join(dict.fromkeys((f"{min(seconds):.0f}", f"{max(seconds):.0f}")))
    return (
        f"{len(seconds)} {'run' if len(seconds) == 1 else 'runs'} of {took} CPU seconds on one thread "
        f"({' or '.join(f'{size:,.0f}' for size in sizes)} parameters, {' or '.join(epochs)} epochs), scored on "
        f"{' or '.join(sorted({row['images'] for row in own}))} held-out images."
    )


def section(grid: TaskGrid, rows: Sequence[Row]) -> str:
    """The part of the evidence for one task; empty without rows."""
    own = choose(rows, experiment=grid.name)
    if not own:
        return ""
    parts = [f"## {grid.task}", costs(grid, own)]
    for size in sizes_of(grid, own):
        if size != "all":
            parts.append(f"### {size} training images")
        parts += [verdict(grid, own, size), table(grid, own, size)]
    parts.append(f"The paper's numbers, its authors', not repeated here: {grid.published}")
    notes = warnings(own)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part)


def task_report(grids: Sequence[TaskGrid], rows: Sequence[Row]) -> str:
    """The sections of all tasks that have rows, with how their ratios were chosen."""
    sections = [found for grid in grids if (found := section(grid, rows))]
    if not sections:
        return ""
    head = (
        "# The paper's other tasks\n\nSmall models from scratch on generated images. Steps, learning rate and the ratio of each "
        "regulariser were fixed before the first run of a grid, so nothing is chosen by these numbers. The held-out images "
        "are other rows of the same generator: they say nothing about photographs. The grids of five seeds stop after 300 and 400 "
        "steps, long before the models have learned all: they show what a regulariser does to the start of training."
    )
    return "\n\n".join([head, *sections]) + "\n"


def whole_report(rows: Sequence[Row], grids: Sequence[TaskGrid]) -> str:
    """The evidence of image classification, then that of the other tasks."""
    tasks = task_report(grids, rows)
    return f"{report(rows)}\n{tasks}" if tasks else report(rows)


def load_grids(folder: Path) -> list[TaskGrid]:
    """The grids of a folder, by name."""
    return [TaskGrid.load(file) for file in sorted(folder.glob("*.json"))]


# --- a card ------------------------------------------------------------------------------------------------------------


def results_text(grid: TaskGrid, rows: Sequence[Row], cell: Cell) -> str:
    """The results of a card: this seed, all seeds of its cell, and the comparison, each number from the rows.

    Raises:
        ValueError: The cell has no rows.
    """
    own = choose(rows, experiment=grid.name)
    columns = grid.columns(cell)
    values = values_of(grid, rows, cell)
    wanted = {name: value for name, value in columns.items() if name != "seed"}
    lines = []
    for metric, value in values.items():
        seeds = list(seeds_of(own, metric, **wanted).values())
        lines.append([METRICS[metric].full, f"{value:.3f}", str(interval(seeds))])
    number = len(seeds_of(own, next(iter(values)), **wanted))
    images = " or ".join(sorted({row["images"] for row in own}))
    size = str(cell.train_images)
    parts = [
        f"{images} held-out images of {grid.task}. These weights are of seed {cell.seed}, which nobody chose by its results; "
        f"{number} {'seed was' if number == 1 else 'seeds were'} trained.",
        markdown(["metric", f"these weights, seed {cell.seed}", f"mean and 95 % interval, seeds: {number}"], lines),
        "Regularisers, at ratios fixed beforehand; differences, where there are runs without one, are taken seed by seed:",
        table(grid, rows, size),
        verdict(grid, rows, size),
        "The rows are in `model_cards/results.csv`.",
    ]
    return "\n\n".join(part for part in parts if part)


def values_of(grid: TaskGrid, rows: Sequence[Row], cell: Cell) -> dict[str, float]:
    """The measured values of one cell, by metric.

    Raises:
        ValueError: A metric has no row.
    """
    found = {row["metric"]: float(row["value"]) for row in choose(rows, **grid.columns(cell))}
    missing = [metric for metric in grid.metrics if metric not in found]
    if missing:
        raise ValueError(f"{cell.name} has no row of {', '.join(missing)}; run its grid with scripts/run_task_grid.py")
    return {metric: found[metric] for metric in grid.metrics}


def card_facts(
    grid: TaskGrid, rows: Sequence[Row], cell: Cell, *, name: str, settings: Mapping[str, str], limits: Sequence[str]
) -> RunFacts:
    """What a card says that the files of the trained folder do not hold.

    Args:
        grid: The grid.
        rows: Of the results file.
        cell: The weights.
        name: Of the model, and of the folder that the command writes.
        settings: Of the run, by name.
        limits: Of the data, a sentence each.
    """
    (origin,) = {
        (row["torch"], row["transformers"]) for row in choose(rows, **grid.columns(cell), metric=next(iter(COSTS)))
    }
    return RunFacts(
        dataset=grid.task,
        dataset_split="held-out",
        from_scratch=True,
        license="apache-2.0",
        command=grid.command(cell, Path("runs") / name),
        hyperparameters=dict(settings),
        versions=dict(zip(("torch", "transformers"), origin, strict=True)),
        results=results_text(grid, rows, cell),
        limits=[f"No weights are published: the command above makes them, in `runs/{name}`.", *limits],
    )
