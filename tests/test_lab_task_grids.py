"""Grids of the paper's other tasks: cells, commands, rows, tables, a card; with a script that only writes its results."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import SHAPE

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.lab import task_grids
from hf_dropkey.lab.grids import Cell
from hf_dropkey.lab.rows import COLUMNS, choose, read_rows
from hf_dropkey.lab.task_evidence import load_grids, results_text, section, task_report, values_of
from hf_dropkey.lab.task_grids import TaskGrid, job_class, missing_cells, run_cell


ROOT = Path(__file__).resolve().parents[1]
GRID: dict[str, Any] = {
    "about": "",
    "task": "drawn scenes",
    "script": "train_hoi",
    "recipe": "recipe.json",
    "models": {"small": {"num_queries": 4}},
    "seeds": [0, 1, 2],
    "metrics": {"mAP": "fraction"},
    "published": "32.42 -> 33.21",
    "cells": [
        {"regulariser": "none", "train_images": [50, "all"]},
        {"regulariser": "attention dropout", "ratio": 0.1},
        {"regulariser": "dropkey", "ratio": 0.2, "train_images": [50, "all"]},
    ],
}


class Job:
    """A stand-in for a job: DropKey is better by 0.1 for every seed, attention dropout now better, now worse."""

    @classmethod
    def parse(cls, words: list[str]) -> "Job":
        job = cls()
        job.given = dict(zip(words[1:-3:2], words[2:-3:2], strict=True))
        return job

    given: dict[str, str]

    def execute(self, command: list[str]) -> None:
        if self.given["--num_queries"] != "4":
            raise ValueError("4 queries are wanted")
        seed = int(self.given["--seed"])
        found = 0.3 + 0.01 * seed + (0.1 if float(self.given["--dropkey_ratio"]) else 0)
        found += (0.05, -0.05, 0.02)[seed] if "--attention_dropout" in self.given else 0
        folder = Path(self.given["--output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        results = {
            "eval_mAP": found,
            "eval_runtime": 1.5,
            "eval_samples_per_second": 20.0,
            "parameters": 7,
            "epoch": 3.0,
        }
        (folder / "all_results.json").write_text(json.dumps(results))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, and the stand-in for the job."""
    monkeypatch.setitem(task_grids.JOBS, "train_hoi", f"{__name__}:Job")
    (tmp_path / "recipe.json").write_text(json.dumps({"learning_rate": 0.001}))
    return tmp_path


def load(folder: Path, **changes: Any) -> TaskGrid:
    file = folder / "drawn.json"
    file.write_text(json.dumps(GRID | changes))
    return TaskGrid.load(file)


def rows_of_all(grid: TaskGrid, root: Path) -> list[dict[str, str]]:
    found = [row for cell in grid.cells for row in run_cell(grid, cell, root / cell.name, root=root)]
    return [{**dict.fromkeys(COLUMNS, "same"), **row} for row in found]


def test_a_cell_is_a_run_of_the_script(root: Path) -> None:
    grid = load(root)
    cell = Cell(model="small", regulariser="dropkey", ratio=0.2, schedule="decreasing", pattern="score", seed=1)
    rows = {row["metric"]: row for row in run_cell(grid, cell, root / "run", root=root)}
    assert set(rows) == {"mAP", "cpu_seconds", "parameters"}
    assert rows["mAP"]["value"] == "0.41" and rows["mAP"]["images"] == "30" and rows["mAP"]["split"] == "held-out"
    assert 0 <= float(rows["cpu_seconds"]["value"]) < 60
    assert missing_cells(grid, list(rows.values())) == [
        one for one in sorted(grid.cells, key=lambda one: one.seed) if one != cell
    ]
    small = next(one for one in grid.cells if one.train_images == 50 and one.ratio)
    assert grid.command(small, Path("runs/x")).endswith(
        "scripts/train_hoi.py recipe.json --num_queries 4 --seed 0 --dropkey_ratio 0.2 --dropkey_schedule decreasing "
        "--dropkey_pattern score --max_train_samples 50 --output_dir runs/x"
    )


