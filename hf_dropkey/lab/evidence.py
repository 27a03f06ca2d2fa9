"""The evidence, from the rows of the experiments: tables in Markdown, sentences and figures.

Each table compares cells that differ in one setting, seed by seed.
"""

from collections.abc import Iterator, Mapping, Sequence

from ..extras import needed
from ..hub.metric_names import METRICS
from ..intervals import Interval, difference, interval
from .figures import Curve, curves, differences
from .judgement import Judgement, judged
from .robustness import OCCLUDED_FRACTIONS, UNDER
from .rows import CELL_COLUMNS, Row, by_cell, choose, warnings
from .tables import markdown


with needed("plots"):
    from matplotlib.figure import Figure

PLAIN = {"schedule": "none", "pattern": "none", "alignment": "none", "train_images": "all"}
DROPKEY = {**PLAIN, "regulariser": "dropkey", "schedule": "decreasing", "pattern": "score"}
REGULARISERS = {
    "none": {**PLAIN, "regulariser": "none"},
    "attention dropout": {**PLAIN, "regulariser": "attention dropout"},
    "DropKey": DROPKEY,
}
CONSTANT = {**DROPKEY, "schedule": "constant"}
# fine-tuned, by their name in the rows; other models start from nothing
PRETRAINED = {"dinov2-small": "DINOv2-small", "dinov2-small-lora": "DINOv2-small, LoRA"}
# in the column of models, for rows that `by_start` has read
FINE_TUNED = "fine-tuned"
OCCLUDED = {0.0: "accuracy"} | {fraction: f"accuracy_at_occlusion_{fraction:g}" for fraction in OCCLUDED_FRACTIONS}
Seeds = Mapping[str, float]


def by_start(rows: Sequence[Row]) -> list[Row]:
    """The rows, first those of pretrained models, each of which becomes a task of its own: it is compared with itself."""
    fine_tuned: list[Row] = [
        {
            **row,
            "task": f"{PRETRAINED[row['model']]}, {row['train_images']} images of {row['task']}",
            "model": FINE_TUNED,
            "train_images": "all",
        }
        for row in choose(rows, model=tuple(PRETRAINED))
    ]
    return fine_tuned + [row for row in rows if row["model"] not in PRETRAINED]


def tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks of the grids' rows, in order of appearance."""
    return list(dict.fromkeys(row["task"] for row in grid_rows(rows)))


def grid_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the grids; the file holds those of single runs too."""
    return choose(rows, split=("validation", "test"))


def seeds_of(rows: Sequence[Row], metric: str, **wanted: str) -> Seeds:
    """The values of one cell by seed; empty if it was not measured.

    Raises:
        ValueError: The wanted columns match several cells.
    """
    found = by_cell(choose(rows, **wanted), CELL_COLUMNS, metric)
    if len(found) > 1:
        raise ValueError(f"{wanted} matches {len(found)} cells: {sorted(found)}; choose one of them")
    return next(iter(found.values()), {})


def ratio_of(rows: Sequence[Row], **wanted: str) -> str:
    """The ratio of the one cell that these columns identify; empty if there is none, or several."""
    ratios = {row["ratio"] for row in choose(rows, **wanted)}
    return ratios.pop() if len(ratios) == 1 else ""


def comparison(
    rows: Sequence[Row],
    cells: Mapping[str, Mapping[str, str]],
    baseline: str,
    metrics: Sequence[str] = ("accuracy", "nll"),
) -> str:
    """A table with a line for each cell: metrics with intervals, and differences to one of the cells, seed by seed.

    Args:
        rows: Of one task and split.
        cells: By name, the columns that identify a cell; cells that were not measured are skipped.
        baseline: The name of the cell to compare with.
        metrics: Names of `METRICS`.
    """
    compared = [metric for metric in metrics if METRICS[metric].larger_is_better is not None]
    head = ["", "seeds", *(METRICS[metric].label for metric in metrics)]
    head += [f"{METRICS[metric].label}: difference to {baseline}" for metric in compared]
    base = {metric: seeds_of(rows, metric, **cells[baseline]) for metric in compared}
    lines = []
    for name, wanted in cells.items():
        values = {metric: seeds_of(rows, metric, **wanted) for metric in metrics}
        if not values[metrics[0]]:
            continue
        line = [name, str(len(values[metrics[0]]))]
        line += [str(interval(list(found.values()))) if found else "" for found in values.values()]
        for metric in compared:
            is_shown = name != baseline and values[metric]
            line.append(str(judged(difference(values[metric], base[metric]), metric)) if is_shown else "")
        lines.append(line)
    return markdown(head, lines)


def named_ratios(rows: Sequence[Row], cells: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same cells, with the chosen ratio in their names."""
    named = {}
    for name, wanted in cells.items():
        ratio = ratio_of(rows, **wanted)
        named[f"{name} {ratio}" if ratio not in ("", "0") else name] = dict(wanted)
    return named


