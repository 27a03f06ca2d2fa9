"""Images with pairs of persons and objects, from where people keep them: read and checked.

`load_hoi_data` takes folders of images with annotation files, in HOIA's form (PPDM's, QPIC's: HICO-DET and V-COCO) or in
F. Zhang's, a data set of the hub, or generated scenes. What comes out is the same whatever went in: boxes as corners in
pixels, classes and verbs by name, pairs as (person, object or -1, verb).
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils.logging import tqdm

from ..extras import needed
from ..images.annotated import (
    AnnotatedImages,
    as_records,
    check_file_names,
    choose,
    file_cell,
    file_size,
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
from ..images.sources import data_fingerprint, load_named, split_names
from .arguments import HoiDataArguments
from .metrics import NO_OBJECT, TruePairs
from .names import COCO_OBJECTS, HICO_VERBS, MISSING_OBJECT, VCOCO_VERBS, plain_name
from .scenes import SCENE_OBJECTS, SCENE_VERBS, scene_cell, scene_record


with needed("train"):
    import datasets
    from datasets import ClassLabel


logger = logging.getLogger(__name__)

# annotation tools round, and some count pixels from 1
OUTSIDE_TOLERANCE_PIXELS = 1.0
PERSON = "person"
# what the two public data sets call the verbs in files of HOIA's form, and which number is the first one
KNOWN_VERBS = {1: HICO_VERBS, 0: VCOCO_VERBS}


@dataclass(frozen=True)
class Annotation:
    """What is annotated in one image.

    Attributes:
        boxes: (left, top, right, bottom) in pixels `[n, 4]`.
        labels: Class of each box `[n]`.
        pairs: Person's box, object's box (-1: none) and verb of each interaction `[m, 3]`.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    pairs: NDArray[np.int64]


@dataclass(frozen=True)
class HoiSplit(AnnotatedImages):
    """Checked images with interactions.

    Attributes:
        annotations: Of each image, in the order of `images`; an image may have none.
        objects: Names of the classes, by the numbers in the annotations.
        verbs: Names of the verbs, the same way.
        left_out: How many annotations were left out, by reason.
    """

    annotations: list[Annotation]
    objects: list[str]
    verbs: list[str]
    left_out: Counter[str] = field(default_factory=Counter)

    def select(self, rows: Iterable[int]) -> "HoiSplit":
        """Some of the images, with their interactions."""
        rows = list(rows)
        return replace(
            self, images=[self.images[row] for row in rows], annotations=[self.annotations[row] for row in rows]
        )

    def annotations_as_text(self, row: int) -> str:
        """The boxes of an image with their classes, and its pairs."""
        one = self.annotations[row]
        names = [self.objects[label] for label in one.labels]
        pairs = [(int(person), int(thing), self.verbs[verb]) for person, thing, verb in one.pairs]
        return json.dumps([names, one.boxes.tolist(), pairs])

    def count(self, row: int) -> int:
        """The number of interactions of an image."""
        return len(self.annotations[row].pairs)

    def missing_objects(self) -> bool:
        """Whether somebody acts on no object."""
        return any((annotation.pairs[:, 1] == NO_OBJECT).any() for annotation in self.annotations)

    def renamed(self, objects: Sequence[str], verbs: Sequence[str]) -> "HoiSplit":
        """The same annotations with the numbers of other lists of names, which know all names in use.

        Raises:
            ValueError: A class or verb that is annotated is not among the names.
        """
        classes = numbers_of(self.objects, objects)
        actions = numbers_of(self.verbs, verbs)
        used = {int(label) for annotation in self.annotations for label in annotation.labels}
        acted = {int(verb) for annotation in self.annotations for verb in annotation.pairs[:, 2]}
        unknown = [self.objects[label] for label in sorted(used) if classes[label] is None]
        strange = [self.verbs[verb] for verb in sorted(acted) if actions[verb] is None]
        for names, what, known in ((unknown, "object classes", objects), (strange, "verbs", verbs)):
            if names:
                raise ValueError(
                    f"{self.name} has {len(names)} {what} that the model does not know: {name_some(names)}; the model "
                    f"knows {name_some(known)}. Use data with the model's {what}"
                )
        annotations = []
        for annotation in self.annotations:
            pairs = annotation.pairs.copy()
            pairs[:, 2] = [actions[verb] for verb in annotation.pairs[:, 2]]
            labels = np.array([classes[label] for label in annotation.labels], dtype=np.int64)
            annotations.append(replace(annotation, labels=labels, pairs=pairs))
        return replace(self, annotations=annotations, objects=list(objects), verbs=list(verbs))

    def truths(self) -> list[TruePairs]:
        """The annotations as scores take them."""
        return [TruePairs(one.boxes, one.labels, one.pairs) for one in self.annotations]

    def summary(self) -> str:
        """Counts of images, pairs, verbs and object classes, and what was left out."""
        pairs = sum(len({(int(p), int(o)) for p, o, _ in one.pairs}) for one in self.annotations)
        verbs = Counter(int(verb) for one in self.annotations for verb in one.pairs[:, 2])
        things = {int(one.labels[thing]) for one in self.annotations for thing in one.pairs[:, 1] if thing >= 0}
        bare = sum(not len(one.pairs) for one in self.annotations)
        text = (
            f"{self.name}: {len(self)} images ({bare} without interactions), {pairs} pairs with {verbs.total()} verbs; "
            f"{len(verbs)} of {len(self.verbs)} verbs and {len(things)} of {len(self.objects)} object classes occur"
        )
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            text += f"; left out: {reasons}"
        return text