def test_the_section_compares_seed_by_seed(root: Path) -> None:
    grid = load(root)
    rows = rows_of_all(grid, root)
    text = section(grid, rows)
    assert "### 50 training images" in text and "32.42 -> 33.21" in text and "30 held-out images" in text
    assert "DropKey 0.2: better than none in mAP (+0.100 ± 0.000)" in text
    assert "attention dropout 0.1: not distinguishable from none in mAP (+0.007 ± " in text
    assert "| none | 3 | 0.310 ± 0.025 |" in text
    assert section(grid, []) == "" and task_report([grid], []) == ""
    assert task_report([grid], rows).startswith("# The paper's other tasks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "does not know the fields colour"),
        ({"script": "train_x"}, "the script 'train_x'; allowed are train_hoi, train_body_mesh"),
        ({"metrics": {"mAP2": "fraction"}}, "metrics \\['mAP2'\\]"),
        ({"cells": [{"regulariser": "dropkey", "ratio": [0.1, 0.2]}]}, "several ratios"),
        ({"cells": [{"regulariser": "dropkey", "ratio": 0.1, "alignment": "monte-carlo"}]}, "alignment 'monte-carlo'"),
    ],
)
def test_grids_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize("grid", load_grids(ROOT / "scripts" / "task_grids"), ids=lambda grid: grid.name)
def test_the_grids_of_the_project_are_arguments_of_their_scripts(grid: TaskGrid) -> None:
    regularisers = {cell.regulariser for cell in grid.cells}
    # a single cell compares nothing
    assert regularisers == {"none", "attention dropout", "dropkey"} or len(grid.cells) == 1
    for cell in {cell.kind(): cell for cell in grid.cells}.values():
        job = job_class(grid.script).parse([str(ROOT / grid.recipe), *grid.words(cell, Path("x"))])
        job.check()
        dropout = getattr(job.config, "attention_dropout", None) or getattr(
            job.config, "attention_probs_dropout_prob", 0.0
        )
        expected = {"none": (0, 0), "attention dropout": (0, cell.ratio), "dropkey": (cell.ratio, 0)}
        assert (job.config.dropkey_ratio, dropout) == expected[cell.regulariser]


def test_without_runs_of_none_there_are_values_and_no_differences(root: Path) -> None:
    grid = load(root)
    rows = [row for row in rows_of_all(grid, root) if row["regulariser"] == "dropkey"]
    text = section(grid, rows)
    assert "| DropKey 0.2 | 3 | 0.410 ± 0.025 |" in text and "difference" not in text.split("The paper")[0]


def test_the_script_runs_missing_cells_and_writes_a_card(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(root)
    script = ROOT / "scripts" / "run_task_grid.py"

    def here(*words: str) -> int:
        given = ["--results", str(root / "rows.csv"), "--output_dir", str(root / "runs"), "--cards_dir", str(root)]
        monkeypatch.setattr(sys, "argv", [str(script), str(root / "drawn.json"), *given, *words])
        space = runpy.run_path(str(script))
        space["main"].__globals__["ROOT"] = root
        code: int = space["main"]()
        return code

    assert here("--seeds", "1") == 0
    assert len(choose(read_rows(root / "rows.csv"), metric="mAP")) == 5
    load(root, models={"small": {"num_queries": 5}})
    assert here("--seeds", "2") == 1
    assert "FAILED" in (failed := capsys.readouterr().out) and "4 queries are wanted" in failed
    load(root)
    assert here() == 0
    assert "15 cells, 10 of them to run" in capsys.readouterr().out
    grid = TaskGrid.load(root / "drawn.json")
    assert missing_cells(grid, read_rows(root / "rows.csv")) == []
    cell = next(one for one in grid.cells if one.regulariser == "dropkey")
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(root / "runs" / "drawn" / cell.name)
    assert here("--card", "my-card", "--limits", "They are drawings.") == 0
    text = (root / "my-card.md").read_text()
    assert "0.400" in text and "They are drawings." in text and "drawn scenes" in text
    assert "DropKey 0.2: better than none in mAP (+0.100 ± 0.000)" in text


def test_the_card_of_the_scenes_says_what_the_rows_say() -> None:
    grid = TaskGrid.load(ROOT / "scripts" / "task_grids" / "hoi_scenes.json")
    cell = next(one for one in grid.cells if one.regulariser == "dropkey")
    text = (ROOT / "model_cards" / "dropkey-hoi-scenes.md").read_text(encoding="utf-8")
    rows = read_rows(ROOT / "model_cards" / "results.csv")
    assert results_text(grid, rows, cell) in text
    assert grid.command(cell, Path("runs/dropkey-hoi-scenes")) in text
    assert f"value: {values_of(grid, rows, cell)['mAP']}" in text
