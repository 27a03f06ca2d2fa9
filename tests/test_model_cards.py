"""Every number in the results of a model card comes from the rows, and so does its metadata."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from small_grids import RECIPE

from hf_dropkey.hub.cards import SECTION
from hf_dropkey.lab.cards import CardEntry, results_text, values_of
from hf_dropkey.lab.grids import Cell, Grid, command_of, job_of, train_cell, words_of
from hf_dropkey.lab.rows import read_rows


ROOT = Path(__file__).resolve().parents[1]
ENTRIES = CardEntry.load(ROOT / "scripts" / "checkpoints.json")


def card_errors(entry: CardEntry, text: str) -> list[str]:
    """What of a card's results, metadata and command is not what the rows and the grid say."""
    grid, rows = Grid.load(ROOT / entry.grid), read_rows(ROOT / "model_cards" / "results.csv")
    cell = entry.chosen(grid, rows)
    found = next((part[0] for part in SECTION.finditer(text) if part[1] == "results"), "")
    body = "\n".join(found.splitlines()[1:-1])
    results = ModelCard(text).data.eval_results or []
    errors = []
    if body != f"## Results\n\n{results_text(grid, rows, cell)}":
        errors.append("results")
    if {one.metric_type: one.metric_value for one in results} != values_of(grid, rows, cell):
        errors.append("metadata")
    if command_of(grid, cell, Path("runs") / entry.name) not in text:
        errors.append("command")
    return errors


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_card_says_what_the_rows_say(entry: CardEntry) -> None:
    text = (ROOT / "model_cards" / f"{entry.name}.md").read_text(encoding="utf-8")
    assert card_errors(entry, text) == []


def test_a_changed_number_is_found() -> None:
    text = (ROOT / "model_cards" / f"{ENTRIES[0].name}.md").read_text(encoding="utf-8")
    head, _, body = text.partition("## Results")
    assert card_errors(ENTRIES[0], f"{head}## Results{body.replace('0.', '0.9', 1)}") == ["results"]
    assert card_errors(ENTRIES[0], text.replace("value: 0.", "value: 0.9", 1)) == ["metadata"]
    assert card_errors(ENTRIES[0], text.replace("--seed 0", "--seed 1")) == ["command"]


def test_at_least_three_checkpoints_have_cards() -> None:
    assert len(ENTRIES) >= 3 and len({entry.grid for entry in ENTRIES}) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"colour": 1}], "a card whose fields colour are missing or unknown"),
        ([{"seed": None}, {}], "lists a card twice"),
    ],
)
def test_a_wrong_list_of_cards_is_an_error(tmp_path: Path, changes: list[dict], message: str) -> None:
    usual = {"name": "x", "grid": "g.json", "cell": {"model": "vit", "regulariser": "none"}, "seed": 0}
    file = tmp_path / "checkpoints.json"
    file.write_text(json.dumps([usual | change for change in changes]))
    with pytest.raises(ValueError, match=message):
        CardEntry.load(file)


def test_a_card_of_a_cell_without_test_rows_is_an_error() -> None:
    entry = replace(ENTRIES[0], cell={**ENTRIES[0].cell, "train_images": 7})
    with pytest.raises(ValueError, match="needs test rows of one ratio, found none; run scripts/run_experiments.py"):
        entry.chosen(Grid.load(ROOT / entry.grid), read_rows(ROOT / "model_cards" / "results.csv"))


@pytest.mark.slow
def test_the_stated_command_trains_the_weights_of_the_grid(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    grid = replace(
        Grid.load(ROOT / ENTRIES[0].grid), recipe=str(tmp_path / "recipe.json"), models={"tiny": {"max_steps": 6}}
    )
    cell = Cell(model="tiny", regulariser="dropkey", ratio=0.3, schedule="decreasing", pattern="score", seed=3)
    mine, stated = tmp_path / "mine", tmp_path / "stated"
    train_cell(job_of(grid, cell, mine, root=ROOT, data={}), mine)
    words = words_of(grid, cell, stated, data={})
    # what the card shows is these words, with shorter paths
    assert " ".join(words[:-2]) in command_of(grid, cell, stated)
    script = str(ROOT / "scripts" / "train_image_classification.py")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, script, grid.recipe, *words], check=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert (mine / "model.safetensors").read_bytes() == (stated / "model.safetensors").read_bytes()