def numbers_of(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """The place of each name among the known ones, spelling of spaces and capitals aside; None where it is not."""
    places = {plain_name(name): number for number, name in reversed(list(enumerate(known)))}
    return [places.get(plain_name(name)) for name in names]


@dataclass(frozen=True)
class HoiData:
    """What a model is trained and evaluated on.

    Attributes:
        train: To train on; None if that was not requested.
        evaluation: To evaluate on; None if that was not requested.
        objects: Class names in the order of the model's numbers, without the missing object.
        verbs: Verb names in the order of the model's numbers.
        missing_object: Whether somebody acts on no object in the data to train on, or the model knows of it.
    """

    train: HoiSplit | None
    evaluation: HoiSplit | None
    objects: list[str]
    verbs: list[str]
    missing_object: bool

    @property
    def person_label(self) -> int:
        """The class of the persons who act."""
        return next((n for n, name in enumerate(self.objects) if plain_name(name) == PERSON), 0)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Rows, names, boxes and interactions, and sizes of the images to `train` and for `evaluation`."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        return {name: data_fingerprint(split.identities()) for name, split in splits.items() if split is not None}

    def renamed(self, objects: Sequence[str], verbs: Sequence[str], *, missing_object: bool) -> "HoiData":
        """The same data with the numbers of a model's names.

        Raises:
            ValueError: The model lacks names of the data, or the class for missing objects.
        """
        train, evaluation = (split and split.renamed(objects, verbs) for split in (self.train, self.evaluation))
        splits = [split for split in (train, evaluation) if split is not None]
        if not missing_object and any(split.missing_objects() for split in splits):
            raise ValueError(
                "the data has interactions without an object, and the model has no class for a missing object; use "
                "another model, or leave these interactions out"
            )
        return HoiData(train, evaluation, list(objects), list(verbs), missing_object)


def load_hoi_data(arguments: HoiDataArguments, *, training: bool, evaluation: bool) -> HoiData:
    """Loads and checks what is needed.

    Raises:
        FileNotFoundError: A folder, an annotation file or (without `skip_bad_images`) an image is not there.
        ValueError: A split is missing, or annotations or images cannot be used.
    """
    readers = split_readers(arguments)
    wanted = {"train": training, "validation": evaluation}
    splits: dict[str, HoiSplit] = {}
    for role, reader in readers.items():
        if wanted[role]:
            limit = arguments.max_train_samples if role == "train" else arguments.max_eval_samples
            splits[role] = usable_images(
                choose(reader(), limit), check=arguments.check_images, skip=arguments.skip_bad_images
            )
            if not any(splits[role].count(row) for row in range(len(splits[role]))):
                raise ValueError(
                    f"the {len(splits[role])} chosen images of {splits[role].name} have no pairs; choose more or other "
                    "images"
                )
    for role in wanted:
        if wanted[role] and role not in splits:
            raise ValueError(
                f"no data for the {role} split; give --{role}_images and --{role}_annotations, --dataset_name, or "
                "--dataset scenes"
            )
    first = next(iter(splits.values()))
    objects, verbs = first.objects, first.verbs
    for split in splits.values():
        # the order of a second file's own numbers may differ, its names may not
        objects = objects + [
            name
            for name, place in zip(split.objects, numbers_of(split.objects, objects), strict=True)
            if place is None
        ]
        verbs = verbs + [
            name for name, place in zip(split.verbs, numbers_of(split.verbs, verbs), strict=True) if place is None
        ]
    splits = {role: split.renamed(objects, verbs) for role, split in splits.items()}
    missing = any(split.missing_objects() for split in splits.values())
    return HoiData(splits.get("train"), splits.get("validation"), objects, verbs, missing)


def split_readers(arguments: HoiDataArguments) -> dict[str, Callable[[], HoiSplit]]:
    """How to read each split that the arguments name."""
    if arguments.dataset == "scenes":
        return {
            role: partial(read_scenes, role, count, arguments.scene_size)
            for role, count in (("train", arguments.train_scenes), ("validation", arguments.validation_scenes))
        }
    if arguments.dataset_name:
        return hub_splits(arguments)
    files = {
        "train": (arguments.train_images, arguments.train_annotations),
        "validation": (arguments.validation_images, arguments.validation_annotations),
    }
    options: dict[str, Any] = {
        "names": read_names(arguments.names_file),
        "verb_base": arguments.verb_base,
        "skip": arguments.skip_bad_annotations,
    }
    return {
        role: partial(read_files, Path(images), Path(annotations), **options)
        for role, (images, annotations) in files.items()
        if images and annotations
    }


def read_scenes(role: str, count: int, size: int) -> HoiSplit:
    """Generated scenes, each drawn when it is requested; the two roles have different ones."""
    records = [scene_record(role, row, size) for row in range(count)]
    annotations = [
        Annotation(
            np.array(record.pop("boxes"), dtype=np.float64).reshape(-1, 4),
            np.array(record.pop("labels"), dtype=np.int64),
            np.array(record.pop("pairs"), dtype=np.int64).reshape(-1, 3),
        )
        for record in records
    ]
    name = f"generated scenes to {'train' if role == 'train' else 'evaluate'} on"
    return HoiSplit(name, records, scene_cell, annotations, list(SCENE_OBJECTS), list(SCENE_VERBS))


# --- annotation files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Names that a file of HOIA's form does not hold.

    Attributes:
        verbs: In the order of their numbers.
        objects: Name of each category number.
    """

    verbs: tuple[str, ...] | None = None
    objects: dict[int, str] | None = None


def read_names(file: str | None) -> Names:
    """Names from a JSON file `{"verbs": [...], "objects": {"1": "person", ...}}`; either part may be missing.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It holds something else.
    """
    if file is None:
        return Names()
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"the file of names {path} is not there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        verbs, objects = content.get("verbs"), content.get("objects")
        return Names(
            tuple(map(str, verbs)) if verbs is not None else None,
            {int(number): str(name) for number, name in objects.items()} if objects is not None else None,
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{path} holds no names ({error}); give {{"verbs": ["hold", ...], "objects": {{"1": "person", ...}}}}'
        ) from error


def read_files(folder: Path, file: Path, *, names: Names, verb_base: int | None, skip: bool) -> HoiSplit:
    """Images of a folder with the annotations of a file in either form; the images are not opened but for their size.

    Args:
        folder: Of the images.
        file: A JSON list in HOIA's form, or an object in that of F. Zhang's data sets.
        names: Names of verbs and categories; default: those of COCO, and of HICO-DET or V-COCO by the verb base.
        verb_base: The number of the first verb in HOIA's form, 1 in HICO-DET and 0 in V-COCO.
        skip: Leave out annotations that cannot be used, instead of stopping.
    """
    document = read_annotations(folder, file, "HOIA's form, a list of images with annotations and hoi_annotation")
    records = document if isinstance(document, list) else zhang_records(document, str(file))
    if isinstance(document, list):
        objects, verbs, records = hoia_names(records, str(file), names, verb_base)
    else:
        objects = dict(enumerate(document["objects"]))
        verbs, verb_base = tuple(document["classes"]), 0
    reader = _Reader(str(file), objects, verbs, 0 if verb_base is None else verb_base)
    check_file_names([{"id": number, **record} for number, record in enumerate(records)], folder, str(file))
    images, annotations = [], []
    for number, record in enumerate(records):
        image, annotation = reader.read(number, record, folder)
        images.append(image)
        annotations.append(annotation)
    reader.finish(skip=skip)
    return HoiSplit(
        str(file),
        images,
        partial(file_cell, folder),
        annotations,
        list(objects.values()),
        list(verbs),
        reader.left_out,
    )


def zhang_records(document: Any, source: str) -> list[dict[str, Any]]:
    """The records of F. Zhang's form in HOIA's: a box for each end of each pair, the same boxes joined.

    The form leaves pairs without an object out, so V-COCO's scenario 1 and 2 cannot be computed from it.

    Raises:
        ValueError: The document lacks a part.
    """
    parts = ("classes", "objects", "images", "annotations") if "classes" in document else ("verbs",)
    lacking = [part for part in ("classes", "objects", "annotations") if part not in document]
    if not isinstance(document, dict) or lacking:
        raise ValueError(
            f"{source} is neither a list of images in HOIA's form nor an object with 'classes', 'objects' and "
            f"'annotations'; it lacks {lacking or list(parts)}"
        )
    records = []
    for number, found in enumerate(document["annotations"]):
        missing = [key for key in ("boxes_h", "boxes_o", "actions", "objects", "file_name") if key not in found]
        if missing:
            raise ValueError(f"{source}: annotations[{number}] lacks {missing}: {str(found)[:200]}")
        boxes: list[dict[str, Any]] = []
        pairs = []
        person = next((n for n, name in enumerate(document["objects"]) if plain_name(name) == PERSON), 1)
        for one, other, verb, thing in zip(
            found["boxes_h"], found["boxes_o"], found["actions"], found["objects"], strict=True
        ):
            places = []
            for box, category in ((one, person), (other, thing)):
                entry = {"bbox": box, "category_id": category}
                if entry not in boxes:
                    boxes.append(entry)
                places.append(boxes.index(entry))
            pairs.append({"subject_id": places[0], "object_id": places[1], "category_id": verb})
        size = {key: found[key] for key in ("width", "height") if key in found}
        records.append({"file_name": found["file_name"], "annotations": boxes, "hoi_annotation": pairs, **size})
    return records


def hoia_names(
    records: list[Any], source: str, names: Names, verb_base: int | None
) -> tuple[dict[int, str], tuple[str, ...], list[Any]]:
    """Names of the categories and verbs of a file of HOIA's form.

    Raises:
        ValueError: Records lack a part, the verb base is not given, or it does not fit the numbers.
    """
    for number, record in enumerate(records):
        lacking = [
            k
            for k in ("file_name", "annotations", "hoi_annotation")
            if not isinstance(record, dict) or k not in record
        ]
        if lacking:
            raise ValueError(f"{source}: record {number} lacks {lacking}: {str(record)[:200]}")
    found = [
        one["category_id"]
        for record in records
        for one in record["hoi_annotation"]
        if is_whole(one.get("category_id"))
    ]
    if verb_base is None:
        raise ValueError(
            f"{source} numbers its verbs from 0 or from 1, which the file does not say (found {min(found, default=0)} to "
            f"{max(found, default=0)}); give --verb_base 1 for HICO-DET, --verb_base 0 for V-COCO"
        )
    verbs = names.verbs or KNOWN_VERBS[verb_base]
    wrong = sorted({verb for verb in found if not verb_base <= verb < verb_base + len(verbs)})
    if wrong:
        raise ValueError(
            f"{source}: the verbs {name_some(map(str, wrong))} are outside {verb_base} to {verb_base + len(verbs) - 1}, "
            f"the numbers of {len(verbs)} verbs from {verb_base} on; give another --verb_base (1 for HICO-DET, 0 for "
            "V-COCO), or --names_file with the names of your own verbs. Do not join files that count from different "
            "numbers"
        )
    if names.verbs is None:
        known = "HICO-DET" if verb_base else "V-COCO"
        logger.info(
            "%s: the verbs are taken for those of %s (%s, ...); give --names_file if they are others",
            source,
            known,
            ", ".join(verbs[:3]),
        )
    return dict(names.objects or COCO_OBJECTS), tuple(verbs), records


class _Reader:
    """Reads records of HOIA's form one by one and collects what cannot be used."""

    def __init__(
        self,
        source: str,
        categories: Mapping[int, str],
        verbs: Sequence[str],
        verb_base: int,
        form: str = "[left, top, right, bottom]",
    ):
        self.form = form
        self.source, self.categories, self.verbs, self.verb_base = source, dict(categories), verbs, verb_base
        self.numbers = {category: number for number, category in enumerate(categories)}
        self.problems: list[tuple[str, str]] = []
        self.left_out: Counter[str] = Counter()
        self.total = 0

    def read(self, number: int, record: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], Annotation]:
        """The image record and the annotation of one image."""
        image = {"id": number, "file_name": record["file_name"], **{k: record[k] for k in ("row",) if k in record}}
        if all(is_whole(record.get(side)) and record[side] > 0 for side in ("width", "height")):
            image |= {"width": record["width"], "height": record["height"]}
        else:
            file = folder and folder / image["file_name"]
            size = file_size(file_cell(folder, image)) if folder and file and file.is_file() else None
            # the check of the images tells what is wrong with one that has no size, so its boxes are none of its faults
            image |= dict(zip(("width", "height"), size or (sys.maxsize, sys.maxsize), strict=True))
        boxes: list[list[float]] = []
        labels, places = [], {}
        for place, one in enumerate(record["annotations"]):
            problem = self.box_problem(one, image)
            if problem:
                self.note(problem, f"annotation {place} of image {number} ({record['file_name']})")
                continue
            places[place] = len(boxes)
            left, top, right, bottom = one["bbox"]
            boxes.append(
                [max(0.0, left), max(0.0, top), min(right, float(image["width"])), min(bottom, float(image["height"]))]
            )
            labels.append(self.numbers[one["category_id"]])
        pairs = []
        for place, one in enumerate(record["hoi_annotation"]):
            self.total += 1
            problem = self.pair_problem(one, record["annotations"], places)
            if problem:
                self.note(problem, f"interaction {place} of image {number} ({record['file_name']})")
                continue
            thing = one["object_id"]
            pairs.append(
                (
                    places[one["subject_id"]],
                    NO_OBJECT if thing == NO_OBJECT else places[thing],
                    one["category_id"] - self.verb_base,
                )
            )
        unique = sorted(set(pairs))
        self.left_out["repeated interactions"] += len(pairs) - len(unique)
        return image, Annotation(
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(unique, dtype=np.int64).reshape(-1, 3),
        )

    def note(self, problem: tuple[str, str], where: str) -> None:
        """Remembers what cannot be used."""
        self.problems.append((problem[0], f"{where}: {problem[1]}"))

    def box_problem(self, one: Mapping[str, Any], image: Mapping[str, Any]) -> tuple[str, str] | None:
        """Why a box cannot be used, as a kind to count by and a sentence; None if it can."""
        box: Any = one.get("bbox")
        category: Any = one.get("category_id")
        if category not in self.numbers:
            return "unknown category", f"category_id {category!r} is not among the categories"
        if not is_box(box):
            return "no box", f"bbox {box!r} is not four finite numbers {self.form}"
        left, top, right, bottom = box
        if right <= left or bottom <= top:
            return (
                "empty box",
                f"the corners {list(box)} leave no area; in the file a bbox must be {self.form}, wider and higher than 0",
            )
        beyond = max(-left, -top, right - image["width"], bottom - image["height"])
        outside = left >= image["width"] or top >= image["height"] or right <= 0 or bottom <= 0
        if beyond > OUTSIDE_TOLERANCE_PIXELS or outside:
            return (
                "outside",
                f"bbox {list(box)} reaches {beyond:g} pixels out of the image of {image['width']} x {image['height']} "
                f"(in the file it must be {self.form} in pixels)",
            )
        return None

    def pair_problem(
        self, one: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], places: Mapping[int, int]
    ) -> tuple[str, str] | None:
        """Why an interaction cannot be used; None if it can."""
        person: Any = one.get("subject_id")
        thing: Any = one.get("object_id")
        verb: Any = one.get("category_id")
        if not is_whole(verb) or not 0 <= verb - self.verb_base < len(self.verbs):
            return "unknown verb", f"the verb {verb!r} is not one of {len(self.verbs)} verbs from {self.verb_base} on"
        for what, place, none_allowed in (("subject_id", person, False), ("object_id", thing, True)):
            if none_allowed and place == NO_OBJECT:
                continue
            if not is_whole(place) or place >= len(annotations):
                return "index out of range", f"{what} {place!r} is not a place among {len(annotations)} annotations"
            if place not in places:
                return "unusable box", f"{what} {place} is a box that cannot be used"
        if plain_name(self.categories[annotations[person]["category_id"]]) != PERSON:
            name = self.categories[annotations[person]["category_id"]]
            return "no person", f"subject_id {person} is a {name}, not a person"
        return None

    def finish(self, *, skip: bool) -> None:
        """Reports what cannot be used.

        Raises:
            ValueError: Something cannot be used, and it is not to be left out.
        """
        if self.problems:
            report_problems(self.problems, self.total, self.source, skip=skip)
            self.left_out.update(kind for kind, _ in self.problems)
        self.left_out = +self.left_out


