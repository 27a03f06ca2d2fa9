"""Writes the model cards of the experiments' checkpoints from their weights and the rows of results.

    python scripts/write_model_cards.py
    python scripts/write_model_cards.py --names dropkey-vit-digits

Weights that are not in --output_dir, the folder of scripts/run_experiments.py, are trained by the code that trained
them for the rows. They are measured again, and a card is written only if the result equals the rows. Text that was
added to a card by hand is kept.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from hf_dropkey.hub.cards import model_card
from hf_dropkey.lab.cards import MEASURED, CardEntry, facts_of_card, values_of
from hf_dropkey.lab.grids import DONE, Grid, measure
from hf_dropkey.lab.rows import Row, read_rows


ROOT = Path(__file__).resolve().parents[1]
# rows have six digits, and processors differ in the last bits
TOLERANCE = 1e-4


@dataclass
class CardArguments:
    """The cards, the files to read and write."""

    checkpoints: Path = field(
        default=ROOT / "scripts" / "checkpoints.json", metadata={"help": "JSON file that lists the cards."}
    )
    names: list[str] = field(default_factory=list, metadata={"help": "Only these cards of the list."})
    results: Path = field(default=ROOT / "model_cards" / "results.csv", metadata={"help": "CSV file of the rows."})
    output_dir: Path = field(
        default=Path("runs/experiments"), metadata={"help": "Folder of the grids' weights; missing ones are trained."}
    )
    cards_dir: Path = field(default=ROOT / "model_cards", metadata={"help": "Folder for the cards."})


def check_values(entry: CardEntry, rows: list[dict[str, str]], expected: dict[str, float]) -> None:
    """Raises ValueError if weights that were measured again have other values than the rows."""
    found = {row["metric"]: float(row["value"]) for row in rows}
    other = [metric for metric in MEASURED if abs(found[metric] - expected[metric]) > TOLERANCE]
    if other:
        differing = ", ".join(f"{metric} {found[metric]} (rows: {expected[metric]})" for metric in other)
        raise ValueError(
            f"the weights of {entry.name} are not those of the rows: {differing}; delete their folder to train them again, "
            "or run the grid again under another name"
        )


def write(entry: CardEntry, rows: list[Row], arguments: CardArguments) -> Path:
    """Writes one card; returns its path."""
    grid = Grid.load(ROOT / entry.grid)
    cell = entry.chosen(grid, rows)
    values = values_of(grid, rows, cell)
    weights = arguments.output_dir / grid.name / cell.name
    check_values(entry, measure(grid, [cell], weights, split="test", root=ROOT, data={}), values)
    card = arguments.cards_dir / f"{entry.name}.md"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / entry.name
        shutil.copytree(weights, folder)
        configured = json.loads((folder / DONE).read_text(encoding="utf-8"))["told"]
        facts_of_card(entry, grid, rows, configured=configured, weights=folder / "model.safetensors").save(folder)
        evaluated = {f"eval_{metric}": value for metric, value in values.items()}
        (folder / "eval_results.json").write_text(json.dumps(evaluated), encoding="utf-8")
        model_card(folder, existing=card.read_text(encoding="utf-8") if card.is_file() else "").save(card)
    return card


def main() -> int:
    """Runs the job."""
    group: Any = CardArguments
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses()
    # as in scripts/run_experiments.py
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    entries = CardEntry.load(arguments.checkpoints)
    unknown = sorted(set(arguments.names) - {entry.name for entry in entries})
    if unknown:
        raise ValueError(
            f"--names {' '.join(unknown)} is not in {arguments.checkpoints}; choose from "
            f"{', '.join(entry.name for entry in entries)}"
        )
    rows: list[Row] = list(read_rows(arguments.results))
    for entry in entries:
        if not arguments.names or entry.name in arguments.names:
            print(write(entry, rows, arguments), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
