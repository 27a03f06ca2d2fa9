"""A page of HTML that needs nothing but itself: no network, no scripts, the system's fonts, images inside.

Made for a phone first: one column, tables that scroll on their own, figures that are readable at 360 pixels.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any


STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
p { margin: .5rem 0; } .note { color: #555; font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
.tile { flex: 1 1 8.5rem; border: 1px solid #ccc; border-radius: .4rem; padding: .5rem .75rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: #555; font-size: .85rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; } figure.chart { flex: 0 1 30rem; max-width: 30rem; } figure.wide { flex: 1 1 100%; }
figure img { max-width: 100%; height: auto; } figcaption { font-size: .85rem; color: #333; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; }
.pictures img { width: 100%; image-rendering: auto; } .pictures img.small { image-rendering: pixelated; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top; overflow-wrap: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; background: #f4f4f4; padding: .5rem; font-size: .85rem; white-space: pre-wrap; }
nav a { margin-right: .75rem; } a { color: #0057a0; } summary { cursor: pointer; }
"""
# a browser that reads this loads nothing and runs nothing
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# images below this side are shown with hard pixels
SMALL = 64
MIMES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `body` is HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def document(title: str, lead: str, sections: Iterable[Section]) -> str:
    """The whole page; `lead` is HTML under the title."""
    shown = list(sections)
    links = " ".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in shown)
    parts = "\n".join(
        f'<section id="{part.anchor}">\n<h2>{escape(part.title)}</h2>\n{part.body}\n</section>' for part in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n<nav>{links}</nav>\n{parts}\n</body>\n</html>\n"
    )


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{escape(text)}</p>"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Large values, each over its name."""
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values
    )
    return f'<div class="tiles">{shown}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where it is wide; numbers stand to the right."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.4g}</td>'
        )
    return f"<td>{escape(str(value))}</td>"


def details(summary: str, body: str) -> str:
    """A part that is folded until it is opened; `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def chart(figure: Any, alt: str, *, wide: bool = False) -> str:
    """A matplotlib figure; `alt` says in words what it shows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return _figure(_data_uri(buffer.getvalue(), "image/png"), alt, "", "wide" if wide else "chart")


def picture_file(file: Path, caption: str) -> str:
    """An image file in the width of the page."""
    return _figure(_data_uri(file.read_bytes(), MIMES[file.suffix.lower()]), caption, caption, "wide")


def _figure(source: str, alt: str, caption: str, kind: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}"><img src="{source}" alt="{escape(alt)}">{below}</figure>'


def pictures(files: Sequence[tuple[Path, int, str]]) -> str:
    """Small images side by side: file, longer side in pixels, caption."""
    shown = []
    for file, side, caption in files:
        kind = ' class="small"' if side < SMALL else ""
        source = _data_uri(file.read_bytes(), MIMES[file.suffix.lower()])
        shown.append(
            f'<figure><img{kind} src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        )
    return f'<div class="pictures">{"".join(shown)}</div>'


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
