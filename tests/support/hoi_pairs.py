"""Pairs and annotations for scores of human-object interaction detection.

Imports NumPy and the package.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_dropkey.hoi.metrics import FoundPairs, TruePairs


def found(persons: Sequence[Any], things: Sequence[Any], labels: Sequence[int], scores: Any) -> FoundPairs:
    """Predictions of one image."""
    boxes = (np.array(part, dtype=np.float64).reshape(-1, 4) for part in (persons, things))
    return FoundPairs(*boxes, np.array(labels, dtype=np.int64), np.array(scores, dtype=np.float64))


def truth(boxes: Sequence[Any], labels: Sequence[int], pairs: Sequence[Any]) -> TruePairs:
    """Annotations of one image."""
    return TruePairs(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(pairs, dtype=np.int64).reshape(-1, 3),
    )
