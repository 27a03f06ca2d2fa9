"""Where images and their classes come from: the built-in digits, a data set by name, image folders, or tables.

`load_splits` finds the columns; all splits have the same three, `image`, `label` and `row`, whatever they came from.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import needed
from ..images.checks import name_some
from ..images.folders import (
    METADATA_FILES,
    check_class_folders,
    check_classes_of_splits,
    check_separate,
    local_class_folders,
    log_left_out,
    read_class_folders,
)
from ..images.sources import is_csv, load_named
from ..images.tables import escaped, labels_from_text, matching_files, read_csv
from .arguments import DataArguments


with needed("train"):
    import datasets
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from sklearn.datasets import load_digits


DIGITS_TEST_FRACTION = 0.2
FILE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
IMAGE_COLUMNS = ("image", "img", "file_name", "file", "path")
LABEL_COLUMNS = ("label", "labels", "class", "target")


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
        if is_csv(found):
            splits = with_labels_from_text(splits)
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
    test = stratified_rows(rows["label"], fraction=DIGITS_TEST_FRACTION)
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
        ValueError: The contents of a folder look like a mistake, or only one of both has a table.
    """
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    configured = {split: Path(folder) for split, folder in folders.items() if folder}
    for split, folder in configured.items():
        if not folder.is_dir():
            advice = "a file, which --train_file and --validation_file take" if folder.is_file() else "not there"
            raise FileNotFoundError(f"the {split} folder {folder} is {advice}; check --train_dir and --validation_dir")
    tables = {
        split: [str(folder / name) for name in METADATA_FILES if (folder / name).is_file()]
        for split, folder in configured.items()
    }
    if not any(tables.values()):
        options = {split: f"--{split}_dir" for split in configured}
        return usual_splits(load_folders(configured, options), arguments)
    if any(len(found) != 1 for found in tables.values()):
        raise ValueError(
            f"found the tables {name_some(file for found in tables.values() for file in found)}, but every folder must "
            "have exactly one table, or none may have any; name tables with --train_file and --validation_file"
        )
    return load_files({split: found[0] for split, found in tables.items()}, arguments)


def load_folders(folders: Mapping[str, Path], options: Mapping[str, str]) -> dict[str, Dataset]:
    """Image folders with one sub-folder per class, all with the same classes; `options` name them in messages.

    Raises:
        ValueError: The contents of a folder look like a mistake; names them.
    """
    evaluated = [split for split in folders if split != "train" and "train" in folders]
    for split in evaluated:
        check_separate(folders["train"], folders[split], options[split])
    found = {split: read_class_folders(folder) for split, folder in folders.items()}
    for split, classes in found.items():
        check_class_folders(classes, options[split])
        log_left_out(classes, split)
    for split in evaluated:
        check_classes_of_splits(found["train"], found[split], options[split])
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
    folders = [file for found in files.values() for file in found if Path(file).is_dir()]
    if folders:
        raise ValueError(
            f"--train_file and --validation_file take files, and {folders[0]} is a folder; name a folder of images with "
            f"--train_dir, or the files in it, such as {Path(folders[0]) / '*.parquet'}"
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
        usual = with_labels_from_text(usual)
    return {
        split: datasets.concatenate_datasets([usual[part] for part, about in parts.items() if about[0] == split])
        for split in files
    }


def with_labels_from_text(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Splits of CSV files with the labels read from their text, all in the same way."""
    labels = labels_from_text([labels_of(rows) for rows in splits.values()])
    return {
        name: rows.remove_columns("label").add_column("label", column)
        for (name, rows), column in zip(splits.items(), labels, strict=True)
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
            raise ValueError(
                f"{file} has the columns {list(table)} and {files[0]} has {list(first)}; give both the same"
            )
    columns = {name: [cell for table in tables.values() for cell in table[name]] for name in first}
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))


def with_usual_columns(split: Dataset, arguments: DataArguments, *, base: Path) -> Dataset:
    """The split with the columns `image` and `label`; relative paths of image files start at `base`."""
    image_column = find_image_column(split.features, arguments.image_column_name)
    label_column = find_label_column(split.features, arguments.label_column_name)
    if image_column == label_column:
        raise ValueError(
            f"the column {image_column!r} cannot hold the images and the labels; the data has {list(split.features)}, "
            "choose with --image_column_name and --label_column_name"
        )
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


def labels_of(split: Dataset) -> list[Any]:
    """The `label` column, without reading the images."""
    labels: list[Any] = split.select_columns("label").with_format(None)["label"][:]
    return labels


def stratified_rows(labels: Sequence[Any], *, fraction: float) -> np.ndarray:
    """Sorted row numbers of a fraction of each class, evenly spaced over its rows; the same on every call."""
    rows_of: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    chosen: list[int] = []
    for rows in rows_of.values():
        count = round(len(rows) * fraction)
        chosen += [rows[int((number + 0.5) * len(rows) / count)] for number in range(count)]
    return np.array(sorted(chosen), dtype=np.int64)
