"""Every number in the results of a model card comes from the rows, and so does its metadata."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_dropkey.cards import SECTION
from hf_dropkey.evidence_cards import CardEntry, results_text, values_of
from hf_dropkey.experiments import Grid
from hf_dropkey.results import read_rows


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
