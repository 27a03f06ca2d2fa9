"""Every number in the README's prose and tables is measured, by a row that says so, or is none, for a reason given here."""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest

from hf_dropkey.lab.evidence import BEGIN, END


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
Row = dict[str, str]

# no part of a name, as in ViT-S/16 and Apache-2.0, or of another number
NUMBER = re.compile(r"(?<![\w./])(?<![A-Za-z]-)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w/]|\.\d)")
SPREAD = r"([\d.]+ \[[\d.]+-[\d.]+\])"
RATIO, MEMORY = "time over sdpa/none", "peak memory over sdpa/none"
# code and links, which say how and where; the part that another test makes anew from the rows
LEFT_OUT = re.compile(rf"^```.*?^```$|{BEGIN}.*?{END}|`(?:[^`\n]|\n(?!\n))*`|\]\([^)]*\)", re.DOTALL | re.MULTILINE)

# head of a column of the table of costs: backends of which the best counts, regulariser, drop ratio
COLUMNS = {
    "plain `eager`": (("eager",), "none", "0.0"),
    "attention dropout, best of both": (("eager", "sdpa"), "attention dropout", "0.1"),
    "paper's listing": (("eager",), "paper listing", "0.1"),
    "DropKey `eager`": (("eager",), "dropkey", "0.1"),
    "DropKey `sdpa`": (("sdpa",), "dropkey", "0.1"),
    "DropKey `sdpa`, compiled": (("sdpa compiled",), "dropkey", "0.1"),
    'DropKey "token"': (("sdpa",), "dropkey token", "0.3"),
}
# what is no measurement, word for word, and why
NOT_MEASURED = {
    "[CVPR 2023": "the paper's year",
    "Python 3.11": "a version; tests/test_house.py compares the ranges",
    "1,797 handwritten digits": "the size of scikit-learn's data set",
    "multiples of 16": "a limit of the architectures",
    "Transformers 5.23": "a version",
    "Transformers 5.13": "a version",
    "(not in 5.23)": "a version",
    "the 95 % interval": "the level that hf_dropkey.intervals states",
    "leaves out 0.": "no difference",
    "[0, 1); the paper uses 0.05 to 0.3": "a range, and the paper's settings",
    "`dropkey_ratio` | 0.1 |": "a default",
    "`dropkey_final_ratio` | 0.0 |": "a default",
    "`dropkey_window` | 3 |": "a default",
    "`attention_probs_dropout_prob` above 0 beside": "a range",
    "CVPR 2023, pages 22700-22709": "the citation",
}


@cache
def read(file: str) -> tuple[Row, ...]:
    with (CARDS / file).open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


def select(rows: Sequence[Row], **wanted: str | Sequence[str]) -> list[Row]:
    """The rows whose columns have the wanted values, or one of them."""
    allowed = {name: {value} if isinstance(value, str) else set(value) for name, value in wanted.items()}
    return [row for row in rows if all(row[name] in values for name, values in allowed.items())]


def same(shown: str, value: str | float) -> bool:
    """Whether a number is a value, rounded to the decimals it is shown with."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - float(value)) <= 0.5 * 10**-decimals * (1 + 1e-9)


def states(shown: str, row: Row) -> bool:
    """Whether "1.06 [1.02-1.08]" is a row's median with its quartiles, or "1.06" its median."""
    values = [row["value"], row["first_quartile"], row["third_quartile"]]
    numbers = re.findall(r"[\d.]+", shown)
    return len(numbers) in (1, 3) and all(map(same, numbers, values))


# --- the table of costs ----------------------------------------------------------------------------------------------