def compared_in(tested: Sequence[Row]) -> dict[str, dict[str, str]]:
    """The cells that tables of test images compare; with a pretrained model the constant schedule, too."""
    constant = choose(tested, model=FINE_TUNED, **CONSTANT)
    return REGULARISERS | ({"DropKey, constant": CONSTANT} if constant else {})


def by_regulariser(rows: Sequence[Row], task: str, *, train_images: str = "all") -> str:
    """Test images: the three regularisers, each with its chosen ratio."""
    tested = choose(rows, split="test", task=task)
    cells = named_ratios(tested, {n: {**w, "train_images": train_images} for n, w in compared_in(tested).items()})
    return comparison(tested, cells, "none", ("accuracy", "nll", "ece", "accuracy_gap"))


def by_ratio(rows: Sequence[Row], task: str, metric: str) -> str:
    """Held-out images: every ratio of both regularisers."""
    held_out = choose(rows, split="validation", task=task)
    curve = ratio_curves(held_out, metric)
    ratios = sorted({ratio for found in curve.values() for ratio in found})
    lines = [["none", *[str(none_level(held_out, metric))] * bool(ratios), *[""] * (len(ratios) - 1)]]
    lines += [
        [name, *(str(found[ratio]) if ratio in found else "" for ratio in ratios)] for name, found in curve.items()
    ]
    return markdown([METRICS[metric].label, *(f"ratio {ratio:g}" for ratio in ratios)], lines)


def at_equal_ratios(rows: Sequence[Row], task: str, column: str) -> str:
    """Held-out images: the values of a column (schedule or pattern), at each ratio that all were trained with."""
    held_out = choose(rows, split="validation", task=task)
    found = choose(held_out, regulariser="dropkey", alignment="none", train_images="all")
    first = DROPKEY[column]
    values = [first, *dict.fromkeys(row[column] for row in found if row[column] != first)]
    others = {name: value for name, value in DROPKEY.items() if name != column}
    ratios = [{row["ratio"] for row in choose(found, **{**others, column: value})} for value in values]
    tables = []
    for ratio in sorted(set.intersection(*ratios), key=float):
        cells = {value: {**others, column: value, "ratio": ratio} for value in values}
        tables.append(f"Ratio {ratio}:\n\n" + comparison(held_out, cells, first, ("accuracy", "nll", "ece")))
    return "\n\n".join(tables)


def by_alignment(rows: Sequence[Row], task: str) -> str:
    """Test images: DropKey with neither alignment, with Monte-Carlo inference, with a fine-tune at the end."""
    tested = choose(rows, split="test", task=task)
    cells = {"none": REGULARISERS["none"]} | {
        f"DropKey, {alignment}" if alignment != "none" else "DropKey": {**DROPKEY, "alignment": alignment}
        for alignment in ("none", "monte-carlo", "fine-tune")
    }
    named = named_ratios(tested, cells)
    return comparison(
        tested, named, next(name for name in named if name.startswith("DropKey")), ("accuracy", "nll", "ece")
    )


