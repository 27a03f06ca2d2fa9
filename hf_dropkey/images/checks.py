"""Finds image files that are empty, damaged or of a kind that would be misread, before training time is spent."""

import logging
import os
import struct
from collections.abc import Iterable
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..extras import needed


with needed("train"):
    import datasets
    from datasets import Dataset, Features, Value


logger = logging.getLogger(__name__)

# more than eight bits have no agreed range, and a plain conversion would clip them to white without a word
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
NAMES_SHOWN = 20


def drop_bad_images(split: Dataset, name: str, *, skip: bool = False, processes: int | None = None) -> Dataset:
    """Reads every image of a split once; with `skip`, what comes back lacks those that cannot be used.

    The split has its images in `image` and their row numbers in `row`.

    Raises:
        ValueError: Images cannot be used, and `skip` is off or would leave nothing; names and counts them.
    """
    problems = split.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"problem": image_problem(row["image"], row["row"])},
        remove_columns=split.column_names,
        features=Features({"problem": Value("string")}),
        num_proc=processes,
        # a file may have been repaired since the last look at it
        load_from_cache_file=False,
        desc=f"Checking the images of the {name} split",
    )["problem"][:]
    bad = [problem for problem in problems if problem is not None]
    if not bad:
        return split
    message = f"{len(bad)} of {len(split)} images in the {name} split cannot be used: {name_some(bad)}"
    if not skip or len(bad) == len(split):
        raise ValueError(f"{message}. Repair or remove them, or leave them out with --skip_bad_images")
    logger.warning("%s. They are left out.", message)
    return split.select([row for row, problem in enumerate(problems) if problem is None])


def image_problem(cell: dict[str, Any] | None, row: int) -> str | None:
    """Why the undecoded image in `cell` cannot be used, with its file or row number; None if it can."""
    try:
        read_image(cell, row)
    except ValueError as error:
        return str(error)
    return None


def read_image(cell: dict[str, Any] | None, row: int) -> Image.Image:
    """The image in an undecoded cell, turned as its file says.

    Raises:
        ValueError: It cannot be used; the file or row number, and why.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"row {row} (no image)")
    path, content = cell["path"], cell["bytes"]
    where = path if content is None else f"row {row}"
    if content == b"" or (content is None and os.path.isfile(path) and os.path.getsize(path) == 0):
        raise ValueError(f"{where} (empty file)")
    try:
        image: Image.Image = datasets.Image().decode_example(cell)
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} (not an image file)") from error
    # what Pillow's readers raise for damaged files, each for some format
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} ({error})") from error
    if image.mode in DEEP_MODES:
        raise ValueError(f"{where} (mode {image.mode}, more than 8 bits per channel; convert it to 8 bits)")
    return image


def read_checked_image(cell: dict[str, Any] | None, row: int) -> Image.Image:
    """As `read_image`, in the middle of a run: the error says what to do next."""
    try:
        return read_image(cell, row)
    except ValueError as error:
        raise ValueError(
            f"an image cannot be used: {error}. Repair or remove it; --check_images True finds all such images before "
            "anything else, and --skip_bad_images leaves them out"
        ) from error


def read_images(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows whose `image` is not decoded, with images there; what is one already stays, and so do other columns.

    Raises:
        ValueError: As `read_checked_image`.
    """
    if "image" not in batch:
        return batch
    # a column that is asked for alone comes from its first row on
    rows = batch.get("row") or range(len(batch["image"]))
    images = [
        cell if isinstance(cell, Image.Image) else read_checked_image(cell, row)
        for cell, row in zip(batch["image"], rows, strict=True)
    ]
    return {**batch, "image": images}


def with_named_images(split: Dataset) -> Dataset:
    """The split, whose images are read by `read_images`, which unlike the library's own reading names a bad one."""
    return split.cast_column("image", datasets.Image(decode=False)).with_transform(read_images)


def name_some(names: Iterable[str]) -> str:
    """Names for a message: the first ones, and how many more there are."""
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
