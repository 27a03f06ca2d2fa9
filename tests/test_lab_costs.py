"""The tables of costs hold the last measurement of each cell, and nothing where nothing was measured."""

import pytest

from hf_dropkey.lab.costs import COLUMNS, cell, cost_lines, cost_tables, label


Row = dict[str, str]


def row(value: str, *, metric: str = "time", over: str = "sdpa/none", n: str = "15", **changes: str) -> Row:
    usual = {"device": "cpu", "threads": "2", "workload": "attention", "dtype": "float32", "batch": "16", "heads": "6"}
    usual |= {"tokens": "197", "head_width": "64", "backend": "sdpa", "regulariser": "dropkey", "drop_ratio": "0.1"}
    usual |= {"metric": f"{metric} over {over}", "value": value, "first_quartile": "1.25", "third_quartile": "1.5"}
    return usual | {"n": n, "torch": "2.13.0"} | changes


DROPOUT = {"regulariser": "attention dropout"}
STEP = {"workload": "vit_small step", "batch": "8"}


@pytest.fixture
def rows() -> list[Row]:
    return [
        row("9.99"),
        row("1.333"),
        row("2.5", **DROPOUT),
        row("2.25", **DROPOUT, backend="eager"),
        row("41.4", metric="peak memory", n="1"),
        row("1.05", **STEP),
        row("1.1", **STEP, threads="1"),
        row("0.97", over="plain/none", workload="volo_d1 step", regulariser="none", drop_ratio="0.0"),
    ]


def cells(text: str, start: str) -> dict[str, str]:
    """The cells of the first line of a table that begins so, by the heads of the columns."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return dict(zip(COLUMNS, [part.strip() for part in line.strip("|").split("|")][1:], strict=True))


def test_a_cell_is_a_median_with_its_quartiles() -> None:
    assert cell(row("1.333")) == "1.33 [1.25-1.50]"
    assert cell(row("41.4", n="1")) == "41" and cell(row("3.75", n="1")) == "3.75"


def test_workloads_are_named_in_words() -> None:
    assert label(("cpu", "2", "attention", "bfloat16", "1", "3", "4097", "64")) == (
        "attention, 1 x 3 heads, 4,097 tokens, bfloat16"
    )
    assert label(("cpu", "2", "vit_small step", "float32", "8", "6", "197", "64")) == (
        "step of ViT-S/16, 8 images, float32"
    )


def test_the_last_measurement_and_the_best_backend_count(rows: list[Row]) -> None:
    found = cells(cost_tables(rows), "attention, 16 x 6 heads, 197 tokens, float32")
    assert found["DropKey `sdpa`"] == "1.33 [1.25-1.50]"
    assert found["attention dropout, best of both"] == "2.25 [1.25-1.50]"
    assert {name for name, value in found.items() if value} == {"DropKey `sdpa`", "attention dropout, best of both"}
    assert cells(cost_tables(rows), "the same, peak memory")["DropKey `sdpa`"] == "41"


def test_each_machine_has_its_table(rows: list[Row]) -> None:
    text = cost_tables([*rows, row("1.2", device="cuda")])
    assert text.count("| forward and backward |") == 3
    # the machine with most workloads first
    order = [text.index(f"Device {name}, torch") for name in ("cpu, 2 threads", "cpu, 1 thread", "cuda, 2 threads")]
    assert order == sorted(order)
    assert "| step of VOLO-d1, 16 images, float32 | 0.97 [1.25-1.50] |  |" in text


def test_the_lines_of_the_readme_are_of_one_machine(rows: list[Row]) -> None:
    assert cost_lines(rows).splitlines() == [
        "- step of ViT-S/16, 8 images, float32: DropKey 1.05 [1.25-1.50]",
        "- attention, 16 x 6 heads, 197 tokens, float32: DropKey 1.33 [1.25-1.50], attention dropout 2.25 [1.25-1.50]",
        "- peak memory of attention, 16 x 6 heads, 197 tokens, float32: DropKey 41",
    ]
