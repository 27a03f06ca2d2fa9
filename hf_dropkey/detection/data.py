"""Images with boxes around their objects, from where people keep them: read and checked.

`load_detection_data` takes folders of images with COCO annotation files, or a data set of the hub whose rows list
boxes in `objects`. Every annotation and image is checked before training time is spent. What comes out is COCO's
format whatever went in: category ids as they are, boxes `[x, y, width, height]` in pixels of the original image.

https://cocodataset.org/#format-data.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils.logging import tqdm

from ..extras import needed
from ..images.checks import (
    READER_ERRORS,
    Transparency,
    look_at_image,
    name_some,
    read_checked_image,
    warn_of_transparency,
)
from ..images.sources import CHOICE_SEED, EVALUATION_SPLITS, check_known, data_fingerprint, image_bytes, load_named
from .annotations import TEXT_ID, checked_annotations
from .arguments import DetectionDataArguments


with needed("train"):
    import datasets
    from datasets import ClassLabel, Features


logger = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
EXIF_TURNED = (5, 6, 7, 8)
CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")


@dataclass(frozen=True)
class DetectionSplit:
    """Checked images with boxes.

    Attributes:
        name: What messages call it.
        images: COCO's image records: `id`, `file_name`, `width`, `height`.
        boxes: COCO's annotations of each image id, all usable; an image may have none.
        categories: COCO's categories, in the order of their ids.
        cell: Gives the undecoded image, `{"bytes": ..., "path": ...}`, of an image record.
    """

    name: str
    images: list[dict[str, Any]]
    boxes: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]
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

    def identities(self) -> Iterator[tuple[str, str, int]]:
        """Name, boxes with their categories as text, and size in bytes of each image."""
        names = {category["id"]: category["name"] for category in self.categories}
        for image in self.images:
            boxes = [(names[box["category_id"]], box["bbox"], box["iscrowd"]) for box in self.boxes[image["id"]]]
            yield str(image["file_name"]), json.dumps(boxes), image_bytes(self.cell(image))

    def box_counts(self) -> tuple[int, int]:
        """Number of boxes that are trained on or looked for, and of crowd regions, which are not."""
        crowd = [box["iscrowd"] for image in self.images for box in self.boxes[image["id"]]]
        return len(crowd) - sum(crowd), sum(crowd)

    def select(self, rows: Iterable[int]) -> "DetectionSplit":
        """Some of the images, with their boxes."""
        return replace(self, images=[self.images[row] for row in rows])


@dataclass(frozen=True)
class DetectionData:
    """What a detection model is trained and evaluated on.

    Attributes:
        train: To train on; None if that was not asked for.
        evaluation: To evaluate on; None if that was not asked for.
        label_names: Class names, in the order of the model's class numbers.
        category_ids: COCO's category id of each class; None for a class of the model that the data does not have.
    """

    train: DetectionSplit | None
    evaluation: DetectionSplit | None
    label_names: list[str]
    category_ids: list[int | None]

    @property
    def class_numbers(self) -> dict[int, int]:
        """The model's class number of each category id."""
        return {category: number for number, category in enumerate(self.category_ids) if category is not None}

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Rows, names, boxes with their classes, and sizes of the images to `train` and for `evaluation`."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        return {name: data_fingerprint(split.identities()) for name, split in splits.items() if split is not None}

    def with_label_names(self, names: Sequence[str]) -> "DetectionData":
        """The same data with the class numbers of a model whose classes are `names`, in that order.

        Raises:
            ValueError: The data has classes that are not among `names`.
        """
        check_known(self.label_names, names)
        ids = dict(zip(self.label_names, self.category_ids, strict=True))
        # a name may stand twice, as N/A does in models trained on COCO
        return replace(self, label_names=list(names), category_ids=[ids.get(name) for name in names])


def load_detection_data(arguments: DetectionDataArguments, *, training: bool, evaluation: bool) -> DetectionData:
    """Loads and checks what is needed.

    Raises:
        FileNotFoundError: A folder, an annotation file or (without `skip_bad_images`) an image is not there.
        ValueError: A split is missing, or annotations or images cannot be used.
    """
    readers = hub_splits(arguments) if arguments.dataset_name else file_splits(arguments)
    wanted = {"train": training, "validation": evaluation}
    splits: dict[str, DetectionSplit] = {}
    for role, reader in readers.items():
        if not wanted[role]:
            continue
        limit = arguments.max_train_samples if role == "train" else arguments.max_eval_samples
        splits[role] = usable_images(choose(reader(), limit), arguments)
    for role in wanted:
        if wanted[role] and role not in splits:
            raise ValueError(
                f"no data for the {role} split; give --{role}_images and --{role}_annotations, or --dataset_name"
            )
    first = next(iter(splits.values()))
    splits = {role: aligned(split, first) for role, split in splits.items()}
    for other in splits.values():
        check_same_categories(first, other)
    names = [category["name"] for category in first.categories]
    ids: list[int | None] = [category["id"] for category in first.categories]
    return DetectionData(splits.get("train"), splits.get("validation"), names, ids)


