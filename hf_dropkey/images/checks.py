"""Finds image files that are empty, damaged or of a mode that would be misread, before training starts."""

import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..extras import needed


with needed("train"):
    import datasets
    from datasets import Dataset, Features, Value


logger = logging.getLogger(__name__)

# more than eight bits have no agreed range, and a plain conversion would silently clip them to white
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
NAMES_SHOWN = 20
# the errors of Pillow's readers for damaged files of the various formats: RuntimeError of AVIF, NotImplementedError of
# DDS and BLP
READER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# alpha from which on a pixel counts as visible
VISIBLE_ALPHA = 128


@dataclass(frozen=True)
class Transparency:
    """The pixels that a model sees where an image is transparent.

    Attributes:
        behind: Colour that the file stores there: "black", "white" or "other".
        blank: The whole image becomes a single colour.
    """

    behind: str
    blank: bool


def drop_bad_images(split: Dataset, name: str, *, skip: bool = False, processes: int | None = None) -> Dataset:
    """Reads every image of a split once; with `skip`, returns the split without the images that cannot be used.

    The split has the columns `image` and `row`, the row number.

    Raises:
        ValueError: Images cannot be used, and `skip` is off or would leave no image; lists and counts them.
    """
    found = split.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: look_at_image(row["image"], row["row"]),
        remove_columns=split.column_names,
        features=Features({"problem": Value("string"), "behind": Value("string"), "blank": Value("bool")}),
        num_proc=processes,
        # a file may have been repaired since it was last checked
        load_from_cache_file=False,
        desc=f"Checking the images of the {name} split",
    )
    problems = found["problem"][:]
    transparent = [
        Transparency(behind, blank)
        for behind, blank in zip(found["behind"], found["blank"], strict=True)
        if behind is not None
    ]
    bad = [problem for problem in problems if problem is not None]
    if bad:
        message = f"{len(bad)} of {len(split)} images in the {name} split cannot be used: {name_some(bad)}"
        if not skip or len(bad) == len(split):
            raise ValueError(f"{message}. Repair or remove them, or leave them out with --skip_bad_images")
        logger.warning("%s. They are left out.", message)
    warn_of_transparency(transparent, len(split) - len(bad), f"images in the {name} split")
    if not bad:
        return split
    return split.select([row for row, problem in enumerate(problems) if problem is None])


def look_at_image(cell: dict[str, Any] | None, row: int) -> dict[str, Any]:
    """The problem of the undecoded image in `cell` (`problem`), or its transparency (`behind`, `blank`)."""
    nothing = {"problem": None, "behind": None, "blank": None}
    try:
        image = read_image(cell, row)
    except ValueError as error:
        return {**nothing, "problem": str(error)}
    try:
        seen = transparency(image)
        # some files are read and cannot be converted
        image.convert("RGB")
    except READER_ERRORS as error:
        return {**nothing, "problem": f"{place_of(cell, row)} ({error})"}
    return nothing if seen is None else {**nothing, "behind": seen.behind, "blank": seen.blank}


def image_problem(cell: dict[str, Any] | None, row: int) -> str | None:
    """Why the undecoded image in `cell` cannot be used, with its file or row number; None if it can."""
    problem: str | None = look_at_image(cell, row)["problem"]
    return problem


def transparency(image: Image.Image) -> Transparency | None:
    """The transparent pixels of an image after its conversion to RGB, which models see; None if it has none."""
    if "A" not in image.getbands() and "a" not in image.getbands() and "transparency" not in image.info:
        return None
    pixels = np.asarray(image.convert("RGBA"))
    hidden = pixels[pixels[..., 3] < VISIBLE_ALPHA][:, :3]
    if not len(hidden):
        return None
    behind = "black" if not hidden.any() else "white" if (hidden == 255).all() else "other"
    plain = all(low == high for low, high in map(Image.Image.getextrema, image.convert("RGB").split()))
    return Transparency(behind, plain)


