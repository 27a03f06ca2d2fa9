"""Draws time and memory of attention against the number of tokens, from rows of scripts/benchmark_attention.py.

python scripts/draw_benchmark.py model_cards/benchmarks.csv cpu float32 model_cards/figures/attention_cpu.png
"""

import csv
import sys
from pathlib import Path

from hf_dropkey.plots import attention_costs


def main() -> None:
    """Runs the job."""
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    source, device, dtype, figure_file = sys.argv[1:]
    with Path(source).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["workload"] == "attention"]
    chosen = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)]
    if not chosen:
        there = sorted({(row["device"], row["dtype"]) for row in rows})
        raise SystemExit(f"{source} has no attention rows of {device} in {dtype}; it has those of {there}")
    # a later measurement of the same point replaces an earlier one
    latest = {tuple(row[name] for name in ("backend", "regulariser", "tokens", "metric")): row for row in chosen}
    about = chosen[-1]
    title = (
        f"Attention, forward and backward, on {device} ({about['threads']} threads) in {dtype}: "
        f"medians and quartiles; torch {about['torch']}"
    )
    attention_costs(list(latest.values()), title=title).savefig(figure_file, dpi=110)


if __name__ == "__main__":
    main()
