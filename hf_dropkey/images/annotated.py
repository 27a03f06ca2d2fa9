"""Images with annotations: reading and checking that all tasks with annotated images have in common.

A split of a task extends `AnnotatedImages`; its annotations are its own.
"""

import io
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image
from transformers.utils.logging import tqdm

from ..extras import needed
from .checks import (
    READER_ERRORS,
    Transparency,
    look_at_image,
    name_some,
    read_checked_image,
    warn_of_transparency,
)
from .sources import CHOICE_SEED, image_bytes


with needed("train"):
    import datasets
    from datasets import Features


logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
EXIF_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class AnnotatedImages(ABC):
    """Images with annotations.

    Attributes:
        name: Its name in messages.
        images: A record of each image: `id`, `file_name`, `width`, `height`, and `row` if it is a row of a data set.
        cell: Gives the undecoded image, `{"bytes": ..., "path": ...}`, of an image record.
    """

    name: str
    images: list[dict[str, Any]]
    cell: Callable[[dict[str, Any]], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.images)

    def open(self, row: int) -> Image.Image:
        """The image of a row, in RGB, turned as its file says.

        Raises:
            ValueError: It cannot be used; names it.
        """
        image = self.images[row]
        return read_checked_image(self.cell(image), image.get("row", image["id"])).convert("RGB")

    @abstractmethod
    def annotations_as_text(self, row: int) -> str:
        """All annotations of an image, by names, for the fingerprint of the data."""

    def identities(self) -> Iterator[tuple[str, str, int]]:
        """Name, annotations as text, and size in bytes of each image."""
        for row, image in enumerate(self.images):
            yield str(image["file_name"]), self.annotations_as_text(row), image_bytes(self.cell(image))

    @abstractmethod
    def select(self, rows: Iterable[int]) -> Self:
        """Some of the images, with their annotations."""


Split = TypeVar("Split", bound=AnnotatedImages)


def read_annotations(folder: Path, file: Path, kind: str) -> Any:
    """The contents of an annotation file for a folder of images; `kind` names the expected format.

    Raises:
        FileNotFoundError: The folder or the file is not there.
        ValueError: The file is not JSON.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the image folder {folder} is {'a file' if folder.exists() else 'not there'}; check --train_images and "
            "--validation_images"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"the annotation file {file} is {'a folder' if file.exists() else 'not there'}; check --train_annotations and "
            "--validation_annotations"
        )
    try:
        # from bytes, so that a byte order mark is recognised
        return json.loads(file.read_bytes())
    # bytes that are not text, text that is not JSON, and JSON that is nested too deeply
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}; give an annotation file in {kind}") from error


def sized_record(row: Mapping[str, Any], cell: dict[str, Any] | None) -> dict[str, int]:
    """Width and height of an image of a data set: as its row says, else as its file does."""
    if "width" in row and "height" in row:
        return {"width": row["width"], "height": row["height"]}
    size = file_size(cell)
    # the check of the images reports one that has no size
    return dict(zip(("width", "height"), size or (1, 1), strict=True))


def choose(split: Split, limit: int | None) -> Split:
    """At most `limit` images, a random choice that is the same on every call."""
    if limit is None or limit >= len(split):
        return split
    return split.select(sorted(np.random.default_rng(CHOICE_SEED).permutation(len(split))[:limit].tolist()))


def usable_images(split: Split, *, check: bool, skip: bool) -> Split:
    """The images that are there and, where they are checked, can be read and have the annotated size.

    Args:
        split: The images to check.
        check: Read every image.
        skip: Leave out images that cannot be used, instead of stopping.

    Raises:
        FileNotFoundError: Images are missing, and they are not to be left out.
        ValueError: Images cannot be used, and they are not to be left out; or none is left.
    """
    problems: dict[int, str] = {}
    transparent: list[Transparency] = []
    missing = 0
    for row, image in enumerate(tqdm(split.images, desc="Checking the images")):
        cell = split.cell(image)
        if cell is not None and cell["bytes"] is None and cell["path"] and not Path(cell["path"]).is_file():
            problem: str | None = f"{cell['path']} (no such file)"
            missing += 1
        else:
            problem = checked_image(cell, image, transparent) if check else None
        if problem is not None:
            problems[row] = f"image {image['id']}: {problem}"
    kept = [row for row in range(len(split)) if row not in problems]
    if problems:
        message = f"{len(problems)} of {len(split)} images of {split.name} cannot be used: "
        message += name_some(problems.values())
        if not skip or not kept:
            kind = FileNotFoundError if missing == len(problems) else ValueError
            raise kind(f"{message}. Repair or remove them, or leave them out with --skip_bad_images")
        logger.warning("%s. They are left out.", message)
    warn_of_transparency(transparent, len(kept), f"images of {split.name}")
    return split.select(kept)


def checked_image(
    cell: dict[str, Any] | None, image: Mapping[str, Any], transparent: list[Transparency]
) -> str | None:
    """Why an undecoded image cannot be used, None if it can; adds to `transparent` what its transparency hides."""
    seen = look_at_image(cell, int(image.get("row", image["id"])))
    if seen["problem"] is not None or cell is None:
        problem: str | None = seen["problem"]
        return problem
    if seen["behind"] is not None:
        transparent.append(Transparency(seen["behind"], seen["blank"]))
    size, stored, orientation = file_sizes(cell) or ((0, 0), (0, 0), 1)
    annotated = image["width"], image["height"]
    if size == annotated:
        return None
    if stored == annotated:
        return (
            f"{image['file_name']} is stored as {stored} pixels (width, height), as annotated, and its EXIF orientation "
            f"{orientation} turns it to {size}, so that the boxes would not fit; remove the orientation from the file, or "
            "turn the annotated size and boxes"
        )
    return f"{image['file_name']} is {size} pixels (width, height) and annotated as {annotated}"


def file_size(cell: dict[str, Any] | None) -> tuple[int, int] | None:
    """Width and height of an undecoded image once it is turned as its file says; None if it is not an image."""
    sizes = file_sizes(cell)
    return None if sizes is None else sizes[0]


def file_sizes(cell: dict[str, Any] | None) -> tuple[tuple[int, int], tuple[int, int], int] | None:
    """Width and height of an undecoded image turned as its file says, as stored, and its EXIF orientation."""
    if cell is None:
        return None
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            turned = (image.height, image.width) if orientation in EXIF_TURNED else image.size
            return turned, image.size, orientation
    except READER_ERRORS:
        return None


def check_file_names(images: Sequence[dict[str, Any]], folder: Path, source: str) -> None:
    """Checks the file names of records.

    Raises:
        FileNotFoundError: None of the files is there, as in another folder than that of the annotations.
        ValueError: Records name files that do not lie in the image folder, or no files.
    """
    root = os.path.abspath(folder)
    outside = []
    for image in images:
        name = image["file_name"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"{source}: image {image['id']} has the file_name {name!r}; give the name of its file")
        # links inside the folder are the user's own
        if os.path.commonpath([root, os.path.abspath(os.path.join(root, name))]) != root:
            outside.append(name)
    if outside:
        raise ValueError(
            f"{source}: {len(outside)} of {len(images)} images have a file_name outside the image folder {folder}: "
            f"{name_some(outside)}; name files relative to that folder, or give the folder that holds them all"
        )
    if images and not any((folder / image["file_name"]).exists() for image in images):
        raise FileNotFoundError(
            f"{source}: none of its {len(images)} images is there, such as {folder / images[0]['file_name']}; give the "
            "folder that its file names start from with --train_images or --validation_images"
        )


def file_cell(folder: Path, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image of a record whose file lies in `folder`."""
    return {"bytes": None, "path": str(folder / image["file_name"])}


