"""The job that writes cards, as a user runs it: from weights and rows to a card, which keeps text added by hand."""

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from small_grids import ORIGIN, RECIPE

from hf_dropkey.lab.cards import MEASURED
from hf_dropkey.lab.grids import Cell, Grid, measure
from hf_dropkey.lab.rows import COLUMNS, read_rows
from hf_dropkey.lab.timing import append_rows


ROOT = Path(__file__).resolve().parents[1]
CELLS = [
    {"regulariser": "none"},
    {"regulariser": "attention dropout", "ratio": 0.2},
    {"regulariser": "dropkey", "ratio": 0.3},
]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a list of cards, a grid, the weights of one seed and their rows."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    small: dict[str, Any] = {
        "about": "tests",
        "task": "digits",
        "recipe": str(folder / "recipe.json"),
        "models": {"tiny": {}},
    }
    small |= {"seeds": [0], "select_by": "nll", "occlusion_patch": 2, "cells": CELLS}
    (folder / "small.json").write_text(json.dumps(small))
    grid = Grid.load(folder / "small.json")
    for cell in grid.cells:
        weights = folder / "weights" / "small" / cell.name
        rows = measure(grid, [cell], weights, split="test", root=ROOT, data={})
        append_rows(folder / "rows.csv", [{name: {**row, **ORIGIN}[name] for name in COLUMNS} for row in rows])
    fields = {name: value for name, value in asdict(grid.cells[-1]).items() if name not in ("ratio", "seed")}
    card = {"name": "tiny-card", "grid": str(folder / "small.json"), "cell": fields, "seed": 0, "limits": ["Tiny."]}
    (folder / "checkpoints.json").write_text(json.dumps([card]))
    (folder / "cards").mkdir()
    return folder


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evidence: Path) -> Iterator[Any]:
    """Runs the job on a copy of the evidence; returns the card's path."""
    shutil.copytree(evidence, tmp_path, dirs_exist_ok=True)
    verbosity = transformers.logging.get_verbosity()

    def call(*words: str) -> Path:
        places = {
            "checkpoints": "checkpoints.json",
            "results": "rows.csv",
            "output_dir": "weights",
            "cards_dir": "cards",
        }
        given = [word for name, place in places.items() for word in (f"--{name}", str(tmp_path / place))]
        monkeypatch.setattr(sys, "argv", ["write_model_cards.py", *given, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / "write_model_cards.py"), run_name="__main__")
        assert ended.value.code == 0
        return tmp_path / "cards" / "tiny-card.md"

    yield call
    # the job is quiet; the tests after it are not
    transformers.logging.set_verbosity(verbosity)


def test_a_card_is_made_of_weights_and_rows(write: Any, evidence: Path) -> None:
    card = write()
    text = card.read_text(encoding="utf-8")
    cell = Cell(model="tiny", regulariser="dropkey", ratio=0.3, schedule="decreasing", pattern="score")
    rows = [row for row in read_rows(evidence / "rows.csv") if row["regulariser"] == "dropkey"]
    values = {row["metric"]: float(row["value"]) for row in rows if row["metric"] in MEASURED}
    shown = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert shown == values and f"| accuracy | {values['accuracy']:.3f} |" in text
    assert "OMP_NUM_THREADS=1 python scripts/train_image_classification.py" in text
    assert " ".join([*cell.arguments(), "--output_dir", "runs/tiny-card"]) in text
    assert "- Tiny." in text and "so not distinguishable from none" in text and str(evidence) not in text
    assert "license" not in ModelCard(text).data.to_dict()

    card.write_text(text.replace("# tiny-card\n", "# tiny-card\n\nMy words.\n"), encoding="utf-8")
    assert "My words." in write("--names", "tiny-card").read_text(encoding="utf-8")


def test_weights_that_are_gone_are_trained_to_the_same_card(write: Any, tmp_path: Path) -> None:
    first = write().read_bytes()
    shutil.rmtree(tmp_path / "weights")
    assert write().read_bytes() == first


def test_other_weights_than_those_of_the_rows_get_no_card(write: Any, tmp_path: Path) -> None:
    rows = read_rows(tmp_path / "rows.csv")
    for row in rows:
        row["value"] = str(float(row["value"]) + 0.01 * (row["metric"] == "nll"))
    (tmp_path / "rows.csv").unlink()
    append_rows(tmp_path / "rows.csv", rows)
    with pytest.raises(ValueError, match=r"the weights of tiny-card are not those of the rows: nll \d.*delete their"):
        write()
    assert not list((tmp_path / "cards").iterdir())


def test_an_unknown_card_is_an_error(write: Any) -> None:
    with pytest.raises(ValueError, match=r"--names other is not in .*; choose from tiny-card"):
        write("--names", "other")
