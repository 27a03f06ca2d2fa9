"""Image data sets for classification, from the places where people keep them.

`load_image_data` takes the built-in digits, a data set of the hub, image folders, or parquet, CSV or JSON files; finds
the columns and the class names; and checks every image and label before training time is spent. What comes out has
the same three columns whatever went in.
"""

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from sklearn.datasets import load_digits

from ..images.checks import drop_bad_images, name_some, with_named_images
from ..images.folders import (
    METADATA_FILES,
    check_class_folders,
    check_classes_of_splits,
    local_class_folders,
    read_class_folders,
    tell_left_out,
)
from ..images.sources import CHOICE_SEED, EVALUATION_SPLITS, check_known, load_named, near_names
from ..images.tables import escaped, labels_from_text, matching_files, read_csv
from .arguments import DataArguments


logger = logging.getLogger(__name__)

DIGITS_TEST_SHARE = 0.2
FILE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
IMAGE_COLUMNS = ("image", "img", "file_name", "file", "path")
LABEL_COLUMNS = ("label", "labels", "class", "target")
CLASSES_TOLD = 200


@dataclass(frozen=True)
class ImageData:
    """Checked images for a classifier.

    The data sets have three columns: `image` (a PIL image), `label` (as it was found) and `row` (its number in the
    split it came from, the identity of an image whatever was chosen or skipped around it).

    Attributes:
        train: To train on; None if only evaluation was asked for.
        evaluation: To evaluate on.
        evaluation_split: What that split is called.
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
    tell_classes(data)
    return data


def labels_of(split: Dataset) -> list[Any]:
    """The `label` column, without a look at the images."""
    labels: list[Any] = split.select_columns("label").with_format(None)["label"][:]
    return labels


def check_several_classes(train: Dataset, label_ids: Mapping[Any, int], label_names: Sequence[str]) -> None:
    """Raises ValueError if the training images are all of one class, which any model gets right."""
    present = {label_ids[label] for label in labels_of(train) if label in label_ids}
    if len(present) == 1:
        raise ValueError(
            f"all {len(train)} images to train on are of one class, {label_names[present.pop()]!r}; give images of two "
            "classes or more: a sub-folder for each, or another --label_column_name"
        )


def tell_classes(data: ImageData) -> None:
    """Logs the number of images of each class, to train and to evaluate on."""
    counts = {name: data.class_counts(name) for name in ("train", "evaluation")}
    for number, name in enumerate(data.label_names[:CLASSES_TOLD]):
        trained, evaluated = (str(counts[split][number]) for split in ("train", "evaluation"))
        words = f"{evaluated} images to evaluate on"
        logger.info("class %s: %s", name, words if data.train is None else f"{trained} images to train on, {words}")
    if len(data.label_names) > CLASSES_TOLD:
        logger.info("and %d more classes", len(data.label_names) - CLASSES_TOLD)
    untrained = [name for number, name in enumerate(data.label_names) if not counts["train"][number]]
    if data.train is not None and untrained:
        logger.warning("%d classes have no image to train on: %s", len(untrained), name_some(map(repr, untrained)))


def load_splits(arguments: DataArguments) -> dict[str, Dataset]:
    """All splits of the source that the arguments name, with the columns `image`, `label` and `row`."""
    splits: Mapping[str, Dataset]
    if arguments.is_digits:
        splits = usual_splits(digits(), arguments)
    elif arguments.dataset_name:
        folders = local_class_folders(Path(arguments.dataset_name))
        if folders is None or arguments.dataset_config_name:
            found = load_named(arguments.dataset_name, arguments.dataset_config_name)
        else:
            found = load_folders(folders, dict.fromkeys(folders, "--dataset_name"))
        splits = usual_splits(found, arguments)
    elif arguments.train_dir or arguments.validation_dir:
        splits = load_directories(arguments)
    else:
        splits = load_files({"train": arguments.train_file, "validation": arguments.validation_file}, arguments)
    return {name: split.add_column("row", list(range(len(split)))) for name, split in splits.items()}


def usual_splits(splits: Mapping[str, Dataset], arguments: DataArguments) -> dict[str, Dataset]:
    """The splits with the columns `image` and `label`; relative paths start at the working directory."""
    return {name: with_usual_columns(split, arguments, base=Path()) for name, split in splits.items()}


def digits() -> DatasetDict:
    """Handwritten digits of scikit-learn: 1,797 scans of 8 x 8 pixels, a fifth of each class as `test`.

    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    source = load_digits()
    # sixteen grey levels above black, spread over the eight bits of an image file
    images = [Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)) for pixels in source.images]
    rows = {"image": [{"bytes": png_bytes(image), "path": None} for image in images], "label": source.target.tolist()}
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[str(n) for n in source.target_names])})
    test = stratified_share(rows["label"], share=DIGITS_TEST_SHARE)
    chosen = {"train": np.setdiff1d(np.arange(len(images)), test), "test": test}
    return DatasetDict(
        {
            split: Dataset.from_dict({name: [column[i] for i in numbers] for name, column in rows.items()}, features)
            for split, numbers in chosen.items()
        }
    )


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def load_directories(arguments: DataArguments) -> Mapping[str, Dataset]:
    """The folders of --train_dir and --validation_dir: one sub-folder per class, or a table called metadata.

    Raises:
        FileNotFoundError: A folder is not there.
        ValueError: A folder holds what cannot be meant, or only one of both has a table.
    """
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    given = {split: Path(folder) for split, folder in folders.items() if folder}
    for split, folder in given.items():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the {split} folder {folder} is not there; check --train_dir and --validation_dir"
            )
    tables = {
        split: [str(folder / name) for name in METADATA_FILES if (folder / name).is_file()]
        for split, folder in given.items()
    }
    if not any(tables.values()):
        return usual_splits(load_folders(given, {split: f"--{split}_dir" for split in given}), arguments)
    if any(len(found) != 1 for found in tables.values()):
        raise ValueError(
            f"{name_some(file for found in tables.values() for file in found)}: a table in every folder, one, or in "
            "none; name tables with --train_file and --validation_file"
        )
    return load_files({split: found[0] for split, found in tables.items()}, arguments)


