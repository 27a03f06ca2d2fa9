"""Top-k accuracy, with NumPy."""

import numpy as np
from numpy.typing import NDArray


def top_k_accuracy(scores: NDArray[np.floating], labels: NDArray[np.integer], *, k: int) -> float:
    """Fraction of images whose label is among the `k` largest scores, which may be logits or probabilities.

    A tie counts against the model: a label is in the top `k` only when fewer than `k` other classes score as high,
    so a model that gives every class the same score is not right by luck of the class order.

    Args:
        scores: `[B, C]`.
        labels: Class numbers, `[B]`.
        k: How many of the largest.

    Raises:
        ValueError: `k` is not between 1 and the number of classes.
    """
    classes = scores.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k={k} is outside 1..{classes}, the number of classes; choose k in that range")
    own = np.take_along_axis(scores, labels[:, None], axis=-1)
    rivals = (scores >= own).sum(axis=-1) - 1
    return float((rivals < k).mean())
