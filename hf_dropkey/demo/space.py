"""Writes the folder of a Space with the examples of the page: `hf-dropkey demo MODEL --space_folder OUT`."""

import io
from pathlib import Path

from ..hub.space_folder import write_space
from .examples import FROM_DIGITS, FROM_FILES, FROM_PHOTOGRAPHS, Example, find_examples, origin_of
from .opening import kind_of


def space_of(model: Path, out: Path, *, images: Path | None = None, package: str | None = None) -> list[Path]:
    """Writes the folder of a Space that shows a model; returns its files.

    Args:
        model: A saved model.
        out: New or empty.
        images: Folder of example images, which will be public; default: as for the page.
        package: The line that installs this package, pinned.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: As `write_space`, `kind_of` and `find_examples`.
    """
    kind_of(model)
    found = find_examples([model], images)
    named = {"digits": FROM_DIGITS, "photographs": FROM_PHOTOGRAPHS}
    origin = named.get(str(origin_of([model], images)), FROM_FILES)
    pictures = {f"{number:02}.png": _png(example) for number, example in enumerate(found, 1)}
    return write_space(model, out, pictures, title=f"{model.resolve().name}, seen", origin=origin, package=package)


def _png(example: Example) -> bytes:
    content = io.BytesIO()
    example.image.save(content, "PNG")
    return content.getvalue()
