"""Images with annotated and predicted boxes."""

import textwrap
from collections.abc import Sequence

from PIL import Image

from ..extras import needed
from ..plots import BOX_COLORS


with needed("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


def detections(
    images: Sequence[Image.Image],
    truth: Sequence[Sequence[tuple[str, Sequence[float]]]],
    predictions: Sequence[Sequence[tuple[str, Sequence[float], float]]],
    *,
    title: str,
    columns: int = 4,
) -> Figure:
    """Each image twice: above with the boxes that were annotated, below with those that a model found and their scores.

    A class has one colour in the whole figure, and its name beside every box.

    Args:
        images: B images of any size.
        truth: For each image, the class name and box (x1, y1, x2, y2, in pixels) of each object.
        predictions: For each image, the same and the score, [0, 1], of each detection.
        title: What the reader sees, with where it comes from.
        columns: Images side by side.

    Raises:
        ValueError: There are no images, or the arguments are not of one length.
    """
    count = len(images)
    if count == 0 or not count == len(truth) == len(predictions):
        raise ValueError(
            f"{count} images, {len(truth)} lists of annotated boxes and {len(predictions)} of predicted ones; give one "
            "of each per image, and at least one image"
        )
    names = [box[0] for boxes in (*truth, *predictions) for box in boxes]
    colors = {name: BOX_COLORS[number % len(BOX_COLORS)] for number, name in enumerate(dict.fromkeys(names))}
    columns = min(columns, count)
    blocks = -(-count // columns)
    figure = Figure(figsize=(3 * columns + 0.2, 5 * blocks + 0.5), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, image in enumerate(images):
        upper, lower = axes[2 * (number // columns) : 2 * (number // columns) + 2, number % columns]
        upper.imshow(image, cmap="gray", vmin=0, vmax=255)
        lower.imshow(image, cmap="gray", vmin=0, vmax=255)
        upper.set_title(f"annotated: {len(truth[number])}", fontsize=9)
        lower.set_title(f"predicted: {len(predictions[number])}", fontsize=9)
        for name, box in truth[number]:
            draw_box(upper, box, name, colors[name])
        for name, box, score in predictions[number]:
            draw_box(lower, box, f"{name} {score:.2f}", colors[name])
    figure.suptitle(textwrap.fill(title, max(30, int(11 * figure.get_figwidth()))), fontsize=11)
    return figure


def detected(image: Image.Image, predictions: Sequence[tuple[str, Sequence[float], float]]) -> Figure:
    """One image with the boxes that a model found: class name, corners in pixels and score, [0, 1], of each."""
    # inches; the longer side fills a page's column
    longest = 7.0 / max(image.size)
    figure = Figure(figsize=(image.width * longest, image.height * longest))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.imshow(image, cmap="gray", vmin=0, vmax=255)
    names = list(dict.fromkeys(name for name, _, _ in predictions))
    for name, box, score in predictions:
        draw_box(axis, box, f"{name} {score:.2f}", BOX_COLORS[names.index(name) % len(BOX_COLORS)])
    # boxes at the border would widen the view
    axis.set_xlim(-0.5, image.width - 0.5)
    axis.set_ylim(image.height - 0.5, -0.5)
    return figure


def draw_box(axis: Axes, box: Sequence[float], text: str, color: str) -> None:
    """A box (x1, y1, x2, y2) with its name at the upper left corner."""
    left, upper, right, lower = box
    # dark under light, so that the frame shows on any image
    for width, shade in ((3.0, "black"), (1.5, color)):
        axis.add_patch(Rectangle((left, upper), right - left, lower - upper, fill=False, lw=width, ec=shade))
    background = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
    axis.text(left, upper, text, fontsize=6.5, color="black", va="bottom", bbox=background, clip_on=True)
