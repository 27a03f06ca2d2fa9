"""Documents in COCO's format: what they must hold, and which of their annotations can be used.

https://cocodataset.org/#format-data.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..images.annotated import check_unique, is_box, is_whole, report_problems
from ..images.tables import is_whole_text


logger = logging.getLogger(__name__)

# annotation tools round, and some count pixels from 1
OUTSIDE_TOLERANCE_PIXELS = 1.0
# of categories whose ids are numbered here, which says what splits have in common
TEXT_ID = "text_id"
REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (),
    "categories": ("id", "name"),
}


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
    image_ids = whole_ids(document["images"], "images", source)
    category_ids = whole_ids(document["categories"], "categories", source)
    images = {
        number: {**image, "id": number, **{side: usual_id(image[side]) for side in ("width", "height")}}
        for number, image in zip(image_ids.values(), document["images"], strict=True)
    }
    categories = [
        {**category, "id": number} | ({} if number == text else {TEXT_ID: text})
        for (text, number), category in zip(category_ids.items(), document["categories"], strict=True)
    ]
    for part, key in (("annotations", "id"), ("categories", "name")):
        check_unique([record[key] for record in document[part] if key in record], f"{part}' {key}", source)
    check_pixels(document["annotations"], source)
    boxes: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    problems: list[tuple[str, str]] = []
    for place, found in enumerate(document["annotations"]):
        annotation = {
            **found,
            "image_id": image_ids.get(usual_id(found.get("image_id"))),
            "category_id": category_ids.get(usual_id(found.get("category_id"))),
        }
        problem = annotation_problem(annotation, found, images)
        if problem is not None:
            which = f"annotation {found['id']}" if "id" in found else f"annotation at place {place}"
            problems.append((problem[0], f"{which} of image {found.get('image_id')!r}: {problem[1]}"))
            continue
        boxes[annotation["image_id"]].append(usual_annotation(annotation, images[annotation["image_id"]]))
    if problems:
        report_problems(problems, len(document["annotations"]), source, skip=skip)
    check_boxes([one for found in boxes.values() for one in found], source)
    return list(images.values()), boxes, sorted(categories, key=lambda category: category["id"])


def check_structure(document: Any, source: str) -> None:
    """Raises ValueError if a document does not have COCO's parts, or a part's records lack a field."""
    if not isinstance(document, dict) or any(not isinstance(document.get(part), list) for part in REQUIRED):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{source} has {found}; COCO's format is an object with the lists {list(REQUIRED)}")
    for part, names in REQUIRED.items():
        for place, record in enumerate(document[part]):
            lacking = [name for name in names if not isinstance(record, dict) or name not in record]
            if lacking or not isinstance(record, dict):
                raise ValueError(f"{source}: {part}[{place}] lacks {lacking or 'fields'}: {str(record)[:200]}")
    for part in ("images", "categories"):
        if not document[part]:
            raise ValueError(f"{source} has no {part}; add them")
    for image in document["images"]:
        sides = [usual_id(image[side]) for side in ("width", "height")]
        if not all(is_whole(side) and 0 < side <= sys.maxsize for side in sides):
            raise ValueError(
                f"{source}: image {image['id']} is {image['width']!r} wide and {image['height']!r} high; give pixels"
            )


def usual_id(value: Any) -> Any:
    """An id as it is compared: whole numbers also where tools write them as text or with a fraction of 0."""
    if isinstance(value, str) and is_whole_text(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    # a list in place of an id is looked for like any other and not found
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else str(value)


def whole_ids(records: Sequence[dict[str, Any]], part: str, source: str) -> dict[Any, int]:
    """The whole number that stands for the id of each record, by that id; ids of text are numbered by place.

    Raises:
        ValueError: An id repeats, or is neither a whole number from 0 on nor text.
    """
    ids = [usual_id(record["id"]) for record in records]
    for record, number in zip(records, ids, strict=True):
        if not (is_whole(number) or (isinstance(number, str) and isinstance(record["id"], str))):
            raise ValueError(
                f"{source}: the id {record['id']!r} in {part} is neither a whole number from 0 on nor text"
            )
    check_unique(ids, f"{part}' id", source)
    if all(map(is_whole, ids)):
        return {number: number for number in ids}
    logger.info("%s: the ids of its %s are text, such as %r; they are numbered by place", source, part, ids[0])
    return {number: place for place, number in enumerate(ids, 1)}


def check_boxes(boxes: Sequence[dict[str, Any]], source: str) -> None:
    """Raises ValueError if none of the usable annotations is of a single object, which is all that models learn."""
    if not boxes:
        raise ValueError(f"{source} has no usable annotation; a model cannot learn from it, give it boxes")
    if all(box["iscrowd"] for box in boxes):
        raise ValueError(
            f"{source}: all {len(boxes)} annotations have iscrowd 1, which marks regions of many objects; these are "
            "neither trained on nor counted in the metrics. If they are single objects, as with tools that export masks, "
            "set iscrowd to 0 in the file"
        )


def check_pixels(annotations: Sequence[dict[str, Any]], source: str) -> None:
    """Raises ValueError if all boxes together look like shares of the image instead of pixels."""
    boxes = [annotation["bbox"] for annotation in annotations if is_box(annotation.get("bbox"))]
    if boxes and max(map(max, boxes)) <= 1:
        raise ValueError(
            f"{source}: no number in any bbox is above 1, for example {boxes[0]}, so these are shares of the image; "
            "COCO's boxes are [x, y, width, height] in pixels, multiply by the width and height of the image"
        )


def annotation_problem(
    annotation: dict[str, Any], found: Mapping[str, Any], images: Mapping[int, dict[str, Any]]
) -> tuple[str, str] | None:
    """Why an annotation cannot be used, as a kind to count by and a sentence with the value; None if it can.

    `annotation` is `found` with ids as whole numbers, None where there is no such image or category.
    """
    for key, kind in (("image_id", "unknown image"), ("category_id", "unknown category"), ("bbox", "no box")):
        if key not in found:
            return kind, f"it has no {key}"
    if annotation["image_id"] is None:
        return "unknown image", "there is no image with this id"
    if annotation["category_id"] is None:
        return "unknown category", f"category_id {found['category_id']!r} is not among the categories"
    box, image = annotation["bbox"], images[annotation["image_id"]]
    if not is_box(box):
        return "no box", f"bbox {box!r} is not four finite numbers [x, y, width, height]"
    for key in ("area", "iscrowd"):
        if not is_number(annotation.get(key) or 0):
            return f"no {key}", f"{key} {annotation[key]!r} is not a number"
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


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or text that is one."""
    try:
        return isinstance(value, (int, float, str)) and math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def usual_annotation(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """The parts of an annotation that are used, with a box inside the image; the area is that of the box if missing."""
    box = cut_box(annotation["bbox"], image)
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        # COCO's own areas are those of the object's outline; they decide what counts as small
        "area": float(annotation.get("area") or box[2] * box[3]),
        "iscrowd": int(float(annotation.get("iscrowd") or 0) != 0),
    }