def warn_of_transparency(found: Sequence[Transparency], total: int, what: str) -> None:
    """Logs the number of images with transparent pixels, what a model sees there, and how to change it."""
    if not found:
        return
    colours = Counter(one.behind for one in found)
    seen = ", ".join(f"{'several colours' if name == 'other' else name} in {count}" for name, count in colours.items())
    blank = sum(one.blank for one in found)
    lost = f"; {blank} of them become one plain colour, and the model sees nothing of their contents" if blank else ""
    # a ground that sets off what the file's own colour hides
    ground = "white" if colours.most_common(1)[0][0] == "black" else "gray"
    logger.warning(
        "%d of %d %s have transparent pixels. A model sees no transparency but the colour that the file stores there "
        "(%s)%s. If that is not meant, put them on a background and save them again: "
        "Image.alpha_composite(Image.new('RGBA', image.size, '%s'), image.convert('RGBA')).convert('RGB')",
        len(found),
        total,
        what,
        seen,
        lost,
        ground,
    )


def place_of(cell: dict[str, Any] | None, row: int) -> str:
    """The name of an undecoded image in messages: its file, else its row number."""
    return f"row {row}" if cell is None or cell["bytes"] is not None or cell["path"] is None else str(cell["path"])


def read_image(cell: dict[str, Any] | None, row: int) -> Image.Image:
    """The image in an undecoded cell, with the rotation of its EXIF data.

    Raises:
        ValueError: It cannot be used; the message has the file or row number, and the reason.
    """
    where = place_of(cell, row)
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"{where} (no image)")
    path, content = cell["path"], cell["bytes"]
    # opening a pipe would wait for its writer
    if content is None and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{where} (no regular file)")
    if content == b"" or (content is None and os.path.isfile(path) and os.path.getsize(path) == 0):
        raise ValueError(f"{where} (empty file)")
    try:
        image: Image.Image = datasets.Image().decode_example(cell)
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} (not an image file)") from error
    except READER_ERRORS as error:
        raise ValueError(f"{where} ({str(error) or type(error).__name__})") from error
    if image.mode in DEEP_MODES:
        raise ValueError(f"{where} (mode {image.mode}, more than 8 bits per channel; convert it to 8 bits)")
    return image


def read_checked_image(cell: dict[str, Any] | None, row: int) -> Image.Image:
    """As `read_image`, during a run: the error says what to do next."""
    try:
        return read_image(cell, row)
    except ValueError as error:
        raise ValueError(
            f"an image cannot be used: {error}. Repair or remove it; --check_images True finds all such images before "
            "training starts, and --skip_bad_images leaves them out"
        ) from error


def read_image_file(file: Path) -> Image.Image:
    """An image file that the argument --images names, in RGB, turned as it says.

    Raises:
        ValueError: It cannot be used; names the file and the reason.
    """
    try:
        return read_image({"path": str(file), "bytes": None}, 0).convert("RGB")
    except ValueError as error:
        raise ValueError(f"an image cannot be used: {error}. Repair it, or leave it out of --images") from error


def read_images(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Decodes the `image` column of a batch of rows; decoded images and other columns stay as they are.

    Raises:
        ValueError: As `read_checked_image`.
    """
    if "image" not in batch:
        return batch
    # without the column `row`, the batch starts at the first row
    rows = batch.get("row") or range(len(batch["image"]))
    images = [
        cell if isinstance(cell, Image.Image) else read_checked_image(cell, row)
        for cell, row in zip(batch["image"], rows, strict=True)
    ]
    return {**batch, "image": images}


def with_named_images(split: Dataset) -> Dataset:
    """The split with images decoded by `read_images`, whose errors name the image."""
    return split.cast_column("image", datasets.Image(decode=False)).with_transform(read_images)


def name_some(names: Iterable[str]) -> str:
    """Names for a message: the first ones, and the number of the others."""
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