def by_occlusion(rows: Sequence[Row], task: str) -> str:
    """Test images with patches hidden."""
    tested = choose(rows, split="test", task=task)
    cells = named_ratios(tested, compared_in(tested))
    lines = [
        [name, *(str(interval(list(seeds_of(tested, metric, **wanted).values()))) for metric in OCCLUDED.values())]
        for name, wanted in cells.items()
        if seeds_of(tested, "accuracy", **wanted)
    ]
    return markdown(["accuracy", *(f"{fraction:.0%} of patches hidden" for fraction in OCCLUDED)], lines)


def by_corruption(rows: Sequence[Row], task: str) -> str:
    """Test images made worse, each number a mean over five strengths: the regularisers at their chosen ratios."""
    tested = choose(rows, split="test", task=task)
    return comparison(tested, named_ratios(tested, compared_in(tested)), "none", tuple(UNDER.values()))


# --- figures ---------------------------------------------------------------------------------------------------------


def ratio_curves(held_out: Sequence[Row], metric: str) -> dict[str, Curve]:
    """For both regularisers that have a ratio, the interval at each one."""
    found: dict[str, Curve] = {}
    for name in ("attention dropout", "DropKey"):
        cells = by_cell(choose(held_out, **REGULARISERS[name]), ["ratio"], metric)
        if cells:
            found[name] = {float(ratio): interval(list(seeds.values())) for (ratio,), seeds in cells.items()}
    return found


def none_level(held_out: Sequence[Row], metric: str) -> Interval:
    """The interval without a regulariser."""
    return interval(list(seeds_of(held_out, metric, **REGULARISERS["none"]).values()))


def ratio_figure(rows: Sequence[Row], metric: str) -> Figure:
    """A metric of held-out images against the ratio, a panel for each task."""
    held_out = {task: choose(rows, split="validation", task=task) for task in tasks(rows)}
    return curves(
        {task: ratio_curves(found, metric) for task, found in held_out.items()},
        levels={task: {"none": none_level(found, metric)} for task, found in held_out.items()},
        xlabel="drop ratio (DropKey: of the first layer)",
        ylabel=f"{METRICS[metric].label}, held-out images",
        title=f"{METRICS[metric].title} of small vision transformers by regulariser and ratio; bands: 95 % intervals",
    )


def occlusion_figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy against the fraction of hidden patches, a panel for each task."""
    panels: dict[str, dict[str, Curve]] = {}
    for task in tasks(rows):
        tested = choose(rows, split="test", task=task)
        cells = {
            name: wanted for name, wanted in compared_in(tested).items() if seeds_of(tested, "accuracy", **wanted)
        }
        if cells:
            panels[task] = {
                name: {
                    100 * fraction: interval(list(seeds_of(tested, metric, **wanted).values()))
                    for fraction, metric in OCCLUDED.items()
                }
                for name, wanted in cells.items()
            }
    return curves(
        panels,
        xlabel="patches hidden, %",
        ylabel="accuracy, test images",
        title="Accuracy with patches of the image hidden, each regulariser at its chosen ratio; bands: 95 % intervals",
    )


def variants(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and columns of every kind of DropKey that was trained on all images at ratios shared by all kinds."""
    yield "DropKey (decreasing, score)", DROPKEY
    for column in ("schedule", "pattern"):
        for value in dict.fromkeys(row[column] for row in choose(rows, regulariser="dropkey")):
            if value != DROPKEY[column]:
                yield f"{column} {value}", {**DROPKEY, column: value}
    yield "fine-tune without DropKey", {**DROPKEY, "alignment": "fine-tune"}
    yield "Monte-Carlo inference", {**DROPKEY, "alignment": "monte-carlo"}
    yield "attention dropout", REGULARISERS["attention dropout"]


