"""Writes the table in `hf_dropkey/models/backend_proofs.py`: where rows prove the fused kernel faster than `sdpa`.

    python scripts/write_backend_proofs.py

Models take the fused kernel by default only there (`hf_dropkey.default_backend`). The rows are those of
`model_cards/benchmarks.csv` and, from GPUs, `model_cards/benchmarks_gpu.csv`; a proof needs 15 rounds or more. Run it after
new rows; a test fails until then.
"""

from pathlib import Path

from hf_dropkey.lab.backend_proofs import TABLE, proofs_of, with_proofs
from hf_dropkey.lab.costs import read_benchmarks
from hf_dropkey.lab.rows import Row


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
FILES = (CARDS / "benchmarks.csv", CARDS / "benchmarks_gpu.csv")


def committed_rows() -> list[Row]:
    """The rows of all files of benchmarks that are there."""
    return [row for file in FILES if file.is_file() for row in read_benchmarks(file)]


if __name__ == "__main__":
    proofs = proofs_of(committed_rows())
    TABLE.write_text(with_proofs(TABLE.read_text(encoding="utf-8"), proofs), encoding="utf-8")
    print(f"{len(proofs)} proofs in {TABLE.name}")
    for proof in proofs:
        print(f"  {proof}")