def row_cell(rows: datasets.Dataset, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image of a record made from a row."""
    return rows[image["row"]]["image"]


def object_fields(features: Features) -> dict[str, Any]:
    """The fields of `objects` and the type of each for one object, in either of the two layouts."""
    kind = features["objects"]
    inner = getattr(kind, "feature", kind[0] if isinstance(kind, list) else kind)
    return {
        name: getattr(value, "feature", value[0] if isinstance(value, list) else value) if inner is kind else value
        for name, value in (dict(inner).items() if isinstance(inner, Mapping) else ())
    }


def as_records(objects: Any) -> list[dict[str, Any]]:
    """One dictionary for each object, from a dictionary of lists or a list of dictionaries."""
    if isinstance(objects, Mapping):
        lengths = {name: len(values) for name, values in objects.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a row has lists of different lengths in `objects`, {lengths}; repair it")
        return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    return list(objects)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_box(box: Any) -> bool:
    """Whether a value is a list of four finite numbers."""
    return (
        isinstance(box, (list, tuple))
        and len(box) == 4
        and all(isinstance(number, (int, float)) and abs(number) <= sys.float_info.max for number in box)
    )


def check_unique(values: Sequence[Any], what: str, source: str) -> None:
    """Raises ValueError naming the values that stand twice."""
    twice = [repr(value) for value, count in Counter(map(str, values)).items() if count > 1]
    if twice:
        raise ValueError(f"{source}: {what} must be unique, these repeat: {name_some(twice)}")


def report_problems(problems: Sequence[tuple[str, str]], total: int, source: str, *, skip: bool) -> None:
    """Logs how many annotations are left out and why, or raises ValueError naming them."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(kind for kind, _ in problems).items()))
    message = f"{source}: {len(problems)} of {total} annotations cannot be used ({kinds}): " + name_some(
        text for _, text in problems
    )
    if not skip:
        raise ValueError(f"{message}. Repair them, or leave them out with --skip_bad_annotations")
    logger.warning("%s. They are left out.", message)