def load_folders(folders: Mapping[str, Path], options: Mapping[str, str]) -> dict[str, Dataset]:
    """Image folders with one sub-folder per class, all with the same classes; `options` name them in messages.

    Raises:
        ValueError: A folder holds what cannot be meant; says what.
    """
    found = {split: read_class_folders(folder) for split, folder in folders.items()}
    for split, classes in found.items():
        check_class_folders(classes, options[split])
    for split, classes in found.items():
        if split != "train" and "train" in found:
            check_classes_of_splits(found["train"], classes, options[split])
        tell_left_out(classes, split)
    names = sorted({name for classes in found.values() for name in classes.images})
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    splits = {}
    for split, classes in found.items():
        rows = classes.rows()
        columns = {"image": [file for file, _ in rows], "label": [names.index(name) for _, name in rows]}
        splits[split] = Dataset.from_dict(columns, features)
    return splits


def load_files(patterns: Mapping[str, str | None], arguments: DataArguments) -> dict[str, Dataset]:
    """Parquet, CSV or JSON files; each value is a path or a glob pattern. Image paths start at the file's folder."""
    files = {split: matching_files(pattern) for split, pattern in patterns.items() if pattern}
    for split, found in files.items():
        if not found:
            raise FileNotFoundError(
                f"no {split} file matches {patterns[split]}; check --train_file and --validation_file"
            )
    suffixes = {Path(file).suffix.lower() for found in files.values() for file in found}
    if len(suffixes) > 1 or not suffixes <= FILE_LOADERS.keys():
        raise ValueError(f"data files end in {sorted(suffixes)}; use files of one kind among {sorted(FILE_LOADERS)}")
    # one part for each folder, the first of which has the name of the split
    parts = {
        f"{split}_{number}" if number else split: (split, folder, list(group))
        for split, found in files.items()
        for number, (folder, group) in enumerate(groupby(found, lambda file: Path(file).parent))
    }
    loader = FILE_LOADERS[suffixes.pop()]
    if loader == "csv":
        loaded = {part: csv_rows(found) for part, (_, _, found) in parts.items()}
    else:
        loaded = datasets.load_dataset(
            loader, data_files={part: escaped(found) for part, (_, _, found) in parts.items()}
        )
    usual = {part: with_usual_columns(loaded[part], arguments, base=folder) for part, (_, folder, _) in parts.items()}
    if loader == "csv":
        labels = labels_from_text([labels_of(rows) for rows in usual.values()])
        usual = {
            part: rows.remove_columns("label").add_column("label", column)
            for (part, rows), column in zip(usual.items(), labels, strict=True)
        }
    return {
        split: datasets.concatenate_datasets([usual[part] for part, about in parts.items() if about[0] == split])
        for split in files
    }


def csv_rows(files: Sequence[str]) -> Dataset:
    """The rows of CSV files of the same columns, all text.

    Raises:
        ValueError: The columns differ, or a file cannot be read.
    """
    tables = {file: read_csv(Path(file)) for file in files}
    first = next(iter(tables.values()))
    for file, table in tables.items():
        if table.keys() != first.keys():
            raise ValueError(f"{file} has the columns {list(table)} and {files[0]} has {list(first)}; use the same")
    columns = {name: [cell for table in tables.values() for cell in table[name]] for name in first}
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))


