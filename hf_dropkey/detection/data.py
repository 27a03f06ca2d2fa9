"""Images with boxes around their objects, from where people keep them: read and checked.

`load_detection_data` takes folders of images with COCO annotation files, or a data set of the hub whose rows list
boxes in `objects`. Every annotation and image is checked before training time is spent. What comes out is COCO's
format whatever went in: category ids as they are, boxes `[x, y, width, height]` in pixels of the original image.

https://cocodataset.org/#format-data.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import tqdm

from ..extras import needed
from ..images.annotated import (
    AnnotatedImages,
    as_records,
    check_file_names,
    choose,
    file_cell,
    object_fields,
    read_annotations,
    row_cell,
    sized_record,
    usable_images,
)
from ..images.checks import name_some
from ..images.sources import check_known, data_fingerprint, load_named, split_names
from .annotations import TEXT_ID, checked_annotations
from .arguments import DetectionDataArguments


with needed("train"):
    import datasets
    from datasets import ClassLabel


logger = logging.getLogger(__name__)

CATEGORY_COLUMNS = ("category", "categories", "category_id", "label", "labels")


@dataclass(frozen=True)
class DetectionSplit(AnnotatedImages):
    """Checked images with boxes.

    Attributes:
        boxes: COCO's annotations of each image id, all usable; an image may have none.
        categories: COCO's categories, in the order of their ids.
    """

    boxes: dict[int, list[dict[str, Any]]]
    categories: list[dict[str, Any]]

    def annotations_as_text(self, row: int) -> str:
        """The boxes of an image with their categories."""
        names = {category["id"]: category["name"] for category in self.categories}
        boxes = self.boxes[self.images[row]["id"]]
        return json.dumps([(names[box["category_id"]], box["bbox"], box["iscrowd"]) for box in boxes])

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
        train: To train on; None if that was not requested.
        evaluation: To evaluate on; None if that was not requested.
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
        chosen = choose(reader(), limit)
        splits[role] = with_boxes(usable_images(chosen, check=arguments.check_images, skip=arguments.skip_bad_images))
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
        ValueError: The file is not JSON, lacks something, or has annotations that cannot be used.
    """
    document = read_annotations(folder, file, "COCO's format")
    images, boxes, categories = checked_annotations(document, str(file), skip=skip_bad_annotations)
    check_file_names(images, folder, str(file))
    return DetectionSplit(str(file), images, partial(file_cell, folder), boxes, categories)


def hub_splits(arguments: DetectionDataArguments) -> dict[str, Callable[[], DetectionSplit]]:
    """How to read each split of a hub data set.

    Raises:
        ValueError: A split that the arguments name is not there, or one serves both ends.
    """
    splits = load_named(str(arguments.dataset_name), arguments.dataset_config_name)
    names = split_names(splits, arguments.train_split_name, arguments.eval_split_name)
    return {
        role: partial(
            read_rows,
            splits[name],
            f"the {name} split of {arguments.dataset_name}",
            skip_bad_annotations=arguments.skip_bad_annotations,
        )
        for role, name in names.items()
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


def with_boxes(split: DetectionSplit) -> DetectionSplit:
    """The split, if it has boxes to learn from; crowd regions are reported.

    Raises:
        ValueError: It has none.
    """
    boxes, crowd = split.box_counts()
    if not boxes:
        regions = f" but {crowd} crowd regions (iscrowd 1), which are not used" if crowd else ""
        raise ValueError(
            f"the {len(split)} chosen images of {split.name} have no boxes{regions}; choose more or other images"
        )
    if crowd:
        logger.warning(
            "%s: %d boxes are used; %d annotations have iscrowd 1 (regions of many objects), which are neither trained "
            "on nor counted as misses",
            split.name,
            boxes,
            crowd,
        )
    return split
