"""Images with their pairs: person and object boxes, a line between them, and the verbs in a list below."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..extras import needed
from ..plots import BOX_COLORS


with needed("plots"):
    import matplotlib.patheffects as effects
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


# more would not fit below an image
LARGEST_LIST = 8
# in letters; a longer line would run into the next image
LONGEST_LINE = 64
OUTLINE = [effects.withStroke(linewidth=3, foreground="black")]


def pair_text(pair: Mapping[str, Any]) -> str:
    """A pair in words: "hold 0.91, look_at 0.80: ball"; without numbers where verbs have no scores."""
    verbs = pair["verbs"]
    shown = [f"{name} {score:.2f}" for name, score in verbs.items()] if isinstance(verbs, Mapping) else list(verbs)
    return f"{', '.join(shown)}: {pair['object'] or 'no object'}"


def draw_pairs(axis: Axes, image: Image.Image, pairs: Sequence[Mapping[str, Any]], heading: str) -> None:
    """One image with its pairs, each in a colour and with a number, and their verbs below it.

    Args:
        axis: Where to draw.
        image: Of any size.
        pairs: As `DropKeyHoiForObjectDetection.post_process` returns them, the best first; `verbs` may be a list.
        heading: Above the image.
    """
    axis.imshow(image, cmap="gray", vmin=0, vmax=255)
    axis.set_axis_off()
    axis.set_title(heading, fontsize=8)
    lines = []
    for number, pair in enumerate(pairs[:LARGEST_LIST], 1):
        color = BOX_COLORS[(number - 1) % len(BOX_COLORS)]
        centers = []
        for name, style in (("person_box", "-"), ("object_box", "--")):
            if pair[name] is None:
                continue
            left, top, right, bottom = pair[name]
            # dark under light, so that the frame shows on any image
            for width, shade in ((2.6, "black"), (1.3, color)):
                frame = Rectangle((left, top), right - left, bottom - top, fill=False, lw=width, ec=shade, ls=style)
                axis.add_patch(frame)
            centers.append(((left + right) / 2, (top + bottom) / 2))
        if len(centers) == 2:
            xs, ys = zip(*centers, strict=True)
            axis.plot(xs, ys, "-o", color=color, lw=1.2, ms=2.5, path_effects=OUTLINE)
        # numbers of pairs that share a person stand side by side
        corner = (pair["person_box"][0] + (number - 1) * 0.05 * image.width, pair["person_box"][1])
        axis.text(*corner, str(number), fontsize=7, color=color, weight="bold", path_effects=OUTLINE, clip_on=True)
        lines.append((textwrap.shorten(f"{number} {pair_text(pair)}", LONGEST_LINE, placeholder=" ..."), color))
    # boxes at the border would widen the view
    axis.set_xlim(-0.5, image.width - 0.5)
    axis.set_ylim(image.height - 0.5, -0.5)
    if len(pairs) > LARGEST_LIST:
        lines.append((f"and {len(pairs) - LARGEST_LIST} more", "black"))
    for place, (line, color) in enumerate(lines):
        axis.text(
            *(0.0, -0.03 - 0.055 * place),
            line,
            transform=axis.transAxes,
            fontsize=6.5,
            va="top",
            bbox={"facecolor": color, "edgecolor": "none", "alpha": 0.35 if color != "black" else 0, "pad": 0.8},
        )


def interactions(
    images: Sequence[Image.Image],
    rows: Sequence[tuple[str, Sequence[Sequence[Mapping[str, Any]]]]],
    *,
    title: str,
    columns: int = 4,
) -> Figure:
    """Each image once for each row of pairs, such as those annotated and those predicted.

    Args:
        images: B images of any size.
        rows: A name, and the pairs of each image.
        title: What the reader sees, with where it comes from.
        columns: Images side by side.

    Raises:
        ValueError: There are no images, or a row has another number of them.
    """
    count = len(images)
    if count == 0 or any(len(pairs) != count for _, pairs in rows):
        raise ValueError(
            f"{count} images and lists of pairs for {[len(pairs) for _, pairs in rows]}; give pairs for every image, "
            "and at least one image"
        )
    columns = min(columns, count)
    blocks = -(-count // columns)
    longest = max(min(len(pairs), LARGEST_LIST + 1) for _, lists in rows for pairs in lists)
    # a list below an image takes a twentieth of its height a line
    height = 3.0 * (1.1 + 0.06 * longest)
    figure = Figure(figsize=(3 * columns + 0.2, height * blocks * len(rows) + 0.5))
    axes = figure.subplots(blocks * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, image in enumerate(images):
        block, column = divmod(number, columns)
        for place, (name, lists) in enumerate(rows):
            pairs = lists[number]
            draw_pairs(axes[block * len(rows) + place, column], image, pairs, f"{name}: {len(pairs)}")
    figure.suptitle(title, fontsize=10, y=0.995)
    top = 1 - 0.35 / figure.get_figheight()
    gap = 0.14 + 0.07 * longest
    figure.subplots_adjust(
        left=0.01, right=0.99, top=top - 0.02, bottom=0.055 * longest / (len(axes) + 1) + 0.01, wspace=0.05, hspace=gap
    )
    return figure
