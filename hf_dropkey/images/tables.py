"""Tables of image files and their classes in CSV: every cell is read as the text that stands there.

Libraries that guess types read None and NA as missing, 001 as 1, and whole numbers beside an empty cell as fractions.
"""

import csv
import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_csv(file: Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, all as text.

    Raises:
        ValueError: The file is not CSV in UTF-8, a column repeats, or a line has other columns than the header.
    """
    try:
        # a byte order mark is not part of the first column's name
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next((row for row in reader if row), [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if not header or repeated:
                raise ValueError(
                    f"{file} has {f'the columns {repeated} twice' if repeated else 'no header'}; repair it"
                )
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} columns, and {len(header)} in the header {header}; "
                        "repair the line; text with commas must stand in double quotes"
                    )
                if row:
                    rows.append(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}); save it in that encoding") from error
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; repair the line") from error
    if len(header) == 1 and any(separator in header[0] for separator in ";\t"):
        raise ValueError(f"{file} has the single column {header[0]!r}; separate columns with commas")
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def labels_from_text(columns: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Labels as the text they are, or as whole numbers where each prints back the same; an empty cell is None.

    `columns` are those of all splits, which are read alike.

    Raises:
        ValueError: All labels are numbers with a fraction, which are not classes.
    """
    values = {value for column in columns for value in column if value}
    if values and all(map(is_whole_text, values)):
        return [[int(value) if value else None for value in column] for column in columns]
    numbers = [float(value) for value in values if is_number_text(value)]
    fractions = [number for number in numbers if not number.is_integer()]
    if fractions and len(numbers) == len(values):
        raise ValueError(
            f"the labels are numbers such as {max(fractions)}; allowed are text and whole numbers, one for each class"
        )
    return [[value or None for value in column] for column in columns]


def is_whole_text(value: str) -> bool:
    """Whether text is a whole number that prints back the same, as 7 does and 007 does not."""
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(value)) == value


def is_number_text(value: str) -> bool:
    """Whether text is a number."""
    try:
        float(value)
    except ValueError:
        return False
    # float() also takes names that may be classes
    return value.strip("+-").lower() not in ("nan", "inf", "infinity")


def matching_files(pattern: str) -> list[str]:
    """The file of that very name, else those that a glob pattern matches, whatever the name of their folder."""
    if Path(pattern).is_file():
        return [pattern]
    parent = Path(pattern).parent
    names = sorted(glob.glob(pattern))
    # a folder may be called "images [v2]"
    return names or sorted(glob.glob(str(Path(glob.escape(str(parent))) / Path(pattern).name)))


def escaped(files: Iterable[str]) -> list[str]:
    """Paths for a library that takes each for a glob pattern."""
    return [glob.escape(file) for file in files]