def rows_of_line(label: str, before: list[Row]) -> list[Row]:
    """The rows of a line by its label; "the same, peak memory" is of the workload of the line before it."""
    if label == "the same, peak memory":
        shared = ("workload", "dtype", "batch", "heads", "tokens")
        wanted = {name: before[0][name] for name in shared} if before else {}
        return latest(select(read("benchmarks.csv"), threads="2", metric=MEMORY, **wanted))
    attention = re.fullmatch(r"attention, (\d+) x (\d+) heads, ([\d,]+) tokens, (\w+)", label)
    step = re.fullmatch(r"step of ViT-(S|B)/16, (\d+) images, (\w+)", label)
    if attention:
        batch, heads, tokens, dtype = (part.replace(",", "") for part in attention.groups())
        wanted = {"workload": "attention", "batch": batch, "heads": heads, "tokens": tokens, "dtype": dtype}
    elif step:
        size = {"S": "small", "B": "base"}[step[1]]
        wanted = {"workload": f"vit_{size} step", "batch": step[2], "dtype": step[3]}
    else:
        return []
    return latest(select(read("benchmarks.csv"), threads="2", metric=RATIO, **wanted))


def latest(rows: list[Row]) -> list[Row]:
    """The last measurement of each variant: rows are appended."""
    return list({(row["backend"], row["regulariser"], row["drop_ratio"]): row for row in rows}.values())


def is_stated(shown: str, rows: list[Row], column: str) -> bool:
    """Whether a cell of the table is what the rows of its line and column say; an empty one is not measured."""
    backends, regulariser, ratio = COLUMNS[column]
    found = select(rows, backend=backends, regulariser=regulariser, drop_ratio=ratio)
    if len(backends) > 1 and found:
        found = [min(found, key=lambda row: float(row["value"]))]
    return any(states(shown, row) for row in found) if shown else not found


def wrong_cells(table: list[str]) -> list[str]:
    """The cells of a table of costs, and its labels, that no row holds."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table]
    head, wrong = lines[0][1:], []
    if set(head) != set(COLUMNS):
        return [f"columns {head}"]
    rows: list[Row] = []
    for label, *cells in lines[2:]:
        rows = rows_of_line(label, rows)
        if not rows or len(cells) != len(head):
            wrong.append(f"{label}: no such rows")
            continue
        wrong += [
            f"{label}, {column}: {cell or 'nothing'}"
            for column, cell in zip(head, cells, strict=True)
            if not is_stated(cell, rows, column)
        ]
    return wrong


# --- prose -----------------------------------------------------------------------------------------------------------


def is_a_step(threads: str) -> Callable[[str], bool]:
    """A test of a number and quartiles: a step of DropKeyViT-S on so many threads."""
    wanted = {"workload": "vit_small step", "dtype": "float32", "backend": "sdpa", "regulariser": "dropkey"}
    rows = select(read("benchmarks.csv"), metric=RATIO, drop_ratio="0.1", threads=threads, **wanted)
    return lambda shown: any(states(shown, row) for row in rows)


def is_a_structure(regulariser: str, end: Callable[[Iterable[float]], float]) -> Callable[[str], bool]:
    """A test of a number: the smallest or largest of the last medians of T2T-ViT and VOLO over plain PyTorch's."""
    workloads = [f"{name} {job}" for name in ("t2t_vit_14", "volo_d1") for job in ("forward", "step")]
    wanted = {"metric": "time over plain/none", "backend": "sdpa", "regulariser": regulariser}
    rows = select(read("benchmarks.csv"), workload=workloads, **wanted)
    values = {row["workload"]: float(row["value"]) for row in rows}.values()
    return lambda shown: same(shown, end(values))


def is_the_overfit(shown: str) -> bool:
    """Whether a number is the AP50 of the run on four images."""
    rows = select(read("results.csv"), experiment="detection_overfit", metric="train_AP50")
    return bool(rows) and all(same(shown, row["value"]) for row in rows)


def is_the_number_of_architectures(shown: str) -> bool:
    """Whether a number is that of the lines of the table of architectures, but for its head."""
    table = (CARDS / "architectures.md").read_text(encoding="utf-8")
    return int(shown) == len(re.findall(r"^\| ", table, re.MULTILINE)) - 1


def is_the_release(shown: str) -> bool:
    """Whether all benchmarks were made with a release of torch."""
    return {row["torch"].rpartition(".")[0] for row in read("benchmarks.csv")} == {shown}


def is_a_ratio(columns: Callable[[str], bool]) -> Callable[[str], bool]:
    """A test of a number: the drop ratio of some columns of the table."""
    ratios = {ratio for _, regulariser, ratio in COLUMNS.values() if columns(regulariser)}
    return lambda shown: {shown} == ratios


