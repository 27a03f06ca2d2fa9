"""Pictures and HTML of answers: what is drawn is in the arguments, and every picture is inside of the page."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..inspection.figures import tints
from ..plots import RIGHT_COLOR, WRONG_COLOR
from .answers import Answer, LostKeys


# sides in pixels of the large pictures and of those in a strip
LARGE, SMALL = 448, 144
# of a lost key, and of the rest of the picture below
LOST_COLOR = (213, 94, 0)
CLASSES_SHOWN = 3
STYLE = """
.dk { font-family: system-ui, sans-serif; color: var(--body-text-color, inherit); line-height: 1.4; }
.dk .answer { font-size: 1.5rem; font-weight: 650; margin: .1rem 0 .5rem; overflow-wrap: anywhere; }
.dk .small { font-size: .9rem; opacity: .85; margin: .25rem 0; }
.dk .heading { font-size: 1.05rem; font-weight: 650; margin: .9rem 0 .3rem; }
.dk .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: .7rem; max-width: 600px; }
.dk .alone { max-width: 640px; }
.dk figure { margin: 0; }
.dk figcaption { font-size: .85rem; opacity: .85; }
.dk img { width: 100%; height: auto; display: block; border-radius: 6px; }
.dk .strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(68px, 104px)); gap: .5rem; }
.dk .strip figcaption { font-size: .78rem; line-height: 1.25; margin-top: .15rem; }
.dk .strip .bar { height: 5px; border-radius: 3px; background: rgba(128,128,128,.25); margin-top: .25rem; }
.dk .strip .bar div { height: 5px; border-radius: 3px; background: #D55E00; }
.dk .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 1rem; }
.dk .cards .differs { outline: 3px solid #D55E00; outline-offset: 3px; border-radius: 6px; }
.dk svg { width: 100%; max-width: 520px; height: auto; display: block; }
.dk pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; border-radius: 6px;
          background: rgba(128,128,128,.15); font-family: ui-monospace, monospace; font-size: .88rem; }
