"""Classification metrics from logits: accuracy, top-5 accuracy, negative log-likelihood, expected calibration error.

Everything is computed here with NumPy in float64, and nothing is downloaded. `classification_metrics` is a
`compute_metrics` for `Trainer`.
"""

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction


CALIBRATION_BINS = 15


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities `[B, C]` of logits `[B, C]`, in float64 whatever comes in."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def top_k_accuracy(logits: NDArray[np.floating], labels: NDArray[np.integer], *, k: int) -> float:
    """Fraction of images whose label is among the `k` largest logits.

    A tie counts against the model: a label is in the top `k` only when fewer than `k` other classes score as high,
    so a model that gives every class the same logit is not right by luck of the class order.

    Raises:
        ValueError: `k` is not between 1 and the number of classes.
    """
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k={k} is outside 1..{classes}, the number of classes; choose k in that range")
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    rivals = (logits >= own).sum(axis=-1) - 1
    return float((rivals < k).mean())


def negative_log_likelihood(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean of -log p(label), in nats."""
    return float(-np.take_along_axis(log_softmax(logits), labels[:, None], axis=-1).mean())


def expected_calibration_error(
    logits: NDArray[np.floating], labels: NDArray[np.integer], *, bins: int = CALIBRATION_BINS
) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins, weighted by bin size, in [0, 1].

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3; their 15 bins are the default.
    """
    probabilities = np.exp(log_softmax(logits))
    confidence = probabilities.max(axis=-1)
    correct = probabilities.argmax(axis=-1) == labels
    # bins are (lower, upper], as in the paper; a confidence is never 0, so the first bin loses nothing
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a `Trainer`: accuracy, top5_accuracy (with more than 5 classes), nll and ece.

    Raises:
        ValueError: There are no images, or a logit is not finite.
    """
    logits = prediction.predictions
    # a model that also returns attentions or hidden states gives a tuple that starts with the logits
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    labels = np.asarray(prediction.label_ids)
    if len(labels) == 0:
        raise ValueError("no images to evaluate; the evaluation split is empty")
    broken = int((~np.isfinite(logits)).any(axis=-1).sum())
    if broken:
        raise ValueError(
            f"the logits of {broken} of {len(labels)} images are not finite: training diverged; "
            "lower the learning rate or train in float32"
        )
    metrics = {"accuracy": top_k_accuracy(logits, labels, k=1)}
    if logits.shape[-1] > 5:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, k=5)
    metrics["nll"] = negative_log_likelihood(logits, labels)
    metrics["ece"] = expected_calibration_error(logits, labels)
    return metrics
