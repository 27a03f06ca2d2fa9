"""Metrics for the library `evaluate`, a folder each: `evaluate.load(metric_path("calibration"))` needs no network.

Each folder is complete in itself, so that it can be uploaded as a Space of the Hub and loaded by name. Its `scores.py`
holds the computation, with NumPy alone, which the commands of this package use too.
"""

from pathlib import Path


FOLDER = Path(__file__).resolve().parent
METRIC_MODULES = ("calibration", "monte_carlo_uncertainty", "top_k_accuracy")


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load` and `evaluate.combine`.

    All of them take the features `probabilities`, a list of numbers for each image, or a list of such lists, one for
    each pass of Monte-Carlo inference; and `references`, the class number of each image.

    Args:
        name: "calibration" (expected calibration error, negative log-likelihood, Brier score), "top_k_accuracy", or
            "monte_carlo_uncertainty" (entropy, mutual information, how well they tell wrong predictions).

    Raises:
        ValueError: There is no such metric.
    """
    if name not in METRIC_MODULES:
        raise ValueError(f"there is no metric {name!r}; choose from {', '.join(METRIC_MODULES)}")
    return str(FOLDER / name)
