"""The masks that release 0.1.0 drew: a published run can be repeated only while the same seeds drop the same scores."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dropkey.models.dropkey import PATTERNS, dropped_scores


CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded" / "masks.json").read_text())


def draw(case: dict[str, Any]) -> torch.Tensor:
    real = torch.tensor(case["real"], dtype=torch.bool)[:, None, None] if "real" in case else None
    grid = tuple(case["grid"]) if case.get("grid") else None
    return dropped_scores(
        torch.tensor(case["seed"], dtype=torch.int32),
        tuple(case["shape"]),
        case["ratio"],
        pattern=case["pattern"],
        window=case.get("window", 3),
        grid=grid,
        real=real,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_the_first_release(pattern: str) -> None:
    chosen = [case for case in CASES if case["pattern"] == pattern]
    assert len(chosen) >= 60
    for case in chosen:
        dropped = draw(case)
        bits = np.packbits(dropped.numpy())
        assert list(dropped.shape) == case["returned"] and int(dropped.sum()) == case["sum"], case
        assert bits.tobytes().hex() == case.get("bits", bits.tobytes().hex()), case
        assert hashlib.sha256(bits.tobytes()).hexdigest() == case["sha256"], case


def test_other_masks_are_told_apart() -> None:
    """No two seeds or ratios of one shape and pattern share a hash, so an equal one says something."""
    large = [case for case in CASES if case["pattern"] in ("score", "block", "cross") and case["ratio"] >= 0.1]
    assert len({case["sha256"] for case in large}) == len(large)
