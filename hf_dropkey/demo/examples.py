"""Example images of a page: those that are named, those beside the model, the digits, or scikit-learn's photographs."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import needed
from ..hub.cards import RunFacts
from .uploads import LONGEST_SIDE, read_upload


# in a Space; more take their time in the tab that orders them by uncertainty
FOLDER = "examples"
MOST = 12
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PHOTOGRAPHS = {"china.jpg": "temple", "flower.jpg": "flower"}
FROM_DIGITS = (
    "The examples are handwritten digits of the UCI data set Optical Recognition of Handwritten Digits (CC BY 4.0), as "
    "scikit-learn brings them."
)
FROM_PHOTOGRAPHS = (
    "The examples are the sample photographs of scikit-learn, from Flickr: a temple by danielbuechele and a flower by vultilion "
    "(CC BY 2.0)."
)
FROM_FILES = "The examples were chosen by whoever uploaded this page."


@dataclass(frozen=True)
class Example:
    """An image with what is known of it."""

    name: str
    image: Image.Image


def find_examples(folders: Sequence[Path], images: Path | None) -> list[Example]:
    """The examples of a page, at least one.

    Args:
        folders: Of the models.
        images: Folder of images to use instead.

    Raises:
        FileNotFoundError: `images` is not a folder.
        ValueError: There is no image in it, or one cannot be read.
    """
    origin = origin_of(folders, images)
    if isinstance(origin, Path):
        return read_folder(origin)
    return digits() if origin == "digits" else photographs()


def drawing_examples(drawer: Any, folder: Path, images: Path | None) -> Sequence[Example]:
    """As `find_examples`, of a model that is drawn, which has examples of its own."""
    own = images or (folder / FOLDER if (folder / FOLDER).is_dir() else None)
    found: Sequence[Example] = drawer.examples() if own is None else read_folder(own)
    return found


def origin_of(folders: Sequence[Path], images: Path | None) -> Path | str:
    """Where the examples come from: a folder, "digits" or "photographs"."""
    if images is not None:
        return images
    own = next((folder / FOLDER for folder in folders if (folder / FOLDER).is_dir()), None)
    if own is not None:
        return own
    return "digits" if any(RunFacts.load(folder).dataset == "digits" for folder in folders) else "photographs"


def origin_text(folders: Sequence[Path], images: Path | None) -> str:
    """Where the examples come from, with their licence, one sentence."""
    return {"digits": FROM_DIGITS, "photographs": FROM_PHOTOGRAPHS}.get(str(origin_of(folders, images)), FROM_FILES)


def example_files(examples: Sequence[Example]) -> dict[str, bytes]:
    """The examples as PNG files, by names that keep their order."""
    found = {}
    for number, example in enumerate(examples, 1):
        content = io.BytesIO()
        example.image.save(content, "PNG")
        found[f"{number:02}.png"] = content.getvalue()
    return found


def read_folder(folder: Path) -> list[Example]:
    """The first images of a folder, by name.

    Raises:
        FileNotFoundError, ValueError: As `find_examples`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is not a folder; give a folder of image files")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)[:MOST]
    if not files:
        raise ValueError(f"--images {folder} has no image file; its images must end in {', '.join(ENDINGS)}")
    return [Example(file.stem, read_upload(file).image) for file in files]


def digits() -> list[Example]:
    """Handwritten digits of scikit-learn's test images as the recipes split them, a spread of them."""
    from ..classification.arguments import DataArguments
    from ..classification.data import load_image_data

    rows = load_image_data(DataArguments(), training=False).evaluation
    chosen = np.linspace(0, len(rows) - 1, MOST).astype(int)
    return [
        Example(f"row {row['row']}", row["image"].convert("RGB")) for row in (rows[int(place)] for place in chosen)
    ]


def photographs() -> list[Example]:
    """The two photographs that scikit-learn brings (CC BY)."""
    with needed("train"):
        from sklearn.datasets import load_sample_image
    found = []
    for file, name in PHOTOGRAPHS.items():
        image = Image.fromarray(load_sample_image(file))
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        found.append(Example(name, image))
    return found