.dk .legend { height: 10px; border-radius: 5px; max-width: 330px; margin-top: .6rem; }
.dk .problem { border-left: 4px solid #D55E00; padding: .4rem .7rem; background: rgba(213,94,0,.12); }
.dk .remark { border-left: 4px solid #0072B2; padding: .3rem .7rem; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)) !important; }
#examples .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
#examples .gallery-container { height: auto !important; }
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container .gap { gap: 10px; }
"""


# --- pictures ---------------------------------------------------------------------------------------------------------


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """An image in colour whose longer side is `side`; the pixels of a tiny one stay squares."""
    image = image.convert("RGB")
    factor = side / max(image.size)
    size = tuple(max(1, round(length * factor)) for length in image.size)
    tiny = max(image.size) < side / 4
    return image.resize((size[0], size[1]), Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS)


def over_image(image: Image.Image, values: NDArray[np.floating], side: int = LARGE) -> Image.Image:
    """A map `[rows, columns]` over an image: blue where a patch gets less than uniform attention, orange where more.

    The scale is logarithmic, as in `maps_over_images`.
    """
    relative = values / values.mean()
    most = max(2.0, float(relative.max()))
    place = np.log(relative.clip(1 / most)) / np.log(most)
    colors = tints()[((place + 1) / 2 * 255).round().astype(int)]
    below = enlarged(image, side)
    tiles = Image.fromarray((colors * 255).round().astype(np.uint8), "RGBA").resize(
        below.size, Image.Resampling.NEAREST
    )
    return Image.alpha_composite(below.convert("RGBA"), tiles).convert("RGB")


def with_lost_keys(image: Image.Image, lost: NDArray[np.bool_], side: int = SMALL) -> Image.Image:
    """An image in pale grey, with each patch that is not a key any more in orange."""
    grey = np.asarray(enlarged(image, side).convert("L"), dtype=np.float32)
    below = np.repeat((0.55 * grey + 0.4 * 255)[:, :, None], 3, axis=2)
    mask = Image.fromarray(lost.astype(np.uint8) * 255).resize(
        (grey.shape[1], grey.shape[0]), Image.Resampling.NEAREST
    )
    below[np.asarray(mask) > 127] = LOST_COLOR
    return Image.fromarray(below.round().clip(0, 255).astype(np.uint8))


def picture(image: Image.Image, alt: str) -> str:
    """An `<img>` that holds its picture."""
    content = io.BytesIO()
    # few colours in large squares are smaller, and exact, as PNG
    few = image.getcolors(512) is not None
    image.save(content, "PNG") if few else image.save(content, "JPEG", quality=88)
    kind = "png" if few else "jpeg"
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt, quote=True)}" width="{image.width}" height="{image.height}">'


# --- parts of the page ------------------------------------------------------------------------------------------------


def block(*parts: str) -> str:
    """Parts in the page's style."""
    return f'<div class="dk">{"".join(parts)}</div>'


def sentence(text: str) -> str:
    """The answer in words."""
    return f'<p class="answer" role="status">{escape(text)}</p>'


def note(text: str) -> str:
    """A smaller sentence."""
    return f'<p class="small">{escape(text)}</p>'


def heading(text: str) -> str:
    """The heading of a part."""
    return f'<p class="heading">{escape(text)}</p>'


def message(text: str, *, problem: bool) -> str:
    """What there is to say about an upload; nothing for an empty text."""
    if not text:
        return ""
    return block(f'<p class="{"problem" if problem else "remark"}" role="alert">{escape(text)}</p>')


def captioned(image: str, *lines: str, extra: str = "", differs: bool = False) -> str:
    """A picture with lines below it."""
    words = "<br>".join(map(escape, lines))
    kind = ' class="differs"' if differs else ""
    return f"<figure{kind}>{image}{extra}<figcaption>{words}</figcaption></figure>"


def legend() -> str:
    """The scale of a rollout."""
    shades = tints()[::16]
    colors = [
        f"rgb({', '.join(str(round(255 * (alpha * part + (1 - alpha) * 0.6))) for part in shade)})"
        for *shade, alpha in shades
    ]
    return (
        f'<div class="legend" style="background: linear-gradient(to right, {", ".join(colors)})"></div>'
        '<p class="small">less attention than uniform &nbsp;·&nbsp; uniform &nbsp;·&nbsp; more</p>'
    )


def see(answer: Answer, words: str, *, image: str, remark: str | None = None) -> str:
    """The first view: the answer with a remark on it, where the model looks, what each layer loses."""
    parts = [sentence(words)] + ([] if remark is None else [note(remark)])
    if answer.rollout is None:
        parts += [captioned(picture(enlarged(answer.seen, LARGE), image), "the image as the model sees it")]
        parts += [note(f"Attention cannot be shown: {answer.unreadable}")]
        return block(*parts)
    grid = f"{answer.rollout.shape[0]} x {answer.rollout.shape[1]} patches"
    parts += [
        '<div class="pair">',
        captioned(picture(enlarged(answer.seen, LARGE), image), "the image as the model sees it"),
        captioned(
            picture(over_image(answer.seen, answer.rollout), f"attention rollout over {image}"),
            f"where it looks: attention rollout on {grid}",
        ),
        "</div>",
        legend(),
        heading(f"What the {answer.lost[0].query} loses in each layer, under the first mask"),
        '<div class="strip">',
        *(_layer(answer.seen, number, lost) for number, lost in enumerate(answer.lost, 1)),
        "</div>",
        note(
            "Orange patches are keys that the first head of the layer cannot attend to: DropKey masks their scores "
            "before the softmax. It does so in training; here it is on to see how sure the model is."
        ),
    ]
    return block(*parts)


def _layer(seen: Image.Image, number: int, lost: LostKeys) -> str:
    drawn = picture(with_lost_keys(seen, lost.lost), f"layer {number}: {lost.count} of {lost.keys} keys lost")
    bar = f'<div class="bar"><div style="width: {100 * lost.ratio:.0f}%"></div></div>'
    return captioned(
        drawn, f"layer {number}", f"ratio {100 * lost.ratio:.3g} %", f"{lost.count} of {lost.keys}", extra=bar
    )


def dots(answer: Answer) -> str:
    """A dot for the probability under each mask, a row for each of the likeliest classes, as SVG."""
    order = np.argsort(-answer.probabilities, kind="stable")[:CLASSES_SHOWN]
    row, top, left, right = 58, 6, 20, 340
    height = top + row * len(order) + 22
    parts = []
    for place, number in enumerate(order):
        line = top + row * place + 38
        color = RIGHT_COLOR if place == 0 else WRONG_COLOR
        mean = f"{100 * answer.probabilities[number]:.0f} % ± {100 * answer.std[number]:.0f}"
        name = answer.names[number] if len(answer.names[number]) <= 34 else f"{answer.names[number][:33]}…"
        parts.append(
            f'<text x="{left}" y="{line - 19}" font-size="12" font-weight="600" fill="currentColor">{escape(name)}</text>'
        )
        parts.append(
            f'<text x="{right}" y="{line - 19}" font-size="11" text-anchor="end" fill="currentColor">{mean}</text>'
        )
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{line}" y2="{line}" stroke="currentColor" stroke-opacity=".3"/>'
        )
        for mask, value in enumerate(answer.by_mask[:, number]):
            # three levels, so that equal values do not hide each other
            x, y = left + (right - left) * value, line - 7 + 7 * (mask % 3)
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="3.8" fill="{color}" fill-opacity=".55"/>')
    for percent in (0, 25, 50, 75, 100):
        x = left + (right - left) * percent / 100
        parts.append(
            f'<text x="{x}" y="{height - 6}" font-size="9.5" text-anchor="middle" fill="currentColor" fill-opacity=".8">{percent} %</text>'
        )
    words = f"probabilities of {', '.join(answer.names[number] for number in order)} under {len(answer.by_mask)} masks"
    return (
        f'<svg viewBox="0 0 360 {height}" role="img" aria-label="{escape(words, quote=True)}">{"".join(parts)}</svg>'
    )


def cards(items: Sequence[tuple[Image.Image, Sequence[str], bool]]) -> str:
    """Pictures side by side, each with lines below it; the last entry marks one."""
    made = [
        captioned(picture(enlarged(image, SMALL), lines[0]), *lines, differs=differs)
        for image, lines, differs in items
    ]
    return f'<div class="cards">{"".join(made)}</div>'
