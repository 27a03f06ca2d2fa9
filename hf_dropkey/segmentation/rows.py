"""Images and masks in the rows of data sets: on the Hub, in a folder, or in parquet files.

The columns are those of Transformers' example script: `image` or `pixel_values`, and `label` or `annotation`; the names of the
classes are in `id2label.json` of the data set.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers.utils.logging import tqdm

from ..extras import needed
from ..images.annotated import sized_record
from ..images.checks import name_some
from ..images.sources import load_named, split_names
from ..images.tables import escaped, matching_files
from .arguments import SegmentationDataArguments


with needed("train"):
    import datasets


IMAGE_COLUMNS = ("image", "pixel_values")
MASK_COLUMNS = ("label", "annotation", "mask", "segmentation_mask")
# names of columns from here on
IMAGE, MASK = "image", "mask"
CLASS_FILE = "id2label.json"


def readers(arguments: SegmentationDataArguments) -> dict[str, Callable[[], tuple[datasets.Dataset, str]]]:
    """How to read the rows of each split that the arguments name by a data set or by parquet files, and its name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A split that the arguments name is not there, one serves both ends, or a file is not parquet.
    """
    if not arguments.dataset_name:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        return {role: partial(_parquet, pattern, role) for role, pattern in files.items() if pattern}
    splits = load_named(arguments.dataset_name, arguments.dataset_config_name)
    names = split_names(splits, arguments.train_split_name, arguments.eval_split_name)
    return {
        role: partial(lambda name: (splits[name], f"{arguments.name} ({name})"), name) for role, name in names.items()
    }


def _parquet(pattern: str, role: str) -> tuple[datasets.Dataset, str]:
    files = matching_files(pattern)
    if not files:
        raise FileNotFoundError(f"--{role}_file {pattern} matches no file; check the path")
    other = [file for file in files if Path(file).suffix.lower() != ".parquet" or not Path(file).is_file()]
    if other:
        raise ValueError(
            f"--{role}_file takes parquet files, and matches {name_some(other)}; name folders of images and masks with "
            f"--{role}_images and --{role}_masks"
        )
    rows = datasets.load_dataset("parquet", data_files={role: escaped(files)}, split=role)
    return rows, f"{Path(pattern).name} ({role})"


def usual_columns(rows: datasets.Dataset, name: str, image: str | None, mask: str | None) -> datasets.Dataset:
    """The rows with the columns of images and masks alone, as `image` and `mask`, not decoded.

    Args:
        rows: The rows.
        name: Of the split, for errors.
        image: The column of images; None: one of the usual names.
        mask: The column of masks; None: one of the usual names.

    Raises:
        ValueError: A column is not there, or holds no images.
    """
    chosen = {
        IMAGE: _column(rows, name, image, IMAGE_COLUMNS, "--image_column_name"),
        MASK: _column(rows, name, mask, MASK_COLUMNS, "--label_column_name"),
    }
    if chosen[IMAGE] == chosen[MASK]:
        raise ValueError(f"the column {chosen[IMAGE]!r} of {name} is for images and for masks; name two columns")
    found = rows.select_columns(list(chosen.values())).rename_columns({old: new for new, old in chosen.items()})
    for new, old in chosen.items():
        try:
            found = found.cast_column(new, datasets.Image(decode=False))
        # what Arrow raises for values that are neither bytes, paths nor both
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"the column {old!r} of {name} holds {rows.features[old]}, not images ({error}); name another one with "
                f"{'--image_column_name' if new == IMAGE else '--label_column_name'}"
            ) from error
    return found


def _column(rows: datasets.Dataset, name: str, given: str | None, usual: tuple[str, ...], option: str) -> str:
    columns = rows.column_names
    if given is not None:
        if given not in columns:
            raise ValueError(f"{option} {given} is not a column of {name}, which has {name_some(columns)}; choose one")
        return given
    found = next((one for one in usual if one in columns), None)
    if found is None:
        raise ValueError(
            f"{name} has none of the columns {', '.join(usual)}, only {name_some(columns)}; pass {option}"
        )
    return found


def records_of(rows: datasets.Dataset, name: str) -> list[dict[str, Any]]:
    """A record for each row of `usual_columns`."""
    records: list[dict[str, Any]] = []
    for row in tqdm(range(len(rows)), desc=f"Reading {name}"):
        cell = rows[row][IMAGE]
        records.append({"id": row, "row": row, "file_name": f"row {row}", **sized_record({}, cell)})
    return records


def mask_row_cell(rows: datasets.Dataset, image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded mask of a record; without bytes and path where the row has none."""
    cell: dict[str, Any] | None = rows[image["row"]][MASK]
    return cell or {"bytes": None, "path": None}


def class_file(arguments: SegmentationDataArguments) -> Path:
    """The file of class names: as the arguments say, else that of the data set.

    Raises:
        ValueError: The data set has none.
    """
    if arguments.class_names:
        return Path(arguments.class_names)
    name = str(arguments.dataset_name)
    missing = (
        f"{name} has no {CLASS_FILE} with the names of its classes; pass a JSON file with --class_names, in the order of their "
        'numbers, such as ["background", "cat"]'
    )
    if Path(name).is_dir():
        if not (Path(name) / CLASS_FILE).is_file():
            raise ValueError(missing)
        return Path(name) / CLASS_FILE
    try:
        return Path(hf_hub_download(name, CLASS_FILE, repo_type="dataset"))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{CLASS_FILE} of {name} is not in the cache, and the Hub cannot be asked ({re.split('[.;]', str(error))[0]}); pass the "
            "names with --class_names"
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise ValueError(missing) from error
