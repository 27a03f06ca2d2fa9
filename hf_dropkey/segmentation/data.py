"""Images with a class for every pixel, from where people keep them: read and checked.

`load_segmentation_data` takes folders of images and of masks, PNG files whose values are class numbers, or rows of a data set
with both (`rows.py`), or generates scenes. Every image and mask is checked before training time is spent.
"""

import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.utils.logging import tqdm

from ..images.annotated import AnnotatedImages, choose, file_cell, file_size, row_cell, usable_images
from ..images.checks import READER_ERRORS, name_some
from ..images.folders import image_endings, visible_files
from ..images.sources import check_known, data_fingerprint
from .arguments import SegmentationDataArguments
from .rows import class_file, mask_row_cell, readers, records_of, usual_columns
from .scenes import SCENE_CLASSES, drawn_scene


logger = logging.getLogger(__name__)

ROLES = ("train", "validation")
# one channel of whole numbers; "P" holds numbers of a palette, which are the classes
MASK_MODES = ("1", "L", "P", "I", "I;16")


@dataclass(frozen=True)
class SegmentationSplit(AnnotatedImages):
    """Checked images with masks.

    Attributes:
        mask_cell: Gives the undecoded mask, `{"bytes": ..., "path": ...}`, of an image record.
        names: Class names of the numbers in the masks.
        ignore_index: Value of pixels without a class.
        reduce: Whether the masks' 0 is a pixel without a class, and their 1 is the first class.
    """

    mask_cell: Callable[[dict[str, Any]], dict[str, Any]]
    names: list[str]
    ignore_index: int
    reduce: bool = False

    def mask(self, row: int) -> NDArray[np.int64]:
        """The class number of each pixel of an image, or `ignore_index`, `[height, width]`.

        Raises:
            ValueError: The mask cannot be used; names it.
        """
        record = self.images[row]
        cell = self.mask_cell(record)
        return read_mask(
            cell,
            (record["width"], record["height"]),
            len(self.names),
            self.ignore_index,
            reduce=self.reduce,
            # bytes of a row may come with a path that leads nowhere
            where=f"the mask of {record['file_name']}" if "row" in record else None,
        )

    def annotations_as_text(self, row: int) -> str:
        """The checksum of the classes of all pixels."""
        return f"{zlib.crc32(self.mask(row).astype(np.int32).tobytes()):08x}"

    def select(self, rows: Iterable[int]) -> "SegmentationSplit":
        """Some of the images, with their masks."""
        return replace(self, images=[self.images[row] for row in rows])


@dataclass(frozen=True)
class SegmentationData:
    """What a segmentation model is trained and evaluated on.

    Attributes:
        train: To train on; None if that was not requested.
        evaluation: To evaluate on; None if that was not requested.
        label_names: Class names, in the order of the model's class numbers.
        numbers: The model's class number of each number in the masks.
    """

    train: SegmentationSplit | None
    evaluation: SegmentationSplit | None
    label_names: list[str]
    numbers: list[int]

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Rows, names, masks and sizes of the images to `train` and for `evaluation`."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        return {name: data_fingerprint(split.identities()) for name, split in splits.items() if split is not None}

    def with_label_names(self, names: Sequence[str]) -> "SegmentationData":
        """The same data with the class numbers of a model whose classes are `names`, in that order.

        Raises:
            ValueError: The data has classes that are not among `names`.
        """
        check_known(self.label_names, names)
        numbers = [list(names).index(name) for name in self.label_names]
        return replace(self, label_names=list(names), numbers=numbers)


def load_segmentation_data(
    arguments: SegmentationDataArguments, *, training: bool, evaluation: bool
) -> SegmentationData:
    """Loads and checks what is needed.

    Raises:
        FileNotFoundError: A folder, the file of names, or (without `skip_bad_images`) an image is not there.
        ValueError: A split is missing, or masks, names or images cannot be used.
    """
    wanted = {"train": training, "validation": evaluation}
    readers = split_readers(arguments)
    splits: dict[str, SegmentationSplit] = {}
    for role in [role for role, needed in wanted.items() if needed]:
        if role not in readers:
            raise ValueError(f"no data for the {role} split; {_how_to_give(arguments, role)}")
        limit = arguments.max_train_samples if role == "train" else arguments.max_eval_samples
        split = choose(readers[role](), limit)
        split = usable_images(split, check=arguments.check_images, skip=arguments.skip_bad_images)
        if arguments.check_images:
            split = usable_masks(split, skip=arguments.skip_bad_images)
        splits[role] = split
    names = next(iter(splits.values())).names if splits else []
    return SegmentationData(splits.get("train"), splits.get("validation"), names, list(range(len(names))))


