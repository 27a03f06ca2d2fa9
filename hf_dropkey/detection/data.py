"""Images with boxes around their objects, from where people keep them: read and checked.

`load_detection_data` takes folders of images with COCO annotation files, or a data set of the hub whose rows list
boxes in `objects`. Every annotation and image is checked before training time is spent. What comes out is COCO's
format whatever went in: category ids as they are, boxes `[x, y, width, height]` in pixels of the original image.

https://cocodataset.org/#format-data.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import tqdm

from ..extras import needed
from ..images.annotated import (
    AnnotatedImages,
    as_records,
    check_unique,
    choose,
    file_cell,
    is_box,
    is_whole,
    object_fields,
    read_annotations,
    report_problems,
    row_cell,
    sized_record,
    usable_images,
)
from ..images.checks import name_some
from ..images.sources import EVALUATION_SPLITS, check_known
from .arguments import DetectionDataArguments


with needed("train"):
    import datasets
    from datasets import ClassLabel


logger = logging.getLogger(__name__)

# annotation tools round, and some count pixels from 1
OUTSIDE_TOLERANCE_PIXELS = 1.0
CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")
REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class DetectionSplit(AnnotatedImages):
    """Checked images with boxes.

    Attributes:
        boxes: COCO's annotations of each image id, all usable; an image may have none.
        categories: COCO's categories, in the order of their ids.
    """

    boxes: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]

    def select(self, rows: Iterable[int]) -> "DetectionSplit":
        """Some of the images, with their boxes."""
        return replace(self, images=[self.images[row] for row in rows])

    def count(self, row: int) -> int:
        """The number of boxes of an image."""
        return len(self.boxes[self.images[row]["id"]])


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
        splits[role] = usable_images(
            choose(reader(), limit), check=arguments.check_images, skip=arguments.skip_bad_images, what="boxes"
        )
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
    document = read_annotations(folder, file, "COCO's format")
    images, boxes, categories = checked_annotations(document, str(file), skip=skip_bad_annotations)
    return DetectionSplit(str(file), images, partial(file_cell, folder), boxes, categories)


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
        image |= sized_record(row, undecoded[number]["image"])
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
    return DetectionSplit(name, images, partial(row_cell, undecoded), boxes, categories)


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


def check_pixels(annotations: Sequence[dict[str, Any]], source: str) -> None:
    """Raises ValueError if all boxes together look like shares of the image instead of pixels."""
    boxes = [annotation["bbox"] for annotation in annotations if is_box(annotation["bbox"])]
    if boxes and max(map(max, boxes)) <= 1:
        raise ValueError(
            f"{source}: no number in any bbox is above 1, for example {boxes[0]}, so these are shares of the image; "
            "COCO's boxes are [x, y, width, height] in pixels, multiply by the width and height of the image"
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