def with_usual_columns(split: Dataset, arguments: DataArguments, *, base: Path) -> Dataset:
    """The split with the columns `image` and `label`; relative paths of image files start at `base`."""
    image_column = find_image_column(split.features, arguments.image_column_name)
    label_column = find_label_column(split.features, arguments.label_column_name)
    split = split.select_columns([image_column, label_column])
    if is_text(split.features[image_column]):
        paths = [str(base / path) if path else None for path in split[image_column]]
        split = split.remove_columns(image_column).add_column(image_column, paths)
    if not isinstance(split.features[image_column], datasets.Image):
        split = split.cast_column(image_column, datasets.Image())
    return split.rename_columns({image_column: "image", label_column: "label"})


def find_image_column(features: Features, wanted: str | None) -> str:
    """The column with the images: the wanted one, the only one of an image type, or one of a usual name.

    Raises:
        ValueError: It is not there, is of another type, or there are several.
    """
    if wanted is None:
        found = [name for name, kind in features.items() if is_image(kind)]
        found = found or [name for name in IMAGE_COLUMNS if name in features and may_be_image(features[name])]
        wanted = only_column(found, "image", features)
    if wanted not in features:
        raise ValueError(f"no column {wanted!r}; the data has {list(features)}, choose with --image_column_name")
    if not may_be_image(features[wanted]):
        raise ValueError(
            f"column {wanted!r} holds {features[wanted]}, not images, their bytes or the paths of their files; "
            f"the data has {list(features)}, choose with --image_column_name"
        )
    return wanted


def find_label_column(features: Features, wanted: str | None) -> str:
    """The column with the classes: the wanted one, the only one of type ClassLabel, or one of a usual name.

    Raises:
        ValueError: It is not there, or there are several.
    """
    if wanted is None:
        found = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        wanted = only_column(found or [name for name in LABEL_COLUMNS if name in features], "label", features)
    if wanted not in features:
        raise ValueError(f"no column {wanted!r}; the data has {list(features)}, choose with --label_column_name")
    return wanted


def only_column(found: Sequence[str], kind: str, features: Features) -> str:
    """The one column in `found`, or a ValueError that lists what there is."""
    if len(found) == 1:
        return found[0]
    problem = f"several {kind} columns {list(found)}" if found else f"no {kind} column among {list(features)}"
    advice = "; an image folder needs one sub-folder per class" if kind == "label" and not found else ""
    raise ValueError(f"{problem}; choose with --{kind}_column_name{advice}")


def is_image(kind: Any) -> bool:
    """Whether a feature is an image, or the struct that parquet files without metadata show for one."""
    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and {"bytes", "path"} == set(kind))


def is_text(kind: Any) -> bool:
    """Whether a feature is a string."""
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def may_be_image(kind: Any) -> bool:
    """Whether a feature can be read as images: images, paths, or bytes."""
    return is_image(kind) or is_text(kind) or (isinstance(kind, Value) and kind.dtype in ("binary", "large_binary"))


def choose_splits(
    splits: dict[str, Dataset], arguments: DataArguments, *, training: bool
) -> tuple[Dataset | None, Dataset, str]:
    """The split to train on (None without `training`), the one to evaluate on and its name.

    Raises:
        ValueError: A split that is needed or asked for is not there, or one serves both ends.
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
    kept = stratified_share(labels_of(whole), share=arguments.train_val_split)
    train = whole.select(np.setdiff1d(np.arange(len(whole)), kept)) if training else None
    return train, whole.select(kept), f"{arguments.train_val_split:g} of {train_name}"


def stratified_share(labels: Sequence[Any], *, share: float) -> np.ndarray:
    """Sorted row numbers of a share of each class, evenly spaced over its rows; the same on every call."""
    rows_of: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    chosen: list[int] = []
    for rows in rows_of.values():
        count = round(len(rows) * share)
        chosen += [rows[int((number + 0.5) * len(rows) / count)] for number in range(count)]
    return np.array(sorted(chosen), dtype=np.int64)


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
        ValueError: There are no rows, or labels or images that cannot be used.
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
    """Raises ValueError if rows have labels that are no class; counts them and names the first row of each."""
    strange: dict[str, list[int]] = {}
    for place, label in enumerate(labels_of(split)):
        if label not in label_ids:
            strange.setdefault("no label" if label is None else str(label), []).append(place)
    if strange:
        told = (
            f"{label} ({len(places)} times, first in {first_place(split, places[0])})"
            for label, places in strange.items()
        )
        raise ValueError(
            f"{sum(map(len, strange.values()))} of {len(split)} labels in the {name} split are no class of the training "
            f"data: {name_some(told)}; repair them, or choose with --label_column_name and --eval_split_name. Numbers "
            "below 0 stand for no class"
        )


def first_place(split: Dataset, place: int) -> str:
    """What to call a row in a message: its number, and its file where it has one."""
    found = split.select([place]).cast_column("image", datasets.Image(decode=False))[0]
    file = found["image"] and found["image"]["path"]
    return f"row {found['row']}{f' ({Path(file).name})' if file else ''}"
