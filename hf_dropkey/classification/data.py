"""Image data sets for classification, from the usual sources.

`load_image_data` takes the built-in digits, a data set of the hub, image folders, or parquet, CSV or JSON files; finds
the columns and the class names; and checks every image and label before training time is spent. The result has the
same three columns for every source.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import needed
from ..images.checks import drop_bad_images, name_some, with_named_images
from ..images.sources import (
    CHOICE_SEED,
    EVALUATION_SPLITS,
    check_known,
    data_fingerprint,
    image_bytes,
    image_name,
    near_names,
)
from .arguments import DataArguments
from .sources import is_text, labels_of, load_splits, stratified_rows


with needed("train"):
    import datasets
    from datasets import ClassLabel, Dataset, Value


logger = logging.getLogger(__name__)

CLASSES_LOGGED = 200
FINGERPRINT_ROWS = 256


@dataclass(frozen=True)
class ImageData:
    """Checked images for a classifier.

    The data sets have three columns: `image` (a PIL image), `label` (as it was found) and `row` (its number in the
    original split, which stays the same when other rows are left out).

    Attributes:
        train: To train on; None if only evaluation was requested.
        evaluation: To evaluate on.
        evaluation_split: Name of that split.
        label_names: Class names, in the order of their ids.
        label_ids: Id of each value of `label`.
    """

    train: Dataset | None
    evaluation: Dataset
    evaluation_split: str
    label_names: list[str]
    label_ids: dict[Any, int]

    def with_label_names(self, names: Sequence[str]) -> "ImageData":
        """The same data with the class ids of a model whose classes are `names`, in that order.

        Raises:
            ValueError: The data has classes that are not among `names`.
        """
        check_known(self.label_names, names)
        ids = {value: names.index(self.label_names[old]) for value, old in self.label_ids.items()}
        return replace(self, label_names=list(names), label_ids=ids)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Rows, names, labels and sizes of the images to `train` and for `evaluation` (`data_fingerprint`)."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        return {name: data_fingerprint(self._identities(split)) for name, split in splits.items() if split is not None}

    def _identities(self, split: Dataset) -> Iterator[tuple[str, str, int]]:
        undecoded = split.with_format(None).cast_column("image", datasets.Image(decode=False))
        for batch in undecoded.iter(FINGERPRINT_ROWS):
            for cell, label, row in zip(batch["image"], batch["label"], batch["row"], strict=True):
                name = image_name(cell and cell["path"], row)
                yield name, self.label_names[self.label_ids[label]], image_bytes(cell)

    def class_counts(self, split: str) -> Counter[int]:
        """Number of images of each class id in `train` or `evaluation`."""
        rows: Dataset | None = getattr(self, split)
        return Counter() if rows is None else Counter(map(self.label_ids.__getitem__, labels_of(rows)))


def load_image_data(arguments: DataArguments, *, training: bool) -> ImageData:
    """Loads and checks the data; without `training` only what evaluation needs.

    Raises:
        FileNotFoundError: A folder or file is not there.
        ValueError: A split, column or label is missing or cannot be used, or images cannot be read.
    """
    splits = load_splits(arguments)
    train, evaluation, evaluation_split = choose_splits(splits, arguments, training=training)
    label_names, label_ids = find_labels(evaluation if train is None else train)
    if train is not None:
        check_several_classes(train, label_ids, label_names)
    for one, other in near_names(label_names):
        logger.warning("the classes %r and %r differ only in spaces or capitals; are they one class?", one, other)
    evaluation = prepare_split(
        evaluation, evaluation_split, arguments, label_ids=label_ids, max_samples=arguments.max_eval_samples
    )
    if train is not None:
        train = prepare_split(
            train, arguments.train_split_name, arguments, label_ids=label_ids, max_samples=arguments.max_train_samples
        )
    data = ImageData(train, evaluation, evaluation_split, label_names, label_ids)
    log_classes(data)
    return data


def check_several_classes(train: Dataset, label_ids: Mapping[Any, int], label_names: Sequence[str]) -> None:
    """Raises ValueError if the training images are all of one class, which any model gets right."""
    present = {label_ids[label] for label in labels_of(train) if label in label_ids}
    if len(present) == 1:
        raise ValueError(
            f"all {len(train)} images to train on are of one class, {label_names[present.pop()]!r}; give images of at "
            "least two classes: a sub-folder for each, or another --label_column_name"
        )


def log_classes(data: ImageData) -> None:
    """Logs the number of images of each class, to train and to evaluate on."""
    counts = {name: data.class_counts(name) for name in ("train", "evaluation")}
    for number, name in enumerate(data.label_names[:CLASSES_LOGGED]):
        trained, evaluated = (str(counts[split][number]) for split in ("train", "evaluation"))
        words = f"{evaluated} images to evaluate on"
        logger.info("class %s: %s", name, words if data.train is None else f"{trained} images to train on, {words}")
    if len(data.label_names) > CLASSES_LOGGED:
        logger.info("and %d more classes", len(data.label_names) - CLASSES_LOGGED)
    untrained = [name for number, name in enumerate(data.label_names) if not counts["train"][number]]
    if data.train is not None and untrained:
        logger.warning("%d classes have no image to train on: %s", len(untrained), name_some(map(repr, untrained)))
    unseen = [name for number, name in enumerate(data.label_names) if not counts["evaluation"][number]]
    if unseen:
        logger.warning(
            "%d classes have no image to evaluate on, so that the metrics say nothing of them: %s",
            len(unseen),
            name_some(map(repr, unseen)),
        )


def choose_splits(
    splits: dict[str, Dataset], arguments: DataArguments, *, training: bool
) -> tuple[Dataset | None, Dataset, str]:
    """The split to train on (None without `training`), the one to evaluate on and its name.

    Raises:
        ValueError: A split that is needed or configured is not there, or both are the same.
    """
    train_name = arguments.train_split_name
    usual = None if arguments.hold_out_validation else next((n for n in EVALUATION_SPLITS if n in splits), None)
    evaluation_name = arguments.eval_split_name or usual
    needed = [train_name] if training or evaluation_name is None else []
    for name in [*needed, *([evaluation_name] if evaluation_name else [])]:
        if name not in splits:
            raise ValueError(
                f"no split {name!r} among {list(splits)}; choose with --train_split_name and --eval_split_name, "
                "or name its folder or file"
            )
    if training and evaluation_name == train_name:
        raise ValueError(f"split {train_name!r} is for training and evaluation; choose another --eval_split_name")
    if evaluation_name is not None:
        return splits[train_name] if training else None, splits[evaluation_name], evaluation_name
    whole = splits[train_name]
    kept = stratified_rows(labels_of(whole), fraction=arguments.train_val_split)
    train = whole.select(np.setdiff1d(np.arange(len(whole)), kept)) if training else None
    return train, whole.select(kept), f"{arguments.train_val_split:g} of {train_name}"


def find_labels(split: Dataset) -> tuple[list[str], dict[Any, int]]:
    """Class names in the order of their ids, and the id of each value of the `label` column.

    Raises:
        ValueError: The column holds neither classes nor strings nor integers.
    """
    kind = split.features["label"]
    if isinstance(kind, ClassLabel):
        return list(kind.names), {number: number for number in range(kind.num_classes)}
    if not (is_text(kind) or (isinstance(kind, Value) and ("int" in kind.dtype or kind.dtype == "bool"))):
        raise ValueError(f"the label column holds {kind}; allowed are ClassLabel, string and integer columns")
    # numbers below 0 stand for no class, as in the unlabelled splits of the hub
    values = sorted(value for value in set(labels_of(split)) if value is not None and (is_text(kind) or value >= 0))
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def prepare_split(
    split: Dataset, name: str, arguments: DataArguments, *, label_ids: dict[Any, int], max_samples: int | None
) -> Dataset:
    """The rows to use: at most `max_samples`, with known labels and readable images.

    Raises:
        ValueError: The split has no rows, or labels or images that cannot be used.
    """
    if max_samples is not None and max_samples < len(split):
        # folders come sorted by class, so the first rows would be one class
        split = split.shuffle(seed=CHOICE_SEED).select(range(max_samples))
    if len(split) == 0:
        raise ValueError(f"the {name} split has no rows; give it images, or choose another split")
    check_labels(split, name, label_ids)
    if arguments.check_images:
        processes = arguments.preprocessing_num_workers
        split = drop_bad_images(split, name, skip=arguments.skip_bad_images, processes=processes)
    return with_named_images(split)


def check_labels(split: Dataset, name: str, label_ids: Mapping[Any, int]) -> None:
    """Raises ValueError if rows have labels that are not classes; counts them and names the first row of each."""
    strange: dict[str, list[int]] = {}
    for place, label in enumerate(labels_of(split)):
        if label not in label_ids:
            strange.setdefault("no label" if label is None else str(label), []).append(place)
    if strange:
        shown = (
            f"{label} ({len(places)} times, first in {first_place(split, places[0])})"
            for label, places in strange.items()
        )
        raise ValueError(
            f"{sum(map(len, strange.values()))} of {len(split)} labels in the {name} split are not classes of the training "
            f"data: {name_some(shown)}; repair them, or choose with --label_column_name and --eval_split_name. Numbers "
            "below 0 stand for no class"
        )


def first_place(split: Dataset, place: int) -> str:
    """A row in a message: its number, and its file where it has one."""
    found = split.select([place]).cast_column("image", datasets.Image(decode=False))[0]
    file = found["image"] and found["image"]["path"]
    return f"row {found['row']}{f' ({Path(file).name})' if file else ''}"
