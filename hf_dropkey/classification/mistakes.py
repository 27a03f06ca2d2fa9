"""The predictions of a run's last evaluation, for `report.html`: one line for each image, pictures of the worst mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction

from ..images.checks import read_images
from ..pages.observed import Mistake, Predictions, save_mistakes
from .data import ImageData
from .metrics import log_softmax


SHOWN = 12


class KeptPredictions:
    """A `compute_metrics` that keeps labels, predictions and confidences of the last evaluation, not the logits."""

    def __init__(self, metrics: Callable[[EvalPrediction], dict[str, float]]) -> None:
        """`metrics` computes the numbers."""
        self.metrics = metrics
        self.kept: tuple[Any, Any, Any] | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics."""
        found = self.metrics(prediction)
        logits = prediction.predictions
        probabilities = np.exp(log_softmax(np.asarray(logits[0] if isinstance(logits, tuple) else logits)))
        labels = np.asarray(prediction.label_ids, dtype=np.int64)
        self.kept = labels, probabilities.argmax(axis=-1), probabilities.max(axis=-1)
        return found


def save_predictions(folder: Path, kept: KeptPredictions, data: ImageData) -> list[Mistake]:
    """Writes `predictions.csv` and the pictures of the worst mistakes; nothing without an evaluation."""
    if kept.kept is None:
        return []
    rows = data.evaluation.with_format(None)
    found = Predictions([f"row {row}" for row in rows["row"]], data.label_names, *kept.kept)
    found.save(folder)
    worst = found.worst(SHOWN)
    return save_mistakes(folder, found, {place: read_images(rows[place : place + 1])["image"][0] for place in worst})
