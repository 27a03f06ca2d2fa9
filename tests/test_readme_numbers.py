"""What the README says was measured is what rows of the benchmarks and of the runs say."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dropkey.results import choose, read_rows


ROOT = Path(__file__).resolve().parents[1]
# the columns of the table of costs: backends and regulariser; of several backends the better one counts
VARIANTS = {
    "plain `eager`": (["eager"], "none"),
    "attention dropout, best of both": (["eager", "sdpa"], "attention dropout"),
    "paper's listing": (["eager"], "paper listing"),
    "DropKey `eager`": (["eager"], "dropkey"),
    "DropKey `sdpa`": (["sdpa"], "dropkey"),
    "DropKey `sdpa`, compiled": (["sdpa compiled"], "dropkey"),
    'DropKey "token"': (["sdpa"], "dropkey token"),
}
ATTENTION = re.compile(r"attention, (\d+) x (\d+) heads, ([\d,]+) tokens, (\w+)")
CELL = re.compile(r"([\d.]+)(?: \[([\d.]+)-([\d.]+)\])?")
SPAN = re.compile(r"(\d\.\d\d)(?:\s\[(\d\.\d\d)-(\d\.\d\d)\])")

Row = dict[str, str]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def benchmarks() -> list[Row]:
    with (ROOT / "model_cards" / "benchmarks.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def costs(text: str) -> str:
    return text.partition("## What it costs")[2].partition("\n## ")[0]


def cells(text: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """For each number of the table: where it stands, the columns of its rows but for the variant, and the number."""
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, _, *body = lines
    place: dict[str, str] = {}
    for label, *values in body:
        shape = ATTENTION.fullmatch(label)
        metric = "peak memory over sdpa/none" if label == "the same, peak memory" else "time over sdpa/none"
        if shape:
            place = {"workload": "attention", "batch": shape[1], "heads": shape[2], "dtype": shape[4]}
            place["tokens"] = shape[3].replace(",", "")
        elif label == "step of ViT-S/16, 8 images, float32":
            place = {"workload": "vit_small step", "batch": "8", "dtype": "float32"}
        else:
            assert label == "the same, peak memory", f"the test does not know the line {label!r}"
        for column, value in zip(head[1:], values, strict=True):
            if value:
                yield column, {**place, "metric": metric}, value


def number(text: str, value: str) -> bool:
    """Whether a text is a value, rounded as the text is."""
    return abs(float(text) - float(value)) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9


def stands_in(shown: str, rows: list[Row]) -> bool:
    """Whether a number, with its quartiles if it has any, is that of one of these rows."""
    found = CELL.fullmatch(shown)
    assert found, f"{shown!r} is no number"
    names = ("value", "first_quartile", "third_quartile")
    return any(
        all(text is None or number(text, row[name]) for text, name in zip(found.groups(), names, strict=True))
        for row in rows
    )


def wrong_costs(text: str) -> list[str]:
    """The numbers of the table that no row holds."""
    rows, wrong = benchmarks(), []
    for column, place, shown in cells(costs(text)):
        backends, regulariser = VARIANTS[column]
        found = [row for row in rows if all(row[name] == value for name, value in place.items())]
        found = [row for row in found if row["backend"] in backends and row["regulariser"] == regulariser]
        if not stands_in(shown, found):
            wrong.append(f"{column}, {place}: {shown}")
    return wrong


def test_the_table_of_costs_is_that_of_the_rows() -> None:
    assert len(list(cells(costs(readme())))) > 40
    assert wrong_costs(readme()) == []


@pytest.mark.parametrize(("true", "false"), [("1.45 [1.41-1.56]", "1.40 [1.41-1.56]"), ("| 6.1 |", "| 6.3 |")])
def test_a_changed_cost_is_found(true: str, false: str) -> None:
    assert true in readme() and len(wrong_costs(readme().replace(true, false))) == 1


def test_what_the_text_says_of_costs_is_measured() -> None:
    prose = "\n".join(line for line in costs(readme()).splitlines() if not line.startswith("|"))
    rows = benchmarks()
    steps = [row for row in rows if row["workload"] == "vit_small step" and row["metric"] == "time over sdpa/none"]
    steps = [
        row for row in steps if (row["backend"], row["regulariser"], row["dtype"]) == ("sdpa", "dropkey", "float32")
    ]
    spans = [f"{value} [{low}-{high}]" for value, low, high in SPAN.findall(prose)]
    assert len(spans) == 3 and all(stands_in(span, steps) for span in spans)
    plain = [row for row in rows if row["metric"] == "time over plain/none" and row["regulariser"] == "none"]
    ends = re.search(r"take (\S+) to (\S+) of the time of their structure in plain PyTorch", prose)
    ratios = [row["value"] for row in plain if row["backend"] == "sdpa"]
    assert ends and number(ends[1], min(ratios, key=float)) and number(ends[2], max(ratios, key=float))


def test_the_detection_that_is_named_was_measured() -> None:
    named = re.search(r"learns four images by heart \(AP50 (\S+)\)", readme())
    (row,) = choose(read_rows(ROOT / "model_cards" / "results.csv"), metric="train_AP50")
    assert named and number(named[1], row["value"])
