"""The table of proofs for `default_backend`, from the rows of `scripts/benchmark_attention.py` on a GPU."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from hf_dropkey.models import backend_proofs
from hf_dropkey.models.attention import TRITON_NAME
from hf_dropkey.models.backend_proofs import Proof

from .costs import read_benchmarks
from .rows import Row


TABLE = Path(backend_proofs.__file__)
FILES = ("benchmarks.csv", "benchmarks_gpu.csv")
# the fused kernel against the default path, both with DropKey, in the same rounds on the GPU's own clock
METRIC = "GPU time over sdpa/dropkey"
# rounds behind a proof
MINIMUM_ROUNDS = 15
START = "PROOFS: tuple[Proof, ...] = ("


def committed_rows(cards: Path) -> list[Row]:
    """The rows of the files of benchmarks in the folder `model_cards`, of those that are there."""
    return [row for name in FILES if (cards / name).is_file() for row in read_benchmarks(cards / name)]


def proofs_of(rows: Iterable[Row]) -> list[Proof]:
    """What rows of benchmarks prove; the last row of a shape counts.

    A shape is won where the third quartile of the ratio is below 1. A proof spans neighbouring measured numbers of tokens
    at which every measured shape is won; beyond them nothing is claimed.

    Args:
        rows: Of files of benchmarks; those of other workloads, devices and variants prove nothing.
    """
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        wanted = (row["workload"], row["backend"], row["regulariser"], row["metric"])
        if wanted != ("attention", TRITON_NAME, "dropkey", METRIC) or int(row["n"]) < MINIMUM_ROUNDS:
            continue
        # rows of a CPU have no such column
        if row.get("capability"):
            shape = ("device", "capability", "dtype", "head_width", "tokens", "batch", "heads")
            latest[tuple(row[name] for name in shape)] = row
    proofs = []
    for kind in sorted({key[:4] for key in latest}):
        by_tokens: dict[int, list[Row]] = {}
        for key, row in latest.items():
            if key[:4] == kind:
                by_tokens.setdefault(int(row["tokens"]), []).append(row)
        won = {tokens: all(float(row["third_quartile"]) < 1 for row in found) for tokens, found in by_tokens.items()}
        for is_won, together in groupby(sorted(by_tokens), key=won.__getitem__):
            if is_won:
                proofs.append(_proof(kind, [row for tokens in together for row in by_tokens[tokens]]))
    return proofs


def _proof(kind: tuple[str, ...], rows: Sequence[Row]) -> Proof:
    """The proof of all rows of one kind."""
    device, capability, dtype, head_width = kind
    major, minor = capability.split(".")
    tokens = [int(row["tokens"]) for row in rows]
    worst = max(rows, key=lambda row: float(row["third_quartile"]))
    ratio, first, third = (float(worst[name]) for name in ("value", "first_quartile", "third_quartile"))
    return Proof(
        device, (int(major), int(minor)), dtype, int(head_width), (min(tokens), max(tokens)), ratio, first, third
    )


def with_proofs(source: str, proofs: Sequence[Proof]) -> str:
    """The source of `models/backend_proofs.py` with another table, which is its last statement.

    Raises:
        ValueError: The source has no table.
    """
    head, found, _ = source.partition(START)
    if not found:
        raise ValueError(
            f"the source has no line that starts with {START!r}; restore models/backend_proofs.py from git"
        )
    if not proofs:
        return f"{head}{START})\n"
    lines = []
    for proof in proofs:
        fields = [f"        {name}={_literal(value)},\n" for name, value in proof._asdict().items()]
        lines.append(f"    Proof(\n{''.join(fields)}    ),\n")
    return f"{head}{START}\n{''.join(lines)})\n"


def _literal(value: object) -> str:
    """A field in Python, in the form that the formatter keeps."""
    # repr takes single quotes
    return json.dumps(value) if isinstance(value, str) else repr(value)
