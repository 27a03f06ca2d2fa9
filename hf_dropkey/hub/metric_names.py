"""The names of all metrics: in model cards, in tables and on axes, and in sentences."""

from typing import NamedTuple


class MetricName(NamedTuple):
    """How one metric is shown.

    Attributes:
        full: In a model card, for readers who do not know the abbreviation.
        label: In the head of a table or on an axis, with its unit.
        word: In a sentence.
        larger_is_better: None where neither direction is better.
    """

    full: str
    label: str
    word: str
    larger_is_better: bool | None

    @property
    def title(self) -> str:
        """The label as the start of a title."""
        return f"{self.label[0].upper()}{self.label[1:]}"


# by the key that `compute_metrics` and the rows of results have
METRICS = {
    "accuracy": MetricName("accuracy", "accuracy", "accuracy", True),
    "top5_accuracy": MetricName("top-5 accuracy", "top-5 accuracy", "top-5 accuracy", True),
    "nll": MetricName("negative log-likelihood (nats)", "NLL, nats", "NLL", False),
    "ece": MetricName("expected calibration error, 15 bins", "ECE", "ECE", False),
    "brier": MetricName("Brier score, 0 to 2", "Brier score", "Brier score", False),
    "loss": MetricName("loss", "loss", "loss", False),
    "accuracy_gap": MetricName(
        "accuracy, training images minus these", "accuracy, training minus these images", "accuracy gap", None
    ),
}
# mean average precision of pairs, HICO-DET's protocol
METRICS |= {
    f"mAP{setting}{group}": MetricName(f"mAP{words}{what}", f"mAP{words}{what}", f"mAP{words}{what}", True)
    for setting, words in (("", ""), ("_known_object", ", known object"))
    for group, what in (("", ""), ("_rare", ", rare classes"), ("_non_rare", ", other classes"))
}
METRICS |= {
    "mean_iou": MetricName("mean intersection over union", "mean IoU", "mean IoU", True),
    "pixel_accuracy": MetricName("pixel accuracy", "pixel accuracy", "pixel accuracy", True),
}
METRICS["mean_max_recall"] = MetricName("mean of the largest recalls", "mean recall", "mean recall", True)
METRICS |= {
    f"accuracy_at_occlusion_{fraction:g}": MetricName(
        f"accuracy, {100 * fraction:g} % of patches hidden",
        f"accuracy, {100 * fraction:g} % of patches hidden",
        f"accuracy with {100 * fraction:g} % of patches hidden",
        True,
    )
    for fraction in (0.25, 0.5, 0.75)
}
# means over the five strengths of `images/corruptions.py`
METRICS |= {
    f"accuracy_under_{kind}": MetricName(
        f"accuracy, {words}, mean over five strengths", f"accuracy, {words}", f"accuracy, {words}", True
    )
    for kind, words in (
        ("noise", "noisy images"),
        ("blur", "blurred images"),
        ("contrast", "images of less contrast"),
        ("jpeg", "JPEG images"),
    )
}
METRICS |= {
    f"{prefix}{key}": MetricName(f"{full}{of} (mm)", f"{label}{of}, mm", f"{label}{of}", False)
    for prefix, of in (("", ""), ("mean_body_", " of the mean body"))
    for key, full, label in (
        ("mpvpe", "mean error of vertices, MPVPE", "MPVPE"),
        ("mpjpe", "mean error of joints, MPJPE", "MPJPE"),
        ("pa_mpjpe", "mean error of joints after alignment, PA-MPJPE", "PA-MPJPE"),
        ("pa_mpvpe", "mean error of vertices after alignment, PA-MPVPE", "PA-MPVPE"),
    )
}
METRICS["mpvpe_to_mean_body"] = MetricName(
    "MPVPE as a fraction of the mean body's", "MPVPE / mean body's", "MPVPE relative to the mean body's", False
)


def full_name(metric: str) -> str:
    """The name of a metric in a model card: its full name, or its key where the table has none."""
    return METRICS[metric].full if metric in METRICS else metric
