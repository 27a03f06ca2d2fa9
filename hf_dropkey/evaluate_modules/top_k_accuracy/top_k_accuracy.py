"""Top-k accuracy for the library `evaluate`."""

from collections.abc import Sequence
from typing import Any

# evaluate reads these lines: one package on each
import datasets
import evaluate
import numpy as np

from .scores import top_k_accuracy


_DESCRIPTION = (
    """The fraction of images whose class is among the k most probable ones; a tie counts against the model."""
)

_KWARGS_DESCRIPTION = """
Args:
    probabilities: for each image a list of class probabilities, or a list of such lists, one for each pass of Monte-Carlo
        inference, whose mean is taken.
    references: the class number of each image.
    k: a number, or several. Default: 1, and 5 if there are more than five classes.
Returns:
    accuracy: for k = 1, [0, 1].
    top5_accuracy: for k = 5, and so on.
Example:
    >>> accuracy = evaluate.load("path/to/top_k_accuracy")
    >>> accuracy.compute(probabilities=[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0]], references=[0, 0], k=[1, 2])
    {'accuracy': 0.5, 'top2_accuracy': 1.0}
"""

_CITATION = ""

SINGLE = datasets.Sequence(datasets.Value("float64"))
FEATURES = [
    datasets.Features({"probabilities": kind, "references": datasets.Value("int64")})
    for kind in (SINGLE, datasets.Sequence(SINGLE))
]


class TopKAccuracy(evaluate.Metric):
    """Accuracy, and top-k accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=FEATURES,
        )

    def _compute(
        self, *, probabilities: Any, references: Any, k: int | Sequence[int] | None = None
    ) -> dict[str, float]:
        passes, labels = checked(probabilities, references)
        mean = passes.mean(axis=1)
        several = ((1, 5) if mean.shape[-1] > 5 else (1,)) if k is None else (k,) if isinstance(k, int) else k
        return {
            "accuracy" if one == 1 else f"top{one}_accuracy": top_k_accuracy(mean, labels, k=one) for one in several
        }


def checked(probabilities: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[images, passes, classes]` in float64, and class numbers `[images]`.

    Raises:
        ValueError: There are no images, the numbers are not probabilities, or a reference is not a class.
    """
    if not len(references):
        raise ValueError("no images; give probabilities and references of at least one")
    try:
        passes = np.asarray(probabilities, dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"the images have different numbers of classes or passes ({error}); give as many for each"
        ) from error
    passes = passes[:, None, :] if passes.ndim == 2 else passes
    labels = np.asarray(references, dtype=np.int64)
    if not ((passes >= 0).all() and np.allclose(passes.sum(axis=-1), 1, atol=1e-3)):
        sums = passes.sum(axis=-1)
        raise ValueError(
            f"probabilities are not below 0, and those of an image sum to 1; found a smallest of {passes.min():.4g} and sums "
            f"from {sums.min():.4g} to {sums.max():.4g}. Of logits, take the softmax first"
        )
    strange = labels[(labels < 0) | (labels >= passes.shape[-1])]
    if len(strange):
        raise ValueError(
            f"the references have class {strange[0]}, and the probabilities are of classes 0 to {passes.shape[-1] - 1}"
        )
    return passes, labels