def difference_figure(rows: Sequence[Row], metric: str, ratio: str) -> Figure:
    """Held-out images: every variant at one ratio minus no regulariser, seed by seed, a panel for each task."""
    panels: dict[str, dict[str, Interval]] = {}
    for task in tasks(rows):
        held_out = choose(rows, split="validation", task=task)
        base = seeds_of(held_out, metric, **REGULARISERS["none"])
        panels[task] = {}
        for name, wanted in variants(grid_rows(rows)):
            values = seeds_of(held_out, metric, **{**wanted, "ratio": ratio})
            if values:
                panels[task][name] = difference(values, base)
    return differences(
        panels,
        xlabel=f"{METRICS[metric].label}: minus no regulariser",
        title=f"Held-out images at ratio {ratio}, mean over seeds and 95 % interval; filled: the interval excludes 0",
    )


def size_figure(rows: Sequence[Row], metric: str) -> Figure:
    """Test images: both regularisers at their chosen ratio minus none, for each number of training images."""
    panels: dict[str, dict[str, Interval]] = {}
    for task in tasks(rows):
        tested = choose(rows, split="test", task=task)
        sizes = sorted({row["train_images"] for row in tested}, key=lambda size: (size == "all", size))
        # one name in all panels, whose small sizes differ
        names = {size: "all images" if size == "all" else "few images" for size in sizes}
        for name in ("DropKey", "attention dropout"):
            for size in sizes:
                values = seeds_of(tested, metric, **{**REGULARISERS[name], "train_images": size})
                base = seeds_of(tested, metric, **{**REGULARISERS["none"], "train_images": size})
                few = "".join(f", few: {found}" for found in sizes if found != "all")
                panels.setdefault(f"{task}{few}", {})[f"{name}, {names[size]}"] = difference(values, base)
    return differences(
        panels,
        xlabel=f"{METRICS[metric].label}: minus no regulariser",
        title="Test images, few and all training images, mean over seeds and 95 % interval; filled: it excludes 0",
    )


# --- documents -------------------------------------------------------------------------------------------------------


def images_of(rows: Sequence[Row], task: str) -> str:
    """The number of test images, in words."""
    counts = sorted({row["images"] for row in choose(rows, split="test", task=task)})
    return f"{' or '.join(counts)} test images"


def against_none(rows: Sequence[Row], name: str, task: str, train_images: str = "all") -> dict[str, Judgement]:
    """Test images: a regulariser, by its name in `REGULARISERS`, minus none, by metric."""
    tested = choose(rows, split="test", task=task, train_images=train_images)
    found = {}
    for metric in ("accuracy", "nll"):
        ours, base = (
            seeds_of(tested, metric, **{**compared_in(tested)[one], "train_images": train_images})
            for one in (name, "none")
        )
        found[metric] = judged(difference(ours, base), metric)
    return found


def verdict(rows: Sequence[Row], task: str, *, train_images: str = "all") -> str:
    """A sentence for each regulariser: its differences to no regulariser on the test images."""
    words = []
    for name in ("DropKey", "attention dropout"):
        if not choose(rows, split="test", task=task, **{**REGULARISERS[name], "train_images": train_images}):
            continue
        found = against_none(rows, name, task, train_images)
        words.append(f"{name}: {'; '.join(f'{METRICS[metric].word} {one}' for metric, one in found.items())}")
    return ". ".join(words) + "."


def pretrained(rows: Sequence[Row]) -> list[Row]:
    """The rows of pretrained models, of those that `by_start` has read."""
    return choose(rows, model=FINE_TUNED)


