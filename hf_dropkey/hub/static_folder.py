"""The folder of a page that computes in the browser alone, which is a static Space too: what it holds, and whether it still does.

index.html, style.css, *.js     the page, from hf_dropkey/browser/
ort/                            onnxruntime-web, one pinned release
model_monte_carlo.onnx          the graph that drops keys
settings.json                   how images are prepared, classes, examples
examples/                       pictures
README.md                       the settings of the Space
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# huggingface_hub and Transformers require it
import yaml  # type: ignore[import-untyped]

from ..version import __version__
from .cards import README
from .contents import Entry, digest_of, parsed, read_bytes
from .space_folder import EXAMPLES, front_matter
from .web_runtime import PACKAGE, SHA256, VERSION


# the page's files, as they lie in the package
PAGE = Path(__file__).resolve().parents[1] / "browser"
INDEX = "index.html"
PAGE_FILES = (
    INDEX,
    "style.css",
    "page.js",
    "worker.js",
    "certainty.js",
    "picture_file.js",
    "preparing.js",
    "resample.js",
)
SETTINGS_FILE, GRAPH = "settings.json", "model_monte_carlo.onnx"
SPACE_SETTINGS = {"sdk": "static", "app_file": INDEX}
CARD = """# {title}

How sure a vision transformer is, computed in the browser alone: predictions over random masks of DropKey, by
[hf_dropkey](https://arxiv.org/abs/2208.02646). A picture does not leave the machine of whoever looks at it.

Any web server shows the page, such as `python -m http.server --bind 127.0.0.1 --directory .`; opened as a file it does not
run. `ort/` is {package} {version} (MIT, see `ort/LICENSE`).

{examples}
"""


def page_contents() -> dict[str, bytes]:
    """The files of the page, by name."""
    return {name: (PAGE / name).read_bytes() for name in PAGE_FILES}


def static_card(title: str, origin: str, licence: str | None) -> str:
    """README.md with the settings of a static Space.

    Args:
        title: Of the page.
        origin: Where the examples are from, one sentence.
        licence: Of the model, None where it is not known.
    """
    settings: dict[str, Any] = {"title": title, "emoji": "🔑", "colorFrom": "blue", "colorTo": "yellow"}
    settings |= {**SPACE_SETTINGS, "pinned": False, "tags": ["dropkey"]} | ({"license": licence} if licence else {})
    front = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{CARD.format(title=title, package=PACKAGE, version=VERSION, examples=origin)}"


def is_static_folder(names: list[str]) -> bool:
    """Whether these are the files of a page that computes in the browser, not of a model."""
    return {INDEX, SETTINGS_FILE, "worker.js"} <= set(names) and "config.json" not in names


def known_files(files: Mapping[str, Entry]) -> set[str]:
    """The files of onnxruntime-web that are the pinned ones, to the byte."""
    return {name for name, digest in SHA256.items() if name in files and digest_of(files[name]) == digest}


def static_problems(files: Mapping[str, Entry]) -> Iterator[str]:
    """What is wrong with the files of a page beside its examples, one sentence each."""
    for name, content in page_contents().items():
        if name not in files:
            yield f"{name} is not there"
        elif read_bytes(files[name]) != content:
            yield f"{name} is not that of hf_dropkey {__version__}, and it is the code that a browser runs"
    for name in sorted(set(SHA256) - known_files(files)):
        what = f"is not that of {PACKAGE} {VERSION}" if name in files else "is not there"
        yield f"{name} {what}"
    yield from _settings_problems(files)
    card = read_bytes(files[README]).decode("utf-8", "replace") if README in files else ""
    found = front_matter(card)
    for name, expected in SPACE_SETTINGS.items():
        if found.get(name) != expected:
            yield f"{README} has {name} {found.get(name)!r}, where a static Space of hf_dropkey {__version__} has {expected!r}"


def _settings_problems(files: Mapping[str, Entry]) -> Iterator[str]:
    try:
        found = parsed(read_bytes(files[SETTINGS_FILE]), SETTINGS_FILE)
        graph, examples = found["graph"], [str(example["file"]) for example in found["examples"]]
        named, digest = graph["file"], graph["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        yield f"{SETTINGS_FILE} is not that of a page ({type(error).__name__}: {error})"
        return
    if GRAPH not in files:
        yield f"{GRAPH} is not there"
    elif named != GRAPH or digest != digest_of(files[GRAPH]):
        yield f"{GRAPH} is not the graph that {SETTINGS_FILE} was written with"
    gone = [name for name in examples if name not in files or not name.startswith(f"{EXAMPLES}/")]
    if gone:
        yield f"{SETTINGS_FILE} names {json.dumps(gone[0])}, which is not one of the examples"
