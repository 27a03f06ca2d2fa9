"""Calibration of class probabilities: expected calibration error, negative log-likelihood, Brier score; with NumPy."""

import numpy as np
from numpy.typing import NDArray


CALIBRATION_BINS = 15


def negative_log_likelihood(log_probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean of -log p(label), in nats, from log-probabilities `[B, C]` and class numbers `[B]`."""
    return float(-np.take_along_axis(log_probabilities, labels[:, None], axis=-1).mean())


def expected_calibration_error(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], *, bins: int = CALIBRATION_BINS
) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins, weighted by bin size, in [0, 1].

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3; their 15 bins are the default.

    Args:
        probabilities: `[B, C]`.
        labels: Class numbers, `[B]`.
        bins: How many.

    Raises:
        ValueError: There is no bin.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} is below 1; choose for example {CALIBRATION_BINS}")
    confidence = probabilities.max(axis=-1)
    correct = probabilities.argmax(axis=-1) == labels
    # bins are (lower, upper], as in the paper; a confidence is never 0, so the first bin loses nothing
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def brier_score(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean over images of the squared distance between the probabilities and the label as one of 0 and 1, in [0, 2].

    Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 78, 1950, equation 2.
    """
    own = np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
    # sum of (p - y)^2, without a second array of the size of the probabilities
    return float(((probabilities**2).sum(axis=-1) - 2 * own + 1).mean())