def file_splits(arguments: DetectionDataArguments) -> dict[str, Callable[[], DetectionSplit]]:
    """How to read each split that the arguments name by files."""
    files = {
        "train": (arguments.train_images, arguments.train_annotations),
        "validation": (arguments.validation_images, arguments.validation_annotations),
    }
    return {
        role: partial(read_coco, Path(images), Path(annotations), skip_bad_annotations=arguments.skip_bad_annotations)
        for role, (images, annotations) in files.items()
        if images and annotations
    }


def read_coco(folder: Path, file: Path, *, skip_bad_annotations: bool = False) -> DetectionSplit:
    """Images of a folder with the annotations of a file in COCO's format; the images are not opened.

    Raises:
        FileNotFoundError: The folder or the file is not there.
        ValueError: The file is no JSON, lacks something, or has annotations that cannot be used.
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
        # from bytes, so that a byte order mark is read for what it is
        document = json.loads(file.read_bytes())
    # bytes that are no text, text that is no JSON, and JSON that is nested too deeply
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}; give an annotation file in COCO's format") from error
    images, boxes, categories = checked_annotations(document, str(file), skip=skip_bad_annotations)
    check_file_names(images, folder, str(file))
    return DetectionSplit(str(file), images, boxes, categories, partial(file_cell, folder))


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


def hub_splits(arguments: DetectionDataArguments) -> dict[str, Callable[[], DetectionSplit]]:
    """How to read each split of a hub data set.

    Raises:
        ValueError: A split that the arguments name is not there, or one serves both ends.
    """
    splits = load_named(str(arguments.dataset_name), arguments.dataset_config_name)
    usual = next((name for name in EVALUATION_SPLITS if name in splits), None)
    names = {"train": arguments.train_split_name, "validation": arguments.eval_split_name or usual}
    for option, name in (("--train_split_name", names["train"]), ("--eval_split_name", arguments.eval_split_name)):
        if name is not None and name not in splits:
            raise ValueError(f"no split {name!r} among {list(splits)}; choose with {option}")
    if names["train"] == names["validation"]:
        raise ValueError(f"split {names['train']!r} is for training and evaluation; choose another --eval_split_name")
    return {
        role: partial(
            read_rows,
            splits[name],
            f"the {name} split of {arguments.dataset_name}",
            skip_bad_annotations=arguments.skip_bad_annotations,
        )
        for role, name in names.items()
        if name is not None
    }


def read_rows(rows: datasets.Dataset, name: str, *, skip_bad_annotations: bool = False) -> DetectionSplit:
    """A data set whose rows have an `image` and `objects`: lists under `bbox` and `category`, or a list of such pairs.

    The image's id is its `image_id`, or its row number where there is no such column.

    Raises:
        ValueError: A column is missing, or annotations cannot be used.
    """
    for column in ("image", "objects"):
        if column not in rows.features:
            raise ValueError(f"{name} has no column {column!r}, only {list(rows.features)}; rename its columns")
    kinds = object_fields(rows.features)
    category_field = next((column for column in CATEGORY_COLUMNS if column in kinds), None)
    if "bbox" not in kinds or category_field is None:
        raise ValueError(
            f"`objects` of {name} has {sorted(kinds)}; needed are 'bbox' and one of {list(CATEGORY_COLUMNS)}"
        )
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    columns = [column for column in ("image_id", "width", "height", "objects") if column in rows.features]
    images, annotations = [], []
    for number, row in enumerate(tqdm(rows.select_columns(columns), desc=f"Reading {name}")):
        image = {"id": row.get("image_id", number), "file_name": f"row {number}", "row": number}
        if "width" in row and "height" in row:
            image |= {"width": row["width"], "height": row["height"]}
        else:
            size = file_size(undecoded[number]["image"])
            # the check of the images tells what is wrong with one that has no size
            image |= dict(zip(("width", "height"), size or (1, 1), strict=True))
        images.append(image)
        for found in as_records(row["objects"]):
            annotation = {"image_id": image["id"], "category_id": found[category_field], "bbox": found["bbox"]}
            annotations.append(annotation | {key: found[key] for key in ("area", "iscrowd") if key in found})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": hub_categories(kinds[category_field], annotations),
    }
    images, boxes, categories = checked_annotations(document, name, skip=skip_bad_annotations)
    return DetectionSplit(name, images, boxes, categories, partial(row_cell, undecoded))


def row_cell(rows: datasets.Dataset, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image of a record made from a row."""
    return rows[image["row"]]["image"]