def split_readers(arguments: SegmentationDataArguments) -> dict[str, Callable[[], SegmentationSplit]]:
    """How to read each split that the arguments name; images and masks are not decoded.

    Raises:
        FileNotFoundError: The file of names is not there.
        ValueError: The names or the splits cannot be used.
    """
    ignore = arguments.ignore_index
    if arguments.dataset:
        counts = {"train": arguments.train_scenes, "validation": arguments.validation_scenes}
        return {
            role: partial(scene_split, role, count, arguments.scene_size, ignore) for role, count in counts.items()
        }
    names = read_class_names(class_file(arguments), ignore)
    if arguments.do_reduce_labels and ignore == len(names):
        raise ValueError(
            f"--ignore_index {ignore} is the number of {names[-1]!r} in masks with --do_reduce_labels; choose one from "
            f"{ignore + 1} on"
        )
    if arguments.has_rows:
        return {role: partial(row_split, reader, arguments, names) for role, reader in readers(arguments).items()}
    folders = {role: tuple(getattr(arguments, f"{role}_{what}") for what in ("images", "masks")) for role in ROLES}
    return {
        role: partial(
            folder_split,
            Path(images),
            Path(masks),
            names,
            ignore,
            role,
            reduce=arguments.do_reduce_labels,
            skip=arguments.skip_bad_images,
        )
        for role, (images, masks) in folders.items()
        if images
    }


def _how_to_give(arguments: SegmentationDataArguments, role: str) -> str:
    if arguments.dataset_name:
        return f"{arguments.dataset_name} has none; name another of its splits with --eval_split_name"
    return f"give --{role}_file" if arguments.has_rows else f"give --{role}_images and --{role}_masks"


def row_split(
    reader: Callable[[], tuple[Any, str]], arguments: SegmentationDataArguments, names: list[str]
) -> SegmentationSplit:
    """The rows of a data set.

    Raises:
        ValueError: A column is not there, or holds no images.
    """
    found, name = reader()
    rows = usual_columns(found, name, arguments.image_column_name, arguments.label_column_name)
    return SegmentationSplit(
        name,
        records_of(rows, name),
        partial(row_cell, rows),
        partial(mask_row_cell, rows),
        names,
        arguments.ignore_index,
        arguments.do_reduce_labels,
    )


def scene_split(role: str, count: int, size: int, ignore_index: int) -> SegmentationSplit:
    """Generated scenes."""
    if ignore_index < len(SCENE_CLASSES):
        raise ValueError(
            f"--ignore_index {ignore_index} is the number of {SCENE_CLASSES[ignore_index]!r} in generated scenes; choose "
            f"one from {len(SCENE_CLASSES)} on"
        )
    records = [
        {"id": row, "row": row, "file_name": f"scene {row}", "width": size, "height": size} for row in range(count)
    ]
    image, mask = (partial(scene_cell, role, size, part) for part in (0, 1))
    return SegmentationSplit(f"scenes ({role})", records, image, mask, list(SCENE_CLASSES), ignore_index)


