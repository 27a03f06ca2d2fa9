"""Uncertainty of Monte-Carlo predictions for the library `evaluate`."""

from typing import Any

# evaluate reads these lines: one package on each
import datasets
import evaluate
import numpy as np

from .scores import error_auroc, uncertainties


_DESCRIPTION = (
    """How uncertain a classifier is over several passes with random masks, and how well that tells its mistakes."""
)

_KWARGS_DESCRIPTION = """
Args:
    probabilities: for each image a list of passes, each a list of class probabilities; two passes at least.
    references: the class number of each image.
Returns:
    entropy: mean entropy of the mean prediction, in nats.
    mutual_information: mean of that entropy minus the mean entropy of a pass, in nats: what the passes disagree about.
    standard_deviation: mean standard deviation of the predicted class's probability over the passes.
    entropy_auroc, mutual_information_auroc: the probability that a wrong prediction has more of it than a right one; 0.5 is
        chance, NaN if there are no wrong ones, or only wrong ones.
    passes: how many.
Example:
    >>> uncertainty = evaluate.load("path/to/monte_carlo_uncertainty")
    >>> uncertainty.compute(probabilities=[[[0.9, 0.1], [0.7, 0.3]], [[0.4, 0.6], [0.5, 0.5]]], references=[0, 0])["passes"]
    2
"""

_CITATION = """
@inproceedings{gal2016dropout,
  title = {Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning},
  author = {Gal, Yarin and Ghahramani, Zoubin},
  booktitle = {International Conference on Machine Learning},
  year = {2016}
}
"""

SINGLE = datasets.Sequence(datasets.Value("float64"))
FEATURES = [
    datasets.Features({"probabilities": kind, "references": datasets.Value("int64")})
    for kind in (SINGLE, datasets.Sequence(SINGLE))
]


class MonteCarloUncertainty(evaluate.Metric):
    """Entropy, mutual information, standard deviation, and how well they tell mistakes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=FEATURES,
            reference_urls=["https://arxiv.org/abs/1506.02142"],
        )

    def _compute(self, *, probabilities: Any, references: Any) -> dict[str, float]:
        passes, labels = checked(probabilities, references)
        if passes.shape[1] < 2:
            raise ValueError(
                "one pass has no spread; give the probabilities of several passes, [images, passes, classes]"
            )
        found = uncertainties(passes)
        wrong = passes.mean(axis=1).argmax(axis=-1) != labels
        measured = {name: float(values.mean()) for name, values in found.items()}
        for name in ("entropy", "mutual_information"):
            measured[f"{name}_auroc"] = error_auroc(found[name], wrong)
        return {**measured, "passes": passes.shape[1]}


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
