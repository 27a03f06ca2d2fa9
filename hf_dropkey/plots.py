"""Figures from data in the arguments: nothing here trains, loads a model or opens a window.

Colours come from the Okabe-Ito set and from perceptually uniform maps, so that they can be distinguished with any
colour vision and in grey.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .extras import needed
from .moved import forward


with needed("plots"):
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure


RIGHT_COLOR, WRONG_COLOR = "#0072B2", "#D55E00"
ATTENTION_MAP = "cividis"
# without black, which on a photograph looks like part of the image
BOX_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# yellow is too light for a line on white
LINE_COLORS = tuple(color for color in BOX_COLORS if color != "#F0E442")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "os^Dvp"


def predictions_with_attention(
    images: Sequence[Image.Image],
    attention: NDArray[np.floating],
    probabilities: NDArray[np.floating],
    labels: Sequence[int],
    label_names: Sequence[str],
    *,
    title: str,
    columns: int = 8,
) -> Figure:
    """Each image above the attention of its class token, titled with the prediction and its probability.

    A wrong prediction differs from a right one in words as well as in colour. The attention maps have one square-root
    scale, in multiples of uniform attention.

    Args:
        images: B images of any size.
        attention: Attention of the class token on the patches, `[B, rows, columns]`, above 0 somewhere in each image.
        probabilities: Class probabilities, `[B, C]`.
        labels: B true class numbers.
        label_names: C names.
        title: Model and data.
        columns: Images side by side.

    Raises:
        ValueError: No images, or arguments of different lengths.
    """
    count = len(images)
    if count == 0 or not count == len(attention) == len(probabilities) == len(labels):
        raise ValueError(
            f"{count} images, {len(attention)} attention maps, {len(probabilities)} predictions and {len(labels)} "
            "labels; pass one of each per image, and at least one image"
        )
    columns = min(columns, count)
    blocks = -(-count // columns)
    relative = attention * attention[0].size / attention.sum(axis=(1, 2), keepdims=True)
    # attention is peaked: on a linear scale all but the largest values would look alike
    scale = PowerNorm(0.5, 0, float(relative.max()))
    figure = Figure(figsize=(1.25 * columns + 1.3, 2.75 * blocks + 0.6), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, image in enumerate(images):
        upper, lower = axes[2 * (number // columns) : 2 * (number // columns) + 2, number % columns]
        upper.imshow(image, cmap="gray", vmin=0, vmax=255)
        lower.imshow(relative[number], cmap=ATTENTION_MAP, norm=scale)
        guess = int(probabilities[number].argmax())
        right = guess == labels[number]
        truth = "right" if right else f"wrong, is {label_names[labels[number]]}"
        upper.set_title(
            f"{label_names[guess]} ({probabilities[number, guess]:.0%})\n{truth}",
            color=RIGHT_COLOR if right else WRONG_COLOR,
            fontsize=9,
            fontweight="normal" if right else "bold",
        )
    figure.suptitle(textwrap.fill(title, max(30, int(11 * figure.get_figwidth()))), fontsize=11)
    ticks = [0, *(2.0**power for power in range(1 + int(np.log2(relative.max()))))]
    colors = ScalarMappable(scale, ATTENTION_MAP)
    bar = figure.colorbar(colors, ax=list(axes.flat), shrink=0.6, aspect=30, ticks=ticks, format="{x:g}")
    bar.set_label("attention of the class token on a patch\n(1: uniform attention; square-root scale)", fontsize=9)
    return figure


def method_overview(patterns: Mapping[str, NDArray[np.bool_]], schedules: Mapping[str, Sequence[float]]) -> Figure:
    """The mask of each pattern, and the drop ratio of each layer.

    Args:
        patterns: For each pattern, the dropped scores of one head, bool `[N, M]`, True = dropped.
        schedules: For each schedule, the drop ratio of each layer.

    Returns:
        A figure with one panel for each pattern (rows are queries, columns are keys) and one for the schedules.
    """
    figure = Figure(figsize=(2.1 * len(patterns) + 3.4, 2.9), layout="constrained")
    axes = figure.subplots(1, len(patterns) + 1, width_ratios=[1] * len(patterns) + [1.5])
    for axis, (name, dropped) in zip(axes[:-1], patterns.items(), strict=True):
        axis.imshow(dropped, cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        axis.set_title(f'"{name}": {dropped.mean():.0%} dropped', fontsize=9)
        axis.set_xlabel("key", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("query", fontsize=8)
    for (name, ratios), marker, colour in zip(
        schedules.items(), "ovs", ("#0072B2", "#D55E00", "#009E73"), strict=True
    ):
        axes[-1].plot(range(1, len(ratios) + 1), ratios, marker=marker, markersize=4, color=colour, label=name)
    axes[-1].set_title("drop ratio by schedule", fontsize=9)
    axes[-1].set_xlabel("layer", fontsize=8)
    axes[-1].tick_params(labelsize=8)
    axes[-1].legend(fontsize=8)
    title = "Attention scores that DropKey masks before the softmax (dark): one head, one training step"
    figure.suptitle(title, fontsize=10)
    return figure


def attention_costs(rows: Sequence[Mapping[str, str]], *, title: str) -> Figure:
    """Time and peak memory of attention against the number of tokens, both axes logarithmic, a line for each variant.

    A regulariser has one colour, a backend one marker and line style.

    Long sequences are measured with fewer images and heads, so both are shown for one head of one image.

    Args:
        rows: Of one device and dtype, as `scripts/benchmark_attention.py` writes them: `backend`, `regulariser`,
            `tokens`, `batch`, `heads`, `metric` ("time" in ms or "peak memory" in MiB, others are ignored), `value`
            and the quartiles.
        title: Model and data.

    Raises:
        ValueError: A variant lacks rows of one of the metrics, or the rows are of several devices or dtypes.
    """
    kinds = sorted({(row["device"], row["dtype"]) for row in rows})
    if len(kinds) != 1:
        raise ValueError(f"the rows are of {kinds}; pass rows of one device and dtype")
    panels = {"time": "forward and backward, ms", "peak memory": "peak memory, MiB"}
    columns = ("value", "first_quartile", "third_quartile")
    found = [row for row in rows if row["metric"] in panels]
    if not found:
        raise ValueError(f"no row has one of the metrics {', '.join(panels)}; measure them first")
    variants = list(dict.fromkeys((row["backend"], row["regulariser"]) for row in found))
    backends, regularisers = (list(dict.fromkeys(names)) for names in zip(*variants, strict=True))
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for backend, regulariser in variants:
            points = sorted(
                (int(row["tokens"]), *(float(row[name]) / int(row["batch"]) / int(row["heads"]) for name in columns))
                for row in found
                if (row["backend"], row["regulariser"], row["metric"]) == (backend, regulariser, metric)
            )
            if not points:
                raise ValueError(f"{backend} with {regulariser} has no row of {metric}; measure it first")
            tokens, middle, low, high = zip(*points, strict=True)
            color = LINE_COLORS[regularisers.index(regulariser) % len(LINE_COLORS)]
            place = backends.index(backend)
            style = {"marker": MARKERS[place % len(MARKERS)], "ls": LINE_STYLES[place % len(LINE_STYLES)]}
            axis.plot(tokens, middle, color=color, label=f"{backend}, {regulariser}", ms=4, **style)
            axis.fill_between(tokens, low, high, color=color, alpha=0.2, lw=0)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}, for one head of one image")
        axis.grid(visible=True, which="major", alpha=0.3)
        ticks = sorted({int(row["tokens"]) for row in found})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def __getattr__(name: str) -> Any:
    """What version 0.1 had here, with a DeprecationWarning."""
    return forward("plots", name)
