"""Images with boxes around their objects, from where people keep them: read and checked.

`load_detection_data` takes folders of images with COCO annotation files, or a data set of the hub whose rows list
boxes in `objects`. Every annotation and image is checked before training time is spent. What comes out is COCO's
format whatever went in: category ids as they are, boxes `[x, y, width, height]` in pixels of the original image.

https://cocodataset.org/#format-data.
"""

import io
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Features
from PIL import Image
from transformers.utils.logging import tqdm

from ..images.checks import image_problem, name_some, read_checked_image
from ..images.sources import CHOICE_SEED, EVALUATION_SPLITS, check_known
from .arguments import DetectionDataArguments


logger = logging.getLogger(__name__)

# annotation tools round, and some count pixels from 1
OUTSIDE_TOLERANCE_PIXELS = 1.0
EXIF_ORIENTATION = 0x0112
EXIF_TURNED = (5, 6, 7, 8)
CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


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
    first, *others = splits.values()
    for other in others:
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
        raise FileNotFoundError(f"the image folder {folder} is not there")
    if not file.is_file():
        raise FileNotFoundError(f"the annotation file {file} is not there")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    # bytes that are no UTF-8, and text that is no JSON
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; give an annotation file in COCO's format") from error
    images, boxes, categories = checked_annotations(document, str(file), skip=skip_bad_annotations)
    return DetectionSplit(str(file), images, boxes, categories, partial(file_cell, folder))