# --- hub rows ----------------------------------------------------------------------------------------------------------


def hub_splits(arguments: HoiDataArguments) -> dict[str, Callable[[], HoiSplit]]:
    """How to read each split of a hub data set, or of one in a folder.

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
            skip=arguments.skip_bad_annotations,
        )
        for role, name in names.items()
    }


def read_rows(rows: datasets.Dataset, name: str, *, skip: bool) -> HoiSplit:
    """A data set whose rows have an `image`, `objects` (`bbox`, `category`) and `interactions` (`person`, `object`, `verb`).

    A `bbox` is [x, y, width, height] in pixels, as in data sets for detection, `person` and `object` are places among the row's objects, -1 for no
    object; categories and verbs are ClassLabels or text.

    Raises:
        ValueError: A column is missing, or annotations cannot be used.
    """
    needed = {"objects": ("bbox", "category"), "interactions": ("person", "object", "verb")}
    kinds: dict[str, dict[str, Any]] = {}
    for column in ("image", *needed):
        if column not in rows.features:
            raise ValueError(f"{name} has no column {column!r}, only {list(rows.features)}; rename its columns")
    for column, keys in needed.items():
        kinds[column] = object_fields({"objects": rows.features[column]})
        lacking = [key for key in keys if key not in kinds[column]]
        if lacking:
            raise ValueError(f"`{column}` of {name} has {sorted(kinds[column])}; it lacks {lacking}")
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    columns = [column for column in ("width", "height", *needed) if column in rows.features]
    records: list[dict[str, Any]] = []
    found: Any
    for number, found in enumerate(tqdm(rows.select_columns(columns), desc=f"Reading {name}")):
        size = sized_record(found, None if "width" in found and "height" in found else undecoded[number]["image"])
        boxes: list[Any] = [
            {"bbox": two_corners(one["bbox"]), "category_id": one["category"]} for one in as_records(found["objects"])
        ]
        pairs: list[Any] = [
            {"subject_id": one["person"], "object_id": one["object"], "category_id": one["verb"]}
            for one in as_records(found["interactions"])
        ]
        records.append(
            {"file_name": f"row {number}", "row": number, "annotations": boxes, "hoi_annotation": pairs, **size}
        )
    objects = row_names(kinds["objects"]["category"], [box for record in records for box in record["annotations"]])
    verbs = row_names(kinds["interactions"]["verb"], [one for record in records for one in record["hoi_annotation"]])
    reader = _Reader(name, dict(enumerate(objects)), verbs, 0, "[x, y, width, height]")
    read = [reader.read(number, record, None) for number, record in enumerate(records)]
    reader.finish(skip=skip)
    images, annotations = [image for image, _ in read], [annotation for _, annotation in read]
    return HoiSplit(name, images, partial(row_cell, undecoded), annotations, objects, verbs, reader.left_out)


def two_corners(box: Any) -> Any:
    """[x, y, width, height] as [left, top, right, bottom]; what is not a box stays as it is, for the check to name."""
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]] if is_box(box) else box


def row_names(kind: Any, entries: list[dict[str, Any]]) -> list[str]:
    """The names that a column declares, or its values in alphabetical order; text is replaced by numbers."""
    if isinstance(kind, ClassLabel):
        return list(kind.names)
    values = sorted({one["category_id"] for one in entries}, key=str)
    for one in entries:
        one["category_id"] = values.index(one["category_id"])
    return [str(value) for value in values]


def model_labels(data: HoiData) -> dict[int, str]:
    """The object classes of a model for the data, the missing object last."""
    return dict(enumerate([*data.objects, *([MISSING_OBJECT] if data.missing_object else [])]))


def read_allowed(file: str | None, objects: int, verbs: int) -> NDArray[np.floating] | None:
    """The matrix of allowed combinations `[V, O]` in a `corre_*.npy` file, None without a file.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is not a matrix of that size.
    """
    if file is None:
        return None
    if not Path(file).is_file():
        raise FileNotFoundError(f"the matrix of allowed combinations {file} is not there")
    try:
        matrix = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} is not a .npy file of numbers ({error})") from error
    if matrix.shape != (verbs, objects):
        raise ValueError(
            f"{file} has the shape {matrix.shape}; needed is a row for each of {verbs} verbs and a column for each of "
            f"{objects} object classes"
        )
    return np.asarray(matrix, dtype=np.float64)