# a sentence, and for each number in it what it has to be
SENTENCES: dict[str, list[Callable[[str], bool]]] = {
    rf"with `sdpa` gave {SPREAD}, and one on one thread {SPREAD}": [is_a_step("2"), is_a_step("1")],
    r"take (\d\.\d+) to (\d\.\d+) of the time of their structure in plain PyTorch": [
        is_a_structure("none", min),
        is_a_structure("none", max),
    ],
    r"and their steps with DropKey (\d\.\d+) to (\d\.\d+)": [
        is_a_structure("dropkey", min),
        is_a_structure("dropkey", max),
    ],
    r"\(AP50 ([\d.]+)\)": [is_the_overfit],
    r"lists what it reaches in (\d+) architectures": [is_the_number_of_architectures],
    r"with torch (\d+\.\d+)": [is_the_release],
    r'DropKey at (\d\.\d), "token" at (\d\.\d)': [
        is_a_ratio(lambda name: name == "dropkey"),
        is_a_ratio(lambda name: name == "dropkey token"),
    ],
}


def number_errors(text: str) -> list[str]:
    """The numbers of a README that are neither in a row nor listed as no measurement, and what is listed in vain."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith("| forward and backward |")]
    if len(starts) != 1:
        return [f"{len(starts)} tables of costs"]
    end = next(number for number in range(starts[0], len(lines)) if not lines[number].startswith("|"))
    errors = wrong_cells(lines[starts[0] : end])
    text = "".join([*lines[: starts[0]], *lines[end:]])
    for sentence, tests in SENTENCES.items():
        pattern = re.compile(sentence.replace(" ", r"\s+"))
        found = [" ".join(part.split()) for match in pattern.finditer(text) for part in match.groups()]
        if len(found) != len(tests):
            errors.append(f"no sentence, or several, like {sentence!r}")
        errors += [part for part, is_right in zip(found, tests, strict=False) if not is_right(part)]
        text = pattern.sub("", text)
    for words in NOT_MEASURED:
        text, count = re.subn(r"\s+".join(map(re.escape, words.split())), "", text)
        if not count:
            errors.append(f"{words!r} is listed as no measurement, but is not in the README")
    return errors + [f"{number} is in no row" for number in NUMBER.findall(LEFT_OUT.sub("", text))]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_number_in_the_readme_is_in_a_row() -> None:
    assert number_errors(readme()) == [], (
        "correct the number, or add its sentence to SENTENCES or, if it was not measured, to NOT_MEASURED"
    )


def test_each_changed_number_is_found() -> None:
    text = readme()
    start = text.index("## What it costs")
    end = text.index("\n## ", start)
    missed, seen = [], 0
    for match in re.finditer(r"\d+\.\d+|(?<=\| )\d+(?= \|)", text[start:end]):
        changed = str(int(match[0][-1]) + 1)[-1]
        place = start + match.end()
        seen += 1
        if not number_errors(text[: place - 1] + changed + text[place:]):
            missed.append(match[0])
    assert seen > 80 and not missed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(AP50 0.89)", "(AP50 0.90)"),
        ("in 22 architectures", "in 23 architectures"),
        # in another line or column it is a lie
        ("| 2.22 | 2.05 |", "| 2.05 | 2.22 |"),
        ("197 tokens, bfloat16", "1,025 tokens, bfloat16"),
        ("| 1.31 [1.27-1.37] | |", "| 1.31 [1.27-1.37] | 1.30 |"),
        ("| 1.13 [1.11-1.16] |", "| |"),
        ("about two minutes", "about 2.1 minutes"),
        ("## Licence", "It is 12 times as fast.\n\n## Licence"),
    ],
)
def test_a_number_without_a_row_is_found(old: str, new: str) -> None:
    assert old in readme()
    assert number_errors(readme().replace(old, new, 1))


def test_rounding_is_to_the_decimals_shown() -> None:
    assert same("0.86", "0.85807") and same("41", "41.441") and same("1.2", "1.1724")
    assert not same("0.85", "0.85807") and not same("0.860", "0.85807") and not same("42", "41.441")
