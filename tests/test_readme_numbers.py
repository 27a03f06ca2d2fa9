"""The generated parts of the documents are those of the committed rows."""

from pathlib import Path

from hf_dropkey.lab.costs import cost_lines, cost_tables, read_benchmarks
from hf_dropkey.lab.evidence import by_start, in_short
from hf_dropkey.lab.rows import read_rows
from hf_dropkey.lab.tables import with_part
from hf_dropkey.lab.task_evidence import load_grids, whole_report


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
HOW = "run python scripts/report_results.py"


def test_the_evidence_is_current() -> None:
    rows, grids = by_start(read_rows(CARDS / "results.csv")), load_grids(ROOT / "scripts" / "task_grids")
    assert (CARDS / "evidence.md").read_text(encoding="utf-8").endswith(whole_report(rows, grids)), HOW
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_part(readme, "evidence", in_short(rows)) == readme, HOW


def test_the_costs_are_current() -> None:
    rows = read_benchmarks(CARDS / "benchmarks.csv")
    for file, text in (("README.md", cost_lines(rows)), ("docs/speed.md", cost_tables(rows))):
        document = (ROOT / file).read_text(encoding="utf-8")
        assert with_part(document, "costs", text) == document, HOW
