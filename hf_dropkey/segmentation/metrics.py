"""Mean IoU and pixel accuracy, counted on masks in the size of their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction


def pixel_counts(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], classes: int, ignore_index: int
) -> NDArray[np.int64]:
    """How many pixels of each class are right, predicted, and annotated, `[3, classes]`; ignored ones are left out.

    Args:
        predicted: Class numbers `[height, width]`.
        truth: The same, with `ignore_index` where there is no class.
        classes: Number of classes.
        ignore_index: Value of ignored pixels.
    """
    counted = truth != ignore_index
    predicted, truth = predicted[counted], truth[counted]
    return np.stack(
        [np.bincount(values, minlength=classes) for values in (truth[predicted == truth], predicted, truth)]
    )


@dataclass(frozen=True)
class SegmentationScores:
    """The scores of counts over all images.

    Attributes:
        iou: Intersection over union of each class, `[C]`; NaN for one that is neither annotated nor predicted.
        mean_iou: Their mean without NaN.
        pixel_accuracy: Fraction of right pixels.
    """

    iou: NDArray[np.float64]
    mean_iou: float
    pixel_accuracy: float

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> "SegmentationScores":
        """Scores of counts `[3, C]` (`pixel_counts`), summed over images."""
        right, predicted, truth = counts.astype(np.float64)
        with np.errstate(invalid="ignore"):
            iou = right / (predicted + truth - right)
        total = truth.sum()
        known = iou[~np.isnan(iou)]
        return cls(
            iou,
            float(known.mean()) if len(known) else float("nan"),
            float(right.sum() / total) if total else float("nan"),
        )

    def table(self, names: Sequence[str]) -> str:
        """A line for each class."""
        width = max(map(len, names))
        shown = ["neither annotated nor predicted" if np.isnan(one) else f"{one:.4f}" for one in self.iou]
        return "\n".join(f"{name:<{width}}  {one}" for name, one in zip(names, shown, strict=True))


class SegmentationMetrics:
    """`compute_metrics` for `SegmentationTrainer`.

    Attributes:
        scores: Those of the last evaluation.
    """

    scores: SegmentationScores | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of counts `[N, 3, C]`."""
        counts: Any = prediction.predictions
        self.scores = SegmentationScores.of(counts.sum(axis=0))
        return {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