def file_cell(folder: Path, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image of a record whose file lies in `folder`."""
    return {"bytes": None, "path": str(folder / image["file_name"])}


def hub_splits(arguments: DetectionDataArguments) -> dict[str, Callable[[], DetectionSplit]]:
    """How to read each split of a hub data set.

    Raises:
        ValueError: A split that the arguments name is not there, or one serves both ends.
    """
    splits = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
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
        return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    return list(objects)


def hub_categories(kind: Any, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """COCO's categories for a hub column: the names it declares, or its values; text is replaced by numbers."""
    if isinstance(kind, ClassLabel):
        return [{"id": number, "name": name} for number, name in enumerate(kind.names)]
    values = sorted({annotation["category_id"] for annotation in annotations})
    if values and isinstance(values[0], str):
        for annotation in annotations:
            annotation["category_id"] = values.index(annotation["category_id"])
        return [{"id": number, "name": name} for number, name in enumerate(values)]
    return [{"id": value, "name": str(value)} for value in values]


def checked_annotations(
    document: Any, source: str, *, skip: bool
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Images, annotations by image id, and categories by ascending id, of a document in COCO's format.

    Boxes that stick out by up to a pixel are cut at the border. With `skip`, annotations that cannot be used are left
    out and counted in the log.

    Raises:
        ValueError: The document lacks something, ids repeat, or (without `skip`) annotations cannot be used.
    """
    check_structure(document, source)
    for part, key in (("images", "id"), ("annotations", "id"), ("categories", "id"), ("categories", "name")):
        check_unique([record[key] for record in document[part] if key in record], f"{part}' {key}", source)
    images = {image["id"]: image for image in document["images"]}
    categories = sorted(document["categories"], key=lambda category: category["id"])
    known = {category["id"] for category in categories}
    check_pixels(document["annotations"], source)
    boxes: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    problems: list[tuple[str, str]] = []
    for place, annotation in enumerate(document["annotations"]):
        problem = annotation_problem(annotation, images, known)
        if problem is not None:
            which = f"annotation {annotation['id']}" if "id" in annotation else f"annotation at place {place}"
            problems.append((problem[0], f"{which} of image {annotation['image_id']!r}: {problem[1]}"))
            continue
        boxes[annotation["image_id"]].append(usual_annotation(annotation, images[annotation["image_id"]]))
    if problems:
        report_problems(problems, len(document["annotations"]), source, skip=skip)
    if not any(boxes.values()):
        raise ValueError(f"{source} has no usable annotation; a model cannot learn from it, give it boxes")
    return list(images.values()), boxes, categories


def check_structure(document: Any, source: str) -> None:
    """Raises ValueError if a document does not have COCO's parts, or a part's records lack a field."""
    if not isinstance(document, dict) or any(not isinstance(document.get(part), list) for part in REQUIRED):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{source} has {found}; COCO's format is an object with the lists {list(REQUIRED)}")
    for part, names in REQUIRED.items():
        for place, record in enumerate(document[part]):
            lacking = [name for name in names if not isinstance(record, dict) or name not in record]
            if lacking:
                raise ValueError(f"{source}: {part}[{place}] lacks {lacking}: {str(record)[:200]}")
    for part in ("images", "categories"):
        if not document[part]:
            raise ValueError(f"{source} has no {part}; add them")
        for record in document[part]:
            if not is_whole(record["id"]):
                raise ValueError(f"{source}: the id {record['id']!r} in {part} is no whole number from 0 on")
    for record in document["annotations"]:
        for key in ("image_id", "category_id"):
            if not is_whole(record[key]):
                raise ValueError(f"{source}: {key} {record[key]!r} of an annotation is no whole number from 0 on")
    for image in document["images"]:
        if not all(is_whole(image[side]) and image[side] > 0 for side in ("width", "height")):
            raise ValueError(
                f"{source}: image {image['id']} is {image['width']!r} wide and {image['height']!r} high; give pixels"
            )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_unique(values: Sequence[Any], what: str, source: str) -> None:
    """Raises ValueError naming the values that stand twice."""
    twice = [repr(value) for value, count in Counter(map(str, values)).items() if count > 1]
    if twice:
        raise ValueError(f"{source}: {what} must be unique, these repeat: {name_some(twice)}")


def check_pixels(annotations: Sequence[dict[str, Any]], source: str) -> None:
    """Raises ValueError if all boxes together look like shares of the image instead of pixels."""
    boxes = [annotation["bbox"] for annotation in annotations if is_box(annotation["bbox"])]
    if boxes and max(map(max, boxes)) <= 1:
        raise ValueError(
            f"{source}: no number in any bbox is above 1, for example {boxes[0]}, so these are shares of the image; "
            "COCO's boxes are [x, y, width, height] in pixels, multiply by the width and height of the image"
        )


def is_box(box: Any) -> bool:
    """Whether a value is a list of four finite numbers."""
    return (
        isinstance(box, (list, tuple))
        and len(box) == 4
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in box)
    )


def annotation_problem(
    annotation: dict[str, Any], images: Mapping[int, dict[str, Any]], categories: set[int]
) -> tuple[str, str] | None:
    """Why an annotation cannot be used, as a kind to count by and a sentence with the value; None if it can."""
    box, image = annotation["bbox"], images.get(annotation["image_id"])
    if image is None:
        return "unknown image", "there is no image with this id"
    if annotation["category_id"] not in categories:
        return "unknown category", f"category_id {annotation['category_id']!r} is not among the categories"
    if not is_box(box):
        return "no box", f"bbox {box!r} is not four finite numbers [x, y, width, height]"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "empty box", f"bbox {list(box)} has width {width} and height {height}, both must be above 0"
    beyond = max(-x, -y, x + width - image["width"], y + height - image["height"])
    if beyond > OUTSIDE_TOLERANCE_PIXELS or min(cut_box(box, image)[2:]) <= 0:
        return (
            "outside",
            f"bbox {list(box)} reaches {beyond:g} pixels out of the image of {image['width']} x {image['height']} "
            "(it must be [x, y, width, height], not two corners)",
        )
    return None


def cut_box(box: Sequence[float], image: Mapping[str, Any]) -> list[float]:
    """A box `[x, y, width, height]`, cut at the borders of the image."""
    x, y = max(0.0, float(box[0])), max(0.0, float(box[1]))
    right, lower = min(box[0] + box[2], image["width"]), min(box[1] + box[3], image["height"])
    return [x, y, float(right) - x, float(lower) - y]


def usual_annotation(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """The parts of an annotation that are used, with a box inside the image; the area is that of the box if missing."""
    box = cut_box(annotation["bbox"], image)
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        # COCO's own areas are those of the object's outline; they decide what counts as small
        "area": float(annotation.get("area") or box[2] * box[3]),
        "iscrowd": int(annotation.get("iscrowd") or 0),
    }


def report_problems(problems: Sequence[tuple[str, str]], total: int, source: str, *, skip: bool) -> None:
    """Logs how many annotations are left out and why, or raises ValueError naming them."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(kind for kind, _ in problems).items()))
    message = f"{source}: {len(problems)} of {total} annotations cannot be used ({kinds}): " + name_some(
        text for _, text in problems
    )
    if not skip:
        raise ValueError(f"{message}. Repair them, or leave them out with --skip_bad_annotations")
    logger.warning("%s. They are left out.", message)


def check_same_categories(one: DetectionSplit, other: DetectionSplit) -> None:
    """Raises ValueError if two splits do not have the same categories under the same ids."""
    first, second = ({category["id"]: category["name"] for category in split.categories} for split in (one, other))
    differing = [
        f"{number} is {first.get(number)!r} there and {second.get(number)!r} here"
        for number in sorted(first.keys() | second.keys())
        if first.get(number) != second.get(number)
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
    missing = 0
    for row, image in enumerate(tqdm(split.images, desc="Checking the images")):
        cell = split.cell(image)
        if cell is not None and cell["bytes"] is None and cell["path"] and not Path(cell["path"]).is_file():
            problem: str | None = f"{cell['path']} (no such file)"
            missing += 1
        else:
            problem = checked_image(cell, image) if arguments.check_images else None
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
    if not any(split.boxes[split.images[row]["id"]] for row in kept):
        raise ValueError(f"the {len(kept)} chosen images of {split.name} have no boxes; choose more or other images")
    return split.select(kept)


def checked_image(cell: dict[str, Any] | None, image: Mapping[str, Any]) -> str | None:
    """Why an undecoded image cannot be used, None if it can."""
    problem = image_problem(cell, int(image.get("row", image["id"])))
    if problem is not None or cell is None:
        return problem
    size = file_size(cell)
    if size != (image["width"], image["height"]):
        return (
            f"{image['file_name']} is {size} pixels (width, height) and annotated as {image['width'], image['height']}"
        )
    return None


def file_size(cell: dict[str, Any] | None) -> tuple[int, int] | None:
    """Width and height of an undecoded image once it is turned as its file says; None if it is no image."""
    if cell is None:
        return None
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
            turned = image.getexif().get(EXIF_ORIENTATION) in EXIF_TURNED
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError):
        return None
