"""Figures of attention, from data in the arguments: nothing here loads a model or computes attention.

Each figure can be read without its caption: it has a title, axis labels with units, a legend, and markers beside
colours. The colours are those of `plots`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..extras import needed
from ..intervals import interval
from ..plots import RIGHT_COLOR, WRONG_COLOR


with needed("plots"):
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patheffects import withStroke


PLAIN_COLOR, DROPKEY_COLOR, REFERENCE_COLOR = "#0072B2", "#D55E00", "#4D4D4D"
# largest opacity of a map over its image
COVER = 0.75
# below, a mutual information is shown as nothing but small
SMALL_NATS = 0.0001
ORDER = "attention module, in order of execution"


def entropy_and_distance(
    names: Sequence[str],
    entropies: Mapping[str, Sequence[NDArray[np.floating]]],
    distances: Mapping[str, Sequence[NDArray[np.floating]]],
    *,
    uniform_entropies: Sequence[float],
    uniform_distances: Sequence[float],
    title: str,
) -> Figure:
    """Entropy and mean distance of attention, a point for each head, a line through the means of the layers.

    Args:
        names: For each layer, a short name.
        entropies: For at most two conditions, such as "plain attention" and "with DropKey": for each layer the
            entropies of its heads in nats, `[H]`.
        distances: The same in patches of the layer's own grid; NaN where a layer has none.
        uniform_entropies: For each layer, the entropy of uniform attention, in nats.
        uniform_distances: For each layer, the distance of uniform attention, in patches.
        title: Model and data.

    Raises:
        ValueError: There are no layers, or lists of different lengths.
    """
    lengths = {len(layers) for panel in (entropies, distances) for layers in panel.values()}
    lengths |= {len(names), len(uniform_entropies), len(uniform_distances)}
    if len(lengths) != 1 or lengths == {0} or not 1 <= len(entropies) <= 2 or list(entropies) != list(distances):
        raise ValueError(
            f"lists of {sorted(lengths)} layers for {list(entropies)} and {list(distances)}; pass the same one or two "
            "conditions in both, with one entry per layer, and at least one layer"
        )
    # names of many layers are vertical
    figure = Figure(figsize=(10, 4.2 if len(names) <= 6 else 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axis, conditions, uniform, label in (
        (panels[0], entropies, uniform_entropies, "entropy of attention over all tokens, nats"),
        (panels[1], distances, uniform_distances, "mean distance between patches, in patches"),
    ):
        depth = np.arange(1, 1 + len(uniform))
        axis.plot(depth, uniform, color=REFERENCE_COLOR, ls=":", marker="_", label="uniform attention")
        # side by side, so that no condition hides another
        shifts = [0.0] if len(conditions) == 1 else [-0.12, 0.12]
        styles = zip(shifts, (PLAIN_COLOR, DROPKEY_COLOR), "os", strict=False)
        for (name, layers), (shift, color, marker) in zip(conditions.items(), styles, strict=False):
            for place, heads in zip(depth, layers, strict=True):
                axis.plot(np.full(len(heads), place + shift), heads, marker, color=color, ms=4, alpha=0.45, mew=0)
            means = [np.mean(heads) for heads in layers]
            axis.plot(
                depth + shift, means, color=color, marker=marker, mec="black", ms=6, label=f"{name}, mean of heads"
            )
        axis.set(xlabel=f"{ORDER} (small points: heads)", ylabel=label)
        axis.margins(y=0.08)
        _name_layers(axis, names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    _head(figure, title)
    return figure


def _head(figure: Figure, title: str) -> None:
    """A title in lines that fit the figure."""
    figure.suptitle(textwrap.fill(title, max(20, int(11 * figure.get_figwidth()))), fontsize=11)


def _name_layers(axis: Axes, names: Sequence[str]) -> None:
    axis.set_xlim(0.5, len(names) + 0.5)
    axis.set_xticks(range(1, 1 + len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axis.grid(visible=True, axis="y", alpha=0.3)


def maps_over_images(
    images: Sequence[Image.Image],
    maps: Mapping[str, NDArray[np.floating]],
    *,
    title: str,
    attends: str,
) -> Figure:
    """A row for each image: the image itself, then each map over it in colour, patch by patch.

    Each tile has its own logarithmic scale of the ratio to uniform attention. Uniform attention is transparent; patches
    with more are tinted orange, those with less are darkened; the patch furthest from uniform attention has the most
    colour. The largest ratio stands in the tile. In a tile without a ratio of 2 or 1/2, nothing has all of its colour.

    Args:
        images: B images of any size, as the model saw them.
        maps: For the title of each column, attention on patches `[B, rows, columns]`, above 0 somewhere in each image.
        title: Model and data.
        attends: The query, for the label of the scale, such as "class token".

    Raises:
        ValueError: No images or maps, different lengths, or maps that are not finite or are 0 everywhere.
    """
    lengths = {name: len(values) for name, values in maps.items()}
    if not images or not maps or set(lengths.values()) != {len(images)}:
        raise ValueError(
            f"{len(images)} images and maps of {lengths}; pass one map per image and column, and at least one"
        )
    relative = {name: _relative(values, name) for name, values in maps.items()}
    figure = Figure(figsize=(1.45 * (1 + len(maps)) + 1.4, 1.5 * len(images) + 0.9), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(maps), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, image in enumerate(images):
        frame = (0, image.width, image.height, 0)
        for column, name in enumerate(["image", *maps]):
            axis = axes[row, column]
            axis.imshow(image.convert("RGB"), extent=frame)
            if column:
                _tint(axis, relative[name][row], frame)
            if row == 0:
                axis.set_title(name, fontsize=9)
    _head(figure, title)
    # as on a grey image
    shades = tints()
    shades = shades[:, 3:] * shades[:, :3] + (1 - shades[:, 3:]) * 0.5
    colors = ScalarMappable(Normalize(-1, 1), ListedColormap(shades))
    bar = figure.colorbar(colors, ax=list(axes.flat), shrink=min(1.0, 3 / len(images)), aspect=25)
    bar.set_ticks([-1, 0, 1], labels=["least", "uniform", "most"])
    bar.set_label(f"attention of the {attends} on a patch\n(each tile on its own logarithmic scale)", fontsize=9)
    return figure


def _tint(axis: Axes, relative: NDArray[np.floating], frame: tuple[int, int, int, int]) -> None:
    """Lays a map, as multiples of uniform attention, over an image, and writes its largest value."""
    most = max(2.0, float(relative.max()))
    # a patch without attention is as dark as one that is as far below as the largest is above
    axis.imshow(
        np.log(relative.clip(1 / most)) / np.log(most),
        cmap=ListedColormap(tints()),
        norm=Normalize(-1, 1),
        extent=frame,
        interpolation="nearest",
    )
    # white on a dark edge shows on any image
    text = axis.text(0.03, 0.03, f"{relative.max():.3g}x", transform=axis.transAxes, fontsize=7, color="white")
    text.set_path_effects([withStroke(linewidth=1.8, foreground="black")])


def tints() -> NDArray[np.float64]:
    """Colours from less to more attention than uniform, `[256, 4]`: dark blue, transparent, orange, light yellow."""
    place = np.linspace(-1, 1, 256)
    less, more, most = np.array([0.02, 0.03, 0.15]), np.array([1.0, 0.45, 0.0]), np.array([1.0, 0.95, 0.45])
    above = more + np.clip(place, 0, 1)[:, None] ** 2 * (most - more)
    colors = np.where(place[:, None] < 0, less, above)
    return np.concatenate([colors, COVER * np.abs(place)[:, None] ** 0.8], axis=1)


def _relative(values: NDArray[np.floating], name: str) -> NDArray[np.floating]:
    """Maps as multiples of their mean."""
    means = values.mean(axis=(1, 2), keepdims=True)
    if not np.isfinite(values).all() or (means <= 0).any():
        raise ValueError(
            f"the maps {name!r} hold values that are not finite, or an image without attention; remove them"
        )
    relative: NDArray[np.floating] = values / means
    return relative


def drop_fractions(
    names: Sequence[str],
    ratios: Sequence[float],
    fractions: Sequence[Sequence[float]],
    *,
    title: str,
) -> Figure:
    """The configured drop ratio of each attention, and the measured fraction of its weights that were dropped.

    Args:
        names: L short names of attentions, in order of execution.
        ratios: L drop ratios, [0, 1).
        fractions: L sequences of measured fractions, one for each pass; empty where nothing was measured.
        title: Model and data.

    Raises:
        ValueError: No attention, different lengths, or a fraction that is NaN.
    """
    if not names or not len(names) == len(ratios) == len(fractions):
        raise ValueError(
            f"{len(names)} names, {len(ratios)} ratios and {len(fractions)} lists of fractions; pass one of each per "
            "attention, and at least one"
        )
    if np.isnan([*ratios, *(value for values in fractions for value in values)]).any():
        raise ValueError("a ratio or a measured fraction is NaN; remove that attention")
    depth = np.arange(1, 1 + len(names))
    figure = Figure(figsize=(max(7.0, 0.55 * len(names) + 2.5), 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    upper.plot(depth, ratios, color=PLAIN_COLOR, marker="_", ms=16, mew=2.5, ls=":", label="configured")
    lower.axhline(0, color=PLAIN_COLOR, ls=":")
    measured = [place for place in range(len(names)) if len(fractions[place])]
    if measured:
        means = np.array([np.mean(fractions[place]) for place in measured])
        widths = [interval(fractions[place]).half for place in measured]
        passes = min(len(fractions[place]) for place in measured)
        style = {"color": DROPKEY_COLOR, "fmt": "o", "ms": 4, "capsize": 4}
        label = f"measured: mean and 95 % interval of {passes} passes"
        upper.errorbar(depth[measured], means, yerr=widths, label=label, **style)
        lower.errorbar(depth[measured], means - np.asarray(ratios)[measured], yerr=widths, **style)
    missing = [place for place in range(len(names)) if not len(fractions[place])]
    if missing:
        upper.plot(depth[missing], np.asarray(ratios)[missing], "x", color=REFERENCE_COLOR, label="not measured")
    upper.set(ylabel="fraction of attention weights\ndropped in training")
    lower.set(ylabel="measured minus configured", xlabel=ORDER)
    for axis in (upper, lower):
        _name_layers(axis, names)
    upper.legend(fontsize=9)
    _head(figure, title)
    return figure


def uncertain_images(
    images: Sequence[Image.Image],
    uncertainty: NDArray[np.floating],
    confidence: NDArray[np.floating],
    predicted: Sequence[str],
    truth: Sequence[str] | None = None,
    *,
    kept: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    title: str,
    columns: int = 8,
    most: int = 24,
) -> Figure:
    """Images from the most uncertain to the most certain, and accuracy when the most uncertain ones are rejected.

    Of more than `most` images, shows the `most // 2` most uncertain and the `most // 2` most certain ones.

    Args:
        images: B images of any size.
        uncertainty: Mutual information in nats, `[B]`, not NaN.
        confidence: Mean probability of the predicted class, `[B]`.
        predicted: B class names.
        truth: B class names, or None where they are not known.
        kept: Fractions of images kept and the accuracy on them (`analysis.accuracy_when_kept`), for a panel below.
        title: Model and data.
        columns: Images side by side.
        most: Images shown, at least 2.

    Raises:
        ValueError: No images, different lengths, a NaN, or `most` below 2.
    """
    count = len(images)
    lengths = [len(uncertainty), len(confidence), len(predicted), *([] if truth is None else [len(truth)])]
    if count == 0 or set(lengths) != {count}:
        raise ValueError(
            f"{count} images, and {lengths} uncertainties, confidences, predictions and true classes; pass one of each "
            "per image, and at least one image"
        )
    if most < 2:
        raise ValueError(f"`most` must be at least 2, one image for each end, got {most}")
    if np.isnan(uncertainty).any() or np.isnan(confidence).any():
        raise ValueError("an uncertainty or a confidence is NaN; remove that image")
    order = np.argsort(-np.asarray(uncertainty), kind="stable")
    shown = order if count <= most else np.concatenate((order[: most // 2], order[-(most // 2) :]))
    columns = min(columns, len(shown))
    blocks = -(-len(shown) // columns)
    panel = 3.4 if kept is not None else 0.0
    figure = Figure(figsize=(max(1.35 * columns, 5.0), 1.85 * blocks + 0.7 + panel), layout="constrained")
    _head(figure, title)
    upper: SubFigure | Figure = figure
    if kept is not None:
        parts: Any = figure.subfigures(2, 1, height_ratios=[1.85 * blocks, panel])
        upper = parts[0]
        _accuracy_panel(parts[1].subplots(), *kept)
    if len(shown) < count:
        upper.supxlabel(
            f"{len(shown)} of {count} images: the {most // 2} most uncertain, then the {most // 2} most certain",
            fontsize=9,
        )
    axes = upper.subplots(blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, number in zip(axes.flat, shown, strict=False):
        axis.imshow(images[number].convert("RGB"))
        right = truth is None or predicted[number] == truth[number]
        verdict = "" if truth is None else "\nright" if right else f"\nwrong, is {_shortened(truth[number], 12)}"
        axis.set_title(
            f"{_nats(uncertainty[number])}\n{_shortened(predicted[number], 14)} ({confidence[number]:.0%}){verdict}",
            color="black" if truth is None else RIGHT_COLOR if right else WRONG_COLOR,
            fontsize=8,
            fontweight="normal" if right else "bold",
        )
    return figure


def _nats(value: float) -> str:
    """A mutual information with two digits that say something."""
    if value < SMALL_NATS:
        return f"< {SMALL_NATS} nats"
    digits = max(2, 1 - int(np.floor(np.log10(value))))
    return f"{value:.{digits}f} nats"


def _shortened(name: str, most: int) -> str:
    """A name short enough not to overlap that of the next image."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _accuracy_panel(axis: Axes, fractions: NDArray[np.floating], accuracies: NDArray[np.floating]) -> None:
    """Accuracy against the fraction kept, with the curves of random and of perfect rejection."""
    if len(fractions) == 0 or len(fractions) != len(accuracies):
        raise ValueError(f"{len(fractions)} fractions kept and {len(accuracies)} accuracies; pass one per fraction")
    overall = float(accuracies[-1])
    grid = np.linspace(fractions[0], 1, 200)
    axis.plot(fractions, accuracies, color=PLAIN_COLOR, marker="o", ms=2.5, label="most uncertain rejected first")
    axis.axhline(overall, color=DROPKEY_COLOR, ls="--", label=f"rejected at random: {overall:.1%}")
    axis.plot(
        grid, np.minimum(1, overall / grid), color=REFERENCE_COLOR, ls=":", label="best possible: wrong ones first"
    )
    low = min(overall, float(np.min(accuracies)))
    axis.set(xlabel="fraction of images kept", ylabel="accuracy on the images kept", xlim=(0, 1))
    axis.set_ylim(max(0.0, low - 0.1 * (1.02 - low)), 1 + 0.05 * (1.02 - low))
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=8, loc="best")
