"""Calibration of a classifier for the library `evaluate`."""

from typing import Any

# evaluate reads these lines: one package on each
import datasets
import evaluate
import numpy as np

from .scores import CALIBRATION_BINS, brier_score, expected_calibration_error, negative_log_likelihood


_DESCRIPTION = (
    """Calibration of class probabilities: expected calibration error, negative log-likelihood and Brier score."""
)

_KWARGS_DESCRIPTION = """
Args:
    probabilities: for each image a list of class probabilities, or a list of such lists, one for each pass of Monte-Carlo
        inference, whose mean is taken.
    references: the class number of each image.
    bins: bins of equal width of the expected calibration error. Default: 15.
Returns:
    ece: expected calibration error, [0, 1].
    nll: negative log-likelihood, in nats; infinite where the probability of a reference is 0.
    brier: Brier score, summed over the classes, [0, 2].
Example:
    >>> calibration = evaluate.load("path/to/calibration")
    >>> calibration.compute(probabilities=[[0.9, 0.1], [0.4, 0.6]], references=[0, 0])["brier"]
    0.37
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}
"""

SINGLE = datasets.Sequence(datasets.Value("float64"))
FEATURES = [
    datasets.Features({"probabilities": kind, "references": datasets.Value("int64")})
    for kind in (SINGLE, datasets.Sequence(SINGLE))
]


class Calibration(evaluate.Metric):
    """Expected calibration error, negative log-likelihood and Brier score."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(self, *, probabilities: Any, references: Any, bins: int = CALIBRATION_BINS) -> dict[str, float]:
        passes, labels = checked(probabilities, references)
        mean = passes.mean(axis=1)
        with np.errstate(divide="ignore"):
            logarithms = np.log(mean)
        return {
            "ece": expected_calibration_error(mean, labels, bins=bins),
            "nll": negative_log_likelihood(logarithms, labels),
            "brier": brier_score(mean, labels),
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
