"""Classification metrics from logits: accuracy, top-5 accuracy, negative log-likelihood, expected calibration error.

`classification_metrics` is a `compute_metrics` for `Trainer`. The computation is that of the modules for `evaluate`
(`evaluate_modules/`), with NumPy in float64 and without a download.
"""

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from ..evaluate_modules.calibration.scores import brier_score, expected_calibration_error, negative_log_likelihood
from ..evaluate_modules.top_k_accuracy.scores import top_k_accuracy


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities `[B, C]` of logits `[B, C]`, in float64 whatever comes in."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a `Trainer`: accuracy, top5_accuracy (with more than 5 classes), nll and ece.

    Raises:
        ValueError: There are no images, or a logit is not finite.
    """
    logits, labels = _checked(prediction)
    metrics = {"accuracy": top_k_accuracy(logits, labels, k=1)}
    if logits.shape[-1] > 5:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, k=5)
    # probabilities that underflow still have a logarithm
    logarithms = log_softmax(logits)
    metrics["nll"] = negative_log_likelihood(logarithms, labels)
    metrics["ece"] = expected_calibration_error(np.exp(logarithms), labels)
    return metrics


def evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """As `classification_metrics`, with the Brier score, brier."""
    logits, labels = _checked(prediction)
    return {**classification_metrics(prediction), "brier": brier_score(np.exp(log_softmax(logits)), labels)}


def _checked(prediction: EvalPrediction) -> tuple[NDArray[np.floating], NDArray[np.integer]]:
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
    return logits, labels
