"""Writes the folder of a Space with the examples of the page: `hf-dropkey demo MODEL --space_folder OUT`."""

from pathlib import Path

from ..hub.space_folder import write_space
from .examples import example_files, find_examples, origin_text
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
    pictures = example_files(find_examples([model], images))
    origin = origin_text([model], images)
    return write_space(model, out, pictures, title=f"{model.resolve().name}, seen", origin=origin, package=package)