def scene_cell(role: str, size: int, part: int, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image (part 0) or mask (part 1) of a generated scene."""
    return {"bytes": drawn_scene(role, image["row"], size)[part], "path": None}


def folder_split(
    images: Path, masks: Path, names: list[str], ignore_index: int, role: str, *, reduce: bool = False, skip: bool
) -> SegmentationSplit:
    """The images of a folder, at any depth, each with the PNG of its name in the folder of masks.

    Raises:
        FileNotFoundError: A folder is not there, or holds no images.
        ValueError: Masks are missing, and their images are not to be left out.
    """
    for folder, what in ((images, "images"), (masks, "masks")):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--{role}_{what} {folder} is {'a file' if folder.exists() else 'not there'}; give a folder"
            )
    endings = image_endings()
    files = [Path(name).relative_to(images.resolve()) for name in visible_files(str(images.resolve()))]
    files = [file for file in files if file.suffix.lower() in endings]
    if not files:
        raise FileNotFoundError(f"--{role}_images {images} holds no image that Pillow reads")
    stems = Counter(str(file.with_suffix("")) for file in files)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise ValueError(
            f"--{role}_images {images} has several images of one name with other endings: {name_some(twice)}; a mask "
            "could not tell them apart, so rename or remove them"
        )
    without = [str(file) for file in files if not (masks / file.with_suffix(".png")).is_file()]
    if without:
        message = (
            f"{len(without)} of {len(files)} images in {images} have no mask in {masks}: {name_some(without)}. The mask of "
            f"{without[0]} must be {Path(without[0]).with_suffix('.png')}"
        )
        if not skip or len(without) == len(files):
            raise ValueError(f"{message}. Add masks, or leave such images out with --skip_bad_images")
        logger.warning("%s. They are left out.", message)
    left_out = set(without)
    records: list[dict[str, Any]] = []
    for file in files:
        if str(file) not in left_out:
            width, height = file_size({"bytes": None, "path": str(images / file)}) or (1, 1)
            records.append({"id": len(records), "file_name": str(file), "width": width, "height": height})
    return SegmentationSplit(
        str(images), records, partial(file_cell, images), partial(mask_file_cell, masks), names, ignore_index, reduce
    )


def mask_file_cell(folder: Path, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded mask of a record."""
    return {"bytes": None, "path": str(folder / Path(image["file_name"]).with_suffix(".png"))}


def read_class_names(file: Path, ignore_index: int) -> list[str]:
    """Class names in the order of their numbers: a list, or an object of numbers and names.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is neither, names repeat, there are fewer than two, or the ignored value has a name.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"--class_names {file} is {'a folder' if file.exists() else 'not there'}; give a JSON file"
        )
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--class_names {file} is not JSON: {error}") from error
    if isinstance(found, dict) and all(key.isdecimal() for key in found):
        numbered = {int(key): name for key, name in found.items()}
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(
                f"--class_names {file} names the numbers {name_some(map(str, sorted(numbered)))}; name 0 to "
                f"{len(numbered) - 1} without a gap"
            )
        found = [numbered[number] for number in range(len(numbered))]
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f'--class_names {file} must hold a list of names, such as ["background", "cat"]')
    repeated = sorted({name for name in found if found.count(name) > 1})
    if repeated:
        raise ValueError(
            f"--class_names {file} repeats {name_some(map(repr, repeated))}; give each class its own name"
        )
    if len(found) < 2:
        raise ValueError(
            f"--class_names {file} names {len(found)} class; segmentation needs two, such as a background"
        )
    if ignore_index < len(found):
        raise ValueError(
            f"--ignore_index {ignore_index} is the number of {found[ignore_index]!r}; choose one from {len(found)} on, or "
            "remove that name"
        )
    return found


def read_mask(
    cell: dict[str, Any],
    size: tuple[int, int],
    classes: int,
    ignore_index: int,
    *,
    reduce: bool = False,
    where: str | None = None,
) -> NDArray[np.int64]:
    """The class numbers of an undecoded mask, `[height, width]`.

    Args:
        cell: `{"bytes": ..., "path": ...}`.
        size: Width and height of its image.
        classes: Number of classes.
        ignore_index: Value of pixels without a class.
        reduce: Whether 0 is a pixel without a class too, and 1 the first class, whose number becomes 0.
        where: What to call it in errors; by default its path.

    Raises:
        ValueError: It is not there, not an image, in colour, of another size, or has other numbers; names the file.
    """
    where = where or cell["path"] or "the mask"
    if cell["bytes"] is None and cell["path"] is None:
        raise ValueError(f"{where} (no mask)")
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
            image.load()
            mode, found = image.mode, image.size
            values = np.asarray(image, dtype=np.int64) if mode in MASK_MODES else np.zeros((0, 0), dtype=np.int64)
    except READER_ERRORS as error:
        raise ValueError(f"{where} (not a mask: {str(error) or type(error).__name__})") from error
    if mode not in MASK_MODES:
        raise ValueError(
            f"{where} (a colour image of mode {mode}; a mask has one channel whose values are class numbers, so convert "
            "its colours to numbers)"
        )
    if found != size:
        raise ValueError(f"{where} (mask of {found} pixels (width, height), its image has {size}; make them equal)")
    first = int(reduce)
    allowed = {ignore_index, *range(classes + first)}
    strange = sorted(set(np.unique(values).tolist()) - allowed)
    if strange:
        raise ValueError(
            f"{where} (has the values {name_some(map(str, strange))}; the {classes} classes are {first} to "
            f"{classes - 1 + first}{', 0 is a pixel without one' * reduce}, and --ignore_index is {ignore_index})"
        )
    if not reduce:
        return values
    return np.where((values == 0) | (values == ignore_index), ignore_index, values - 1)


def usable_masks(split: SegmentationSplit, *, skip: bool) -> SegmentationSplit:
    """The images whose masks can be used.

    Raises:
        ValueError: Masks cannot be used, and their images are not to be left out, or none is left; or no pixel of the
            split has a class.
    """
    problems: dict[int, str] = {}
    labelled = 0
    for row in tqdm(range(len(split)), desc="Checking the masks"):
        try:
            labelled += int((split.mask(row) != split.ignore_index).sum())
        except ValueError as error:
            problems[row] = str(error)
    if problems:
        message = (
            f"{len(problems)} of {len(split)} masks of {split.name} cannot be used: {name_some(problems.values())}"
        )
        if not skip or len(problems) == len(split):
            raise ValueError(f"{message}. Repair them, or leave their images out with --skip_bad_images")
        logger.warning("%s. Their images are left out.", message)
    if not labelled:
        raise ValueError(f"no pixel of {split.name} has a class, all are {split.ignore_index} (--ignore_index)")
    return split.select(row for row in range(len(split)) if row not in problems)
