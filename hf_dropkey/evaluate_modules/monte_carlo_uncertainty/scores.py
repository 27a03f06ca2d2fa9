"""Uncertainty of Monte-Carlo predictions, and how well it tells wrong predictions; with NumPy."""

import numpy as np
from numpy.typing import NDArray


def entropy(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    """Shannon entropy in nats over the last dimension."""
    values = probabilities.astype(np.float64)
    result: NDArray[np.float64] = -(values * np.log(np.where(values > 0, values, 1.0))).sum(axis=-1)
    return result


def uncertainties(passes: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
    """Three measures of each image's uncertainty, `[B]`, from the probabilities of several passes `[B, S, C]`.

    Returns:
        `entropy`: of the mean prediction, in nats, total uncertainty. `mutual_information`: that entropy minus the mean
        entropy of a pass, in nats: what the passes disagree about. `standard_deviation`: of the probability of the
        predicted class over the passes.
    """
    mean = passes.mean(axis=1)
    total = entropy(mean)
    # zero up to rounding where all passes agree
    information = np.maximum(total - entropy(passes).mean(axis=1), 0.0)
    chosen = np.take_along_axis(passes, mean.argmax(axis=-1)[:, None, None], axis=-1)[..., 0]
    return {"entropy": total, "mutual_information": information, "standard_deviation": chosen.std(axis=1, ddof=1)}


def error_auroc(uncertainty: NDArray[np.floating], wrong: NDArray[np.bool_]) -> float:
    """The probability that a wrong prediction is more uncertain than a right one, ties counting half, in [0, 1].

    The area under the ROC curve of uncertainty as a test for mistakes; 0.5 is chance. NaN if all predictions are right,
    or all wrong.
    """
    mistakes = int(wrong.sum())
    if mistakes in (0, len(wrong)):
        return float("nan")
    _, places, counts = np.unique(uncertainty, return_inverse=True, return_counts=True)
    # the mean rank of equal values, from 1
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    above = ranks[wrong].sum() - mistakes * (mistakes + 1) / 2
    return float(above / (mistakes * (len(wrong) - mistakes)))