def tested_places(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """By name, each task and number of training images that was tested."""
    return {
        task if images == "all" else f"{task} with {images} training images": (task, images)
        for task in tasks(rows)
        for images in sorted({row["train_images"] for row in choose(rows, split="test", task=task)}, reverse=True)
    }


def summary(rows: Sequence[Row]) -> str:
    """A line for each task and regulariser on the test images, with all and with few training images."""
    head = ["test images", "", "seeds", *(METRICS[metric].label for metric in ("accuracy", "nll", "ece"))]
    head += ["accuracy minus none", "NLL minus none"]
    lines: list[list[str]] = []
    for place, (task, images) in tested_places(rows).items():
        tested = choose(rows, split="test", task=task)
        cells = {name: {**wanted, "train_images": images} for name, wanted in compared_in(tested).items()}
        for name, (shown, wanted) in zip(cells, named_ratios(tested, cells).items(), strict=True):
            values = [seeds_of(tested, metric, **wanted) for metric in ("accuracy", "nll", "ece")]
            if not values[0]:
                continue
            line = [place if name == "none" else "", shown, str(len(values[0]))]
            line += [str(interval(list(found.values()))) for found in values]
            found = against_none(rows, name, task, images) if name != "none" else {}
            lines.append([*line, *(str(found.get(metric, "")) for metric in ("accuracy", "nll"))])
    return markdown(head, lines)


def in_short(rows: Sequence[Row]) -> str:
    """The part of the README: the table of pretrained models, then in words where DropKey differs, and where not."""
    fine_tuned = pretrained(rows)
    places = tested_places(fine_tuned)
    if not places:
        return in_words(rows)
    words = [
        one.word for task, images in places.values() for one in against_none(rows, "DropKey", task, images).values()
    ]
    nowhere = (
        ""
        if "better" in words
        else "In no fine-tuning of a pretrained model here is DropKey better than no regulariser. "
    )
    return f"{summary(fine_tuned)}\n\n{nowhere}{in_words(rows)}"


def in_words(rows: Sequence[Row]) -> str:
    """Where DropKey differs from no regulariser by more than the interval, and where not."""
    sure: list[str] = []
    unsure: list[str] = []
    for place, (task, images) in tested_places(rows).items():
        found = against_none(rows, "DropKey", task, images)
        shown = ", ".join(
            f"{one.word} {METRICS[metric].word} {one.numbers}" for metric, one in found.items() if one.word
        )
        (sure if shown else unsure).append(f"{place} ({shown})" if shown else place)
    text = f"DropKey differs from no regulariser by more than the interval on {'; '.join(sure) or 'none of these'}."
    return f"{text} It does not on {'; '.join(unsure)}." if unsure and sure else text


def report(rows: Sequence[Row]) -> str:
    """All tables, with notes on the rows."""
    found = grid_rows(rows)
    parts = ["## In one table", summary(found), in_words(found)] if tested_places(found) else []
    for task in tasks(rows):
        parts.append(f"## {task}")
        if choose(found, split="test", task=task):
            title = f"### None, attention dropout, DropKey: {images_of(found, task)}"
            parts += [title, verdict(found, task), by_regulariser(found, task)]
            small = sorted({row["train_images"] for row in choose(found, task=task)} - {"all"}, key=int)
            for images in small:
                parts += [f"### The same with {images} training images", verdict(found, task, train_images=images)]
                parts += [by_regulariser(found, task, train_images=images)]
            if choose(found, split="test", task=task, alignment=("monte-carlo", "fine-tune")):
                parts += ["### Alignments: test images", by_alignment(found, task)]
            parts += ["### Hidden patches: test images", by_occlusion(found, task)]
            if choose(found, split="test", task=task, metric=tuple(UNDER.values())):
                parts += ["### Noise, blur, contrast, JPEG: test images, means over five strengths"]
                parts += [by_corruption(found, task)]
        for metric in ("accuracy", "nll", "ece"):
            parts += [f"### {METRICS[metric].label} by ratio: held-out images", by_ratio(found, task, metric)]
        for column in ("schedule", "pattern"):
            if len({row[column] for row in choose(found, task=task, regulariser="dropkey")}) > 1:
                parts += [f"### By {column}: held-out images", at_equal_ratios(found, task, column)]
    notes = "\n".join(f"- {note}" for note in warnings(found))
    notes = notes or "- one commit, one device, one version of each package"
    return "\n\n".join([*parts, "## Notes on the rows", notes]) + "\n"
