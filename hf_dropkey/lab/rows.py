"""Rows of experiments: reading, checking and selecting them, and warnings about mixed origins.

A row is one number of one run with all that identifies it: the file is the only source of tables, figures and cards.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


Row = Mapping[str, str]
Key = tuple[str, ...]
# rows that agree in these and in the seed are of the same weights, except those with a Monte-Carlo alignment
CELL_COLUMNS = (
    "experiment",
    "task",
    "model",
    "regulariser",
    "ratio",
    "schedule",
    "pattern",
    "alignment",
    "train_images",
)
# the measurement, and the origin of the row
VALUE_COLUMNS = ("seed", "epochs", "split", "images", "metric", "value", "unit")
ORIGIN_COLUMNS = ("command", "git_sha", "transformers", "torch", "device", "threads")
COLUMNS = (*CELL_COLUMNS, *VALUE_COLUMNS, *ORIGIN_COLUMNS)


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a results file, checked.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column is missing, a field is empty, or a value is not a number; the message has the line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the file of results {file} does not exist; scripts/run_experiments.py writes it")
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file} lacks the columns {', '.join(missing)}; a results file has {', '.join(COLUMNS)}")
        rows = list(reader)
    for line, row in enumerate(rows, start=2):
        empty = [name for name in COLUMNS if not row[name]]
        if empty or None in row:
            what = f"no {', '.join(empty)}" if empty else "more fields than columns"
            raise ValueError(
                f"line {line} of {file} has {what}; complete the row, or delete it and run its cell again"
            )
        if not _is_finite(row["value"]):
            raise ValueError(
                f"line {line} of {file} has the value {row['value']!r}, not a finite number; correct it, or delete the row"
            )
    return rows


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def choose(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have the wanted values; a list, tuple or set allows each of its values.

    Raises:
        ValueError: A name is not that of a column.
    """
    unknown = sorted(set(wanted) - set(COLUMNS))
    if unknown:
        raise ValueError(f"there are no columns {unknown}; a results file has {', '.join(COLUMNS)}")
    allowed = {
        name: {str(one) for one in value} if isinstance(value, list | tuple | set) else {str(value)}
        for name, value in wanted.items()
    }
    return [row for row in rows if all(row[name] in values for name, values in allowed.items())]


def by_cell(rows: Iterable[Row], columns: Sequence[str], metric: str) -> dict[Key, dict[str, float]]:
    """The values of a metric: for each cell, identified by some columns, a value for each seed.

    Raises:
        ValueError: A cell has two values for one seed: the columns do not distinguish the cells, or a run was recorded
            twice.
    """
    found: dict[Key, dict[str, float]] = {}
    for row in rows:
        if row["metric"] != metric:
            continue
        cell = found.setdefault(tuple(row[name] for name in columns), {})
        if row["seed"] in cell:
            named = ", ".join(f"{name} {row[name]}" for name in columns)
            raise ValueError(
                f"two values of {metric} for seed {row['seed']} of the cell with {named}; distinguish the cells by "
                "more columns, or delete one of the rows"
            )
        cell[row["seed"]] = float(row["value"])
    return found


def warnings(rows: Sequence[Row]) -> list[str]:
    """Notes for readers of a comparison of these rows: several commits, devices or versions, uncommitted code."""
    notes = []
    for name, meaning in (
        ("git_sha", "rows of different commits may not be comparable"),
        ("device", "bits differ between devices"),
        ("torch", "bits differ between versions"),
        ("transformers", "bits differ between versions"),
    ):
        values = sorted({row[name] for row in rows})
        if len(values) > 1:
            notes.append(f"mixed {name}: {', '.join(values)}; {meaning}")
    if any("-changed" in row["git_sha"] for row in rows):
        notes.append("some rows were measured on code that no commit holds")
    return notes
