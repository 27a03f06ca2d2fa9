"""Image data sets for classification, from the places where people keep them.

`load_image_data` takes the built-in digits, a data set of the hub, image folders, or parquet, CSV or JSON files; finds
the columns and the class names; and checks every image and label before training time is spent. What comes out has
the same three columns whatever went in.
"""

import glob
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import needed
from ..images.checks import drop_bad_images, name_some, with_named_images
from ..images.sources import CHOICE_SEED, EVALUATION_SPLITS, check_known
from .arguments import DataArguments


with needed("train"):
    import datasets
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from sklearn.datasets import load_digits


DIGITS_TEST_SHARE = 0.2
FILE_LOADERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
IMAGE_COLUMNS = ("image", "img", "file_name", "file", "path")
LABEL_COLUMNS = ("label", "labels", "class", "target")


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


def load_image_data(arguments: DataArguments, *, training: bool) -> ImageData:
    """Loads and checks the data; without `training` only what evaluation needs.

    Raises:
        FileNotFoundError: A folder or file is not there.
        ValueError: A split, column or label is missing or cannot be used, or images cannot be read.
    """
    splits = load_splits(arguments)
    train, evaluation, evaluation_split = choose_splits(splits, arguments, training=training)
    label_names, label_ids = find_labels(evaluation if train is None else train)
    evaluation = prepare_split(
        evaluation, evaluation_split, arguments, label_ids=label_ids, max_samples=arguments.max_eval_samples
    )
    if train is not None:
        train = prepare_split(
            train, arguments.train_split_name, arguments, label_ids=label_ids, max_samples=arguments.max_train_samples
        )
    return ImageData(train, evaluation, evaluation_split, label_names, label_ids)


def load_splits(arguments: DataArguments) -> dict[str, Dataset]:
    """All splits of the source that the arguments name, with the columns `image`, `label` and `row`."""
    if arguments.is_digits:
        splits = digits()
    elif arguments.dataset_name:
        splits = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    elif arguments.train_dir or arguments.validation_dir:
        splits = load_folders({"train": arguments.train_dir, "validation": arguments.validation_dir})
    else:
        splits = load_files({"train": arguments.train_file, "validation": arguments.validation_file})
    bases = {"train": arguments.train_file, "validation": arguments.validation_file}
    return {
        name: with_usual_columns(split, arguments, base=Path(bases.get(name) or "").parent)
        for name, split in splits.items()
    }


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


def load_folders(folders: dict[str, str | None]) -> DatasetDict:
    """Image folders with one sub-folder per class, in one load so that both have the same classes."""
    given = {split: Path(folder) for split, folder in folders.items() if folder}
    for split, folder in given.items():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the {split} folder {folder} is not there; check --train_dir and --validation_dir"
            )
    patterns = {split: str(folder / "**") for split, folder in given.items()}
    return datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False)


def load_files(patterns: dict[str, str | None]) -> DatasetDict:
    """Parquet, CSV or JSON files; each value is a path or a glob pattern."""
    files: dict[str, list[str]] = {}
    for split, pattern in patterns.items():
        if pattern:
            files[split] = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
            if not files[split]:
                raise FileNotFoundError(f"no {split} file matches {pattern}; check --train_file and --validation_file")
    suffixes = {Path(file).suffix.lower() for found in files.values() for file in found}
    if len(suffixes) > 1 or not suffixes <= FILE_LOADERS.keys():
        raise ValueError(f"data files end in {sorted(suffixes)}; use files of one kind among {sorted(FILE_LOADERS)}")
    return datasets.load_dataset(FILE_LOADERS[suffixes.pop()], data_files=files)


def with_usual_columns(split: Dataset, arguments: DataArguments, *, base: Path) -> Dataset:
    """The split with the columns `image`, `label` and `row`; relative paths of image files start at `base`."""
    image_column = find_image_column(split.features, arguments.image_column_name)
    label_column = find_label_column(split.features, arguments.label_column_name)
    split = split.select_columns([image_column, label_column])
    if is_text(split.features[image_column]):
        paths = [None if path is None else str(base / path) for path in split[image_column]]
        split = split.remove_columns(image_column).add_column(image_column, paths)
    if not isinstance(split.features[image_column], datasets.Image):
        split = split.cast_column(image_column, datasets.Image())
    split = split.rename_columns({image_column: "image", label_column: "label"})
    return split.add_column("row", list(range(len(split))))


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
    kept = stratified_share(whole["label"][:], share=arguments.train_val_split)
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
    values = sorted(set(split["label"]) - {None})
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
    strange = Counter(str(label) for label in split["label"] if label not in label_ids)
    if strange:
        raise ValueError(
            f"{strange.total()} of {len(split)} labels in the {name} split are no class of the training data: "
            f"{name_some(f'{label} ({count} times)' for label, count in strange.items())}; "
            "repair them, or choose with --label_column_name and --eval_split_name"
        )
    if arguments.check_images:
        processes = arguments.preprocessing_num_workers
        split = drop_bad_images(split, name, skip=arguments.skip_bad_images, processes=processes)
    return with_named_images(split)
