"""Rows are read whole or not at all, intervals are Student's t, and mixed origins are reported."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_dropkey.intervals import difference, interval
from hf_dropkey.lab.rows import COLUMNS, by_cell, choose, read_rows, warnings
from hf_dropkey.lab.timing import append_rows


def row(**changes: str) -> dict[str, str]:
    usual = dict.fromkeys(COLUMNS, "x") | {"metric": "accuracy", "seed": "0", "value": "0.5", "git_sha": "abc"}
    return {**usual, **changes}


def test_an_interval_is_that_of_students_t() -> None:
    values = [0.71, 0.74, 0.69, 0.75, 0.70]
    found = interval(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((np.mean(values), low, high, 5))
    assert found.half == pytest.approx((high - low) / 2) and str(found) == f"0.718 ± {found.half:.3f}"


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    inside = np.mean([found.low <= 3.0 <= found.high for found in map(interval, draws.tolist())])
    assert abs(inside - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_one_seed_has_no_interval_and_says_so() -> None:
    found = interval([0.5])
    assert (found.low, found.high, found.n) == (0.5, 0.5, 1)
    assert str(found) == "0.500 (one seed, no interval)"
    for wrong in ([], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="finite values of at least one seed"):
            interval(wrong)


def test_differences_are_taken_seed_by_seed() -> None:
    found = difference({"0": 0.9, "1": 0.5, "7": 0.1}, {"0": 0.8, "1": 0.4, "2": 0.0})
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0) and found.n == 2
    with pytest.raises(ValueError, match="no seed in common"):
        difference({"0": 0.9}, {"1": 0.9})


def test_rows_are_chosen_and_sorted_into_cells() -> None:
    rows = [
        row(ratio="0.1", value="0.5"),
        row(ratio="0.1", seed="1", value="0.6"),
        row(ratio="0.3", value="0.7"),
        row(ratio="0.3", metric="nll", value="2"),
    ]
    assert len(choose(rows, ratio=["0.1"])) == 2 and len(choose(rows, seed=0, metric="accuracy")) == 2
    assert by_cell(rows, ["task", "ratio"], "accuracy") == {
        ("x", "0.1"): {"0": 0.5, "1": 0.6},
        ("x", "0.3"): {"0": 0.7},
    }
    with pytest.raises(ValueError, match=r"there are no columns \['ratios'\]"):
        choose(rows, ratios=1)
    with pytest.raises(ValueError, match="two values of accuracy for seed 0 of the cell with task x"):
        by_cell(rows, ["task"], "accuracy")


def test_what_was_mixed_is_an_error() -> None:
    assert warnings([row(), row()]) == []
    notes = " ".join(warnings([row(), row(git_sha="def-changed", device="cuda")]))
    assert "mixed git_sha: abc, def-changed" in notes and "mixed device: cuda, x" in notes
    assert "on code that no commit holds" in notes


def test_a_file_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    append_rows(file, [row(), row(seed="1")])
    assert read_rows(file) == [row(), row(seed="1")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": ""}, "line 3 of .* has no device; complete the row"),
        ({"value": "high"}, "line 3 of .* has the value 'high', not a finite number"),
        ({"value": "nan"}, "line 3 of .* has the value 'nan', not a finite number"),
        ({"seed": "", "epochs": ""}, "no seed, epochs"),
    ],
)
def test_rows_with_missing_fields_are_errors(tmp_path: Path, change: dict[str, str], message: str) -> None:
    file = tmp_path / "rows.csv"
    append_rows(file, [row(), row(**change)])
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_files_of_another_kind_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with pytest.raises(FileNotFoundError, match=r"run_experiments\.py writes it"):
        read_rows(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns experiment, task"):
        read_rows(file)
    append_rows(tmp_path / "whole.csv", [row()])
    file.write_text((tmp_path / "whole.csv").read_text().rstrip() + ",more\n")
    with pytest.raises(ValueError, match="more fields than columns"):
        read_rows(file)
