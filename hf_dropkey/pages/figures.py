"""Figures of the page about a run, from data in the arguments; each is narrow enough for a phone."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..extras import needed
from ..inspection.analysis import LayerDrop
from ..plots import LINE_COLORS, LINE_STYLES, MARKERS, RIGHT_COLOR, WRONG_COLOR


with needed("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH, HEIGHT = 4.6, 3.3
# more points than this have no markers
MARKED_POINTS = 40
# up to this many classes have their counts written into the matrix, and their names at its sides
COUNTED_CLASSES, NAMED_CLASSES = 12, 30
BINS = 15


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str, title: str) -> Figure:
    """Logged values over the steps of training, a line for each name.

    Raises:
        ValueError: A name has no points.
    """
    if not series or not all(series.values()):
        raise ValueError(f"no points for {[name for name, points in series.items() if not points]}; log them first")
    figure, axis = _axis(title)
    for number, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        marker = MARKERS[number % len(MARKERS)] if len(points) <= MARKED_POINTS else ""
        color, style = LINE_COLORS[number % len(LINE_COLORS)], LINE_STYLES[number % len(LINE_STYLES)]
        axis.plot(steps, values, marker=marker, ms=4, label=name, color=color, ls=style)
    axis.set(xlabel="optimiser step", ylabel=ylabel)
    axis.margins(y=0.08)
    axis.grid(visible=True, alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=9)
    return figure


def _axis(title: str, height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=10)
    return figure, axis


def confusion(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: Sequence[str]) -> Figure:
    """The fraction of each class's images that were predicted as each class; counts where there is room for them."""
    count = len(classes)
    counts = confusion_counts(labels, predicted, count)
    fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axis = _axis("rows: true class, columns: predicted class", 4.4)
    drawn = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if count <= NAMED_CLASSES:
        shown = [name if len(name) <= 14 else f"{name[:13]}…" for name in classes]
        size = 8 if count <= COUNTED_CLASSES else 6
        axis.set_xticks(range(count), shown, rotation=90 if max(map(len, shown)) > 2 else 0, fontsize=size)
        axis.set_yticks(range(count), shown, fontsize=size)
    if count <= COUNTED_CLASSES:
        for (row, column), number in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            if number:
                axis.text(column, row, f"{number}", ha="center", va="center", fontsize=7, color=color)
    axis.set(xlabel="predicted", ylabel="true")
    figure.colorbar(drawn, ax=axis, shrink=0.7, label="fraction of the true class")
    return figure


def confusion_counts(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """How often each class, `[C, .]`, was predicted as each class, `[., C]`."""
    places = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def calibration(confidence: NDArray[np.floating], right: NDArray[np.bool_], *, ece: float | None) -> Figure:
    """Accuracy against confidence in 15 bins of equal width, and below the fraction of images in each.

    Args:
        confidence: Probability of the predicted class, `[B]`.
        right: Whether the prediction was right, `[B]`.
        ece: Expected calibration error, for the title.
    """
    # (lower, upper], as in the expected calibration error
    bins = np.clip(np.ceil(np.asarray(confidence) * BINS).astype(int) - 1, 0, BINS - 1)
    sizes = np.bincount(bins, minlength=BINS)
    filled = sizes > 0
    accuracy = np.bincount(bins, weights=right, minlength=BINS)[filled] / sizes[filled]
    mean = np.bincount(bins, weights=confidence, minlength=BINS)[filled] / sizes[filled]
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="#4D4D4D", ls=":", label="calibrated")
    # a bin of few images says little, so its point is small
    upper.plot(mean, accuracy, color=RIGHT_COLOR, lw=1, alpha=0.5)
    upper.scatter(
        mean,
        accuracy,
        s=12 + 90 * np.sqrt(sizes[filled] / sizes.max()),
        color=RIGHT_COLOR,
        label="bins (larger: more images)",
    )
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.04, 1.04))
    lower.bar((np.arange(BINS) + 0.5) / BINS, sizes / max(1, sizes.sum()), width=0.9 / BINS, color=WRONG_COLOR)
    lower.set(xlabel="confidence", ylabel="fraction\nof images")
    upper.grid(visible=True, alpha=0.3)
    upper.legend(fontsize=8, loc="upper left")
    figure.suptitle("calibration" if ece is None else f"calibration error (ECE) {ece:.3f}", fontsize=10)
    return figure


def robustness(accuracies: Mapping[str, Sequence[float]], *, clean: float) -> Figure:
    """The accuracy at each strength, from 1 on, a line for each kind; at 0 that of the images as they are."""
    figure, axis = _axis("accuracy on images made worse")
    for number, (kind, values) in enumerate(accuracies.items()):
        color, style = LINE_COLORS[number % len(LINE_COLORS)], LINE_STYLES[number % len(LINE_STYLES)]
        marker = MARKERS[number % len(MARKERS)]
        axis.plot(range(len(values) + 1), [clean, *values], marker=marker, ms=4, label=kind, color=color, ls=style)
    axis.set(xlabel="strength (0: as they are)", ylabel="accuracy")
    axis.set_xticks(range(1 + max(map(len, accuracies.values()))))
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=9)
    return figure


def drops(layers: Sequence[LayerDrop]) -> Figure:
    """The configured ratio of each attention, and the mean and range of the measured fractions."""
    figure, axis = _axis("drop ratio of each attention", 3.3, max(WIDTH, min(9.0, 0.22 * len(layers) + 2)))
    depth = np.arange(1, len(layers) + 1)
    axis.plot(
        depth, [one.ratio for one in layers], color=RIGHT_COLOR, ls=":", marker="_", ms=12, mew=2, label="configured"
    )
    measured = [(place, one.fractions) for place, one in zip(depth, layers, strict=True) if one.fractions]
    if measured:
        places, found = zip(*measured, strict=True)
        means = np.array([np.mean(one) for one in found])
        reach = np.array([[mean - min(one), max(one) - mean] for mean, one in zip(means, found, strict=True)]).T
        axis.errorbar(
            places,
            means,
            yerr=np.abs(reach),
            fmt="o",
            ms=4,
            capsize=3,
            color=WRONG_COLOR,
            label="measured: mean and range",
        )
    axis.set(xlabel="attention, in order of execution", ylabel="fraction of keys dropped")
    axis.set_xticks(depth if len(depth) <= 16 else depth[:: -(-len(depth) // 12)])
    axis.set_ylim(bottom=-0.01)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=9)
    return figure
