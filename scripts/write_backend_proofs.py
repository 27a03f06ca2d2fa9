"""Writes the table in `hf_dropkey/models/backend_proofs.py`: where rows prove the fused kernel faster than `sdpa`.

    python scripts/write_backend_proofs.py

Models take the fused kernel by default only there (`hf_dropkey.default_backend`). The rows are those of
`model_cards/benchmarks.csv` and, from GPUs, `model_cards/benchmarks_gpu.csv`; a proof needs 15 rounds or more. Run it after
new rows; a test fails until then.
"""

from pathlib import Path

from hf_dropkey.lab.backend_proofs import TABLE, committed_rows, proofs_of, with_proofs


CARDS = Path(__file__).resolve().parents[1] / "model_cards"


if __name__ == "__main__":
    proofs = proofs_of(committed_rows(CARDS))
    TABLE.write_text(with_proofs(TABLE.read_text(encoding="utf-8"), proofs), encoding="utf-8")
    print(f"{len(proofs)} proofs in {TABLE.name}")
    for proof in proofs:
        print(f"  {proof}")
