"""The sentences of a card follow the rows: better, worse, not distinguishable, and the origin of the rows."""

from typing import Any

import pytest

from hf_dropkey.lab.cards import CardEntry, results_text
from hf_dropkey.lab.grids import Cell, Grid
from hf_dropkey.lab.rows import COLUMNS


GRID = Grid("small", "cats", "recipe.json", {"tiny": {}}, (), "nll", 2)
OURS = {"regulariser": "dropkey", "schedule": "decreasing", "pattern": "score", "ratio": "0.3"}
CELL = Cell(model="tiny", regulariser="dropkey", schedule="decreasing", pattern="score", ratio=0.3, seed=1)
# the same differences between seeds in each cell, so that differences of cells have no width
NOISE = (0.0, 0.02, -0.01)


def cell(accuracy: float, *, seeds: int = 3, **changes: Any) -> list[dict[str, str]]:
    """Test rows of a cell of some seeds."""
    usual = dict.fromkeys(COLUMNS, "none") | {"experiment": "small", "task": "cats", "model": "tiny", "ratio": "0"}
    usual |= {"train_images": "all", "images": "40", "split": "test", "git_sha": "abc", "regulariser": "none"}
    metrics = {"accuracy": accuracy, "nll": 2 - accuracy, "ece": 0.1}
    metrics |= {f"accuracy_at_occlusion_{fraction}": accuracy / 2 for fraction in (0.25, 0.5, 0.75)}
    return [
        usual | changes | {"metric": name, "seed": str(seed), "value": f"{value + NOISE[seed]:.6g}"}
        for name, value in metrics.items()
        for seed in range(seeds)
    ]


def rows(ours: float, none: float, dropout: float, **changes: Any) -> list[dict[str, str]]:
    return [
        *cell(none),
        *cell(dropout, regulariser="attention dropout", ratio="0.2"),
        *cell(ours, **OURS, **changes),
    ]


def text(found: list[dict[str, str]]) -> str:
    return results_text(GRID, found, CELL)


def test_a_card_says_where_its_model_wins_and_where_it_loses() -> None:
    shown = text(rows(0.8, none=0.7, dropout=0.9))
    assert "**DropKey 0.3 is better than none in accuracy (+0.100 ± 0.000), and better than none in NLL (-0.1" in shown
    assert "it is worse than attention dropout 0.2 in accuracy (-0.100 ± 0.000), and worse than attention" in shown
    assert "No advantage" not in shown


def test_a_card_says_plainly_that_nothing_is_won() -> None:
    for ours, word in ((0.7, "not distinguishable from"), (0.6, "worse than")):
        shown = text(rows(ours, none=0.7, dropout=0.7))
        assert shown.count(word) == 4 and "better" not in shown and "No advantage of DropKey 0.3 is shown." in shown


def test_one_seed_distinguishes_nothing() -> None:
    found = [row for row in rows(0.9, none=0.7, dropout=0.7) if row["seed"] == "1"]
    shown = text(found)
    assert shown.count("measured once, so not distinguishable from") == 4
    assert (
        "No advantage" in shown and "0.920 (one seed, no interval)" in shown and "mean differences of 1 pairs" in shown
    )


def test_each_seed_has_its_own_values_beside_those_of_all() -> None:
    shown = text(rows(0.8, none=0.7, dropout=0.7))
    # Student's t of two degrees of freedom, 4.303, by the standard deviation of three seeds, over the root of three
    assert "| accuracy | 0.820 | 0.803 ± 0.038 |" in shown and "40 test images of cats" in shown


def test_rows_of_several_commits_are_reported() -> None:
    assert "Rows of commit `abc`" in text(rows(0.8, none=0.7, dropout=0.7))
    shown = text(rows(0.8, none=0.7, dropout=0.7, git_sha="def-changed"))
    assert "Rows of commit `abc`, `def-changed`" in shown and "mixed git_sha: abc, def-changed" in shown
    assert "some rows were measured on code that no commit holds" in shown


def test_a_seed_or_metric_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no test row of accuracy, nll, .* run its grid with --test first"):
        text([row for row in rows(0.8, none=0.7, dropout=0.7) if row["seed"] != "1"])


def test_the_ratio_is_that_of_the_test_rows() -> None:
    fields = {"model": "tiny", "regulariser": "dropkey", "schedule": "decreasing", "pattern": "score"}
    entry = CardEntry(name="x", grid="small.json", cell=fields, seed=1)
    found = rows(0.8, none=0.7, dropout=0.7)
    assert entry.chosen(GRID, found) == CELL
    with pytest.raises(ValueError, match=r"needs test rows of one ratio, found \['0.1', '0.3'\]"):
        entry.chosen(GRID, found + cell(0.8, **{**OURS, "ratio": "0.1"}))