def object_fields(features: Features) -> dict[str, Any]:
    """The fields of `objects` and what each holds for one object, in either of the two layouts."""
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


def hub_categories(kind: Any, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """COCO's categories for a hub column: the names it declares, or its values; text is replaced by numbers."""
    if isinstance(kind, ClassLabel):
        return [{"id": number, "name": name} for number, name in enumerate(kind.names)]
    values = sorted({annotation["category_id"] for annotation in annotations} - {None})
    if values and isinstance(values[0], str):
        for annotation in annotations:
            if annotation["category_id"] is not None:
                annotation["category_id"] = values.index(annotation["category_id"])
        return [{"id": number, "name": name, TEXT_ID: name} for number, name in enumerate(values)]
    return [{"id": value, "name": str(value)} for value in values]


def aligned(split: DetectionSplit, first: DetectionSplit) -> DetectionSplit:
    """The split with the category ids of another one, where both number categories whose ids are text."""
    known = {category[TEXT_ID]: category["id"] for category in first.categories if TEXT_ID in category}
    if split is first or not known or any(TEXT_ID not in category for category in split.categories):
        return split
    new = max(known.values()) + 1
    ids = {category["id"]: known.get(category[TEXT_ID], new + category["id"]) for category in split.categories}
    categories = [{**category, "id": ids[category["id"]]} for category in split.categories]
    boxes = {
        image: [{**box, "category_id": ids[box["category_id"]]} for box in found]
        for image, found in split.boxes.items()
    }
    return replace(split, boxes=boxes, categories=sorted(categories, key=lambda category: category["id"]))


def check_same_categories(one: DetectionSplit, other: DetectionSplit) -> None:
    """Raises ValueError if a split has categories under ids or names that the first does not have; it may lack some.

    Categories that no box of the other split has may differ.
    """
    first = {category["id"]: category["name"] for category in one.categories}
    used = {box["category_id"] for boxes in other.boxes.values() for box in boxes}
    differing = [
        f"{category['id']} is {first.get(category['id'])!r} there and {category['name']!r} here"
        for category in other.categories
        if category["id"] in used and first.get(category["id"]) != category["name"]
    ]
    if differing:
        raise ValueError(
            f"{one.name} and {other.name} have different categories: {name_some(differing)}; give both the same"
        )


def choose(split: DetectionSplit, limit: int | None) -> DetectionSplit:
    """At most `limit` images, a random choice that is the same on every call."""
    if limit is None or limit >= len(split):
        return split
    return split.select(sorted(np.random.default_rng(CHOICE_SEED).permutation(len(split))[:limit].tolist()))


def usable_images(split: DetectionSplit, arguments: DetectionDataArguments) -> DetectionSplit:
    """The images that are there and, where they are checked, can be read and have the annotated size.

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
            problem = checked_image(cell, image, transparent) if arguments.check_images else None
        if problem is not None:
            problems[row] = f"image {image['id']}: {problem}"
    kept = [row for row in range(len(split)) if row not in problems]
    if problems:
        message = f"{len(problems)} of {len(split)} images of {split.name} cannot be used: "
        message += name_some(problems.values())
        if not arguments.skip_bad_images or not kept:
            kind = FileNotFoundError if missing == len(problems) else ValueError
            raise kind(f"{message}. Repair or remove them, or leave them out with --skip_bad_images")
        logger.warning("%s. They are left out.", message)
    warn_of_transparency(transparent, len(kept), f"images of {split.name}")
    usable = split.select(kept)
    boxes, crowd = usable.box_counts()
    if not boxes:
        regions = f" but {crowd} crowd regions (iscrowd 1), which are not used" if crowd else ""
        raise ValueError(
            f"the {len(kept)} chosen images of {split.name} have no boxes{regions}; choose more or other images"
        )
    if crowd:
        logger.warning(
            "%s: %d boxes are used; %d annotations have iscrowd 1 (regions of many objects), which are neither trained "
            "on nor counted as misses",
            split.name,
            boxes,
            crowd,
        )
    return usable


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
            f"{orientation} turns it to {size}: the boxes are those of the image before it is turned; remove that entry "
            "from the file, or turn pixels, sizes and boxes"
        )
    return f"{image['file_name']} is {size} pixels (width, height) and annotated as {annotated}"


def file_size(cell: dict[str, Any] | None) -> tuple[int, int] | None:
    """Width and height of an undecoded image once it is turned as its file says; None if it is no image."""
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
