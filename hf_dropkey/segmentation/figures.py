"""Images with annotated and predicted classes, and how uncertain each pixel is."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..extras import needed


with needed("plots"):
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch


IGNORED_COLOR = (1.0, 1.0, 1.0)
NAMES_SHOWN = 24


@dataclass(frozen=True)
class Segmented:
    """An image with what is drawn of it.

    Attributes:
        image: RGB.
        truth: Class numbers `[height, width]`, or None without an annotation.
        predicted: Class numbers `[height, width]`.
        uncertainty: Entropy of the mean prediction in nats, `[height, width]`; None without DropKey.
    """

    image: Image.Image
    truth: NDArray[np.int64] | None
    predicted: NDArray[np.int64]
    uncertainty: NDArray[np.float64] | None


def class_colors(classes: int) -> NDArray[np.float64]:
    """A colour for each class, `[classes, 3]` in [0, 1]; they repeat after twenty."""
    palette = matplotlib.colormaps["tab10" if classes <= 10 else "tab20"]
    return np.array([palette(number % palette.N)[:3] for number in range(classes)])


def segmentations(examples: Sequence[Segmented], names: Sequence[str], *, title: str, ignore_index: int) -> Figure:
    """A row for each image: it, its annotation, the prediction, and the uncertainty, as far as there are these.

    Annotation and prediction are in the colours of the legend, pixels without a class white. All maps of uncertainty
    have one scale, from 0 to the largest value of the figure.

    Raises:
        ValueError: There are no examples.
    """
    if not examples:
        raise ValueError("there are no images to draw; give at least one")
    with_truth = any(one.truth is not None for one in examples)
    certain = [one.uncertainty for one in examples if one.uncertainty is not None]
    heads = ["image", *(["annotated"] if with_truth else []), "predicted", *(["entropy, nats"] if certain else [])]
    figure = Figure(figsize=(2.3 * len(heads) + 1.9, 2.25 * len(examples) + 0.9), layout="constrained")
    axes = figure.subplots(len(examples), len(heads), squeeze=False)
    colors = ListedColormap([*class_colors(len(names)), IGNORED_COLOR])
    largest = max((float(one.max()) for one in certain), default=1.0) or 1.0
    drawn = None
    for row, one in zip(axes, examples, strict=True):
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].imshow(one.image)
        maps = [one.truth, one.predicted] if with_truth else [one.predicted]
        for axis, values in zip(row[1:], maps, strict=False):
            if values is not None:
                shown = np.where(values == ignore_index, len(names), values)
                axis.imshow(shown, cmap=colors, vmin=-0.5, vmax=len(names) + 0.5, interpolation="nearest")
        if one.uncertainty is not None:
            drawn = row[-1].imshow(one.uncertainty, cmap="magma", vmin=0, vmax=largest)
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=10)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes[:, -1].tolist(), fraction=0.06, pad=0.03)
    present = sorted(
        {
            int(number)
            for one in examples
            for part in (one.truth, one.predicted)
            if part is not None
            for number in np.unique(part)
        }
        - {ignore_index}
    )
    handles = [Patch(color=colors(number), label=names[number]) for number in present[:NAMES_SHOWN]]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle(textwrap.fill(title, max(30, int(10 * figure.get_figwidth()))), fontsize=11)
    return figure
