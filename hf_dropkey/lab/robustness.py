"""Robustness of a classifier: logits of many images, also with patches hidden or made worse, and their metrics."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from ..classification.metrics import classification_metrics
from ..images.corruptions import CORRUPTIONS, STRENGTHS
from ..inference import eval_mode


# fractions of the patches of an image that are hidden
OCCLUDED_FRACTIONS = (0.25, 0.5, 0.75)
# metrics on images that are made worse, by kind
UNDER = {kind: f"accuracy_under_{kind}" for kind in CORRUPTIONS}


def predict_logits(model: nn.Module, pixel_values: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
    """Float32 logits `[B, C]` of images `[B, channels, H, W]` in eval mode, without gradients; restores the modes."""
    with eval_mode(model), torch.inference_mode():
        return torch.cat([model(pixel_values=part).logits.float() for part in pixel_values.split(batch_size)])


def occlude(pixel_values: torch.Tensor, fraction: float, *, patch: int, seed: int = 0) -> torch.Tensor:
    """A copy of images `[B, channels, H, W]` in which a fraction of the patches is grey.

    `round(fraction * patches)` random patches are hidden, other ones in each image, the same for every model and every
    call with the same seed. Grey is 0 after normalisation, the mean colour.

    Args:
        pixel_values: Normalised images.
        fraction: Fraction of the patches to hide, [0, 1].
        patch: Side of a patch in pixels.
        seed: Seed of the choice of patches.

    Raises:
        ValueError: The fraction is outside [0, 1], or patches do not fill the images.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} of the patches is outside [0, 1]; choose for example 0.5")
    height, width = pixel_values.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patches of {patch} pixels do not fill images of {height} x {width}; choose a divisor of both"
        )
    rows, columns = height // patch, width // patch
    draws = torch.rand(len(pixel_values), rows * columns, generator=torch.Generator().manual_seed(seed))
    hidden = draws.argsort(dim=1) < round(fraction * rows * columns)
    grid = hidden.view(-1, 1, rows, columns).to(pixel_values.device)
    return pixel_values.masked_fill(grid.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3), 0.0)


def metrics_of(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """`classification_metrics` of logits `[B, C]` and labels `[B]`."""
    return classification_metrics(EvalPrediction(np.asarray(logits.cpu()), np.asarray(labels.cpu())))


def occlusion_accuracy(
    model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor, *, patch: int, seed: int = 0
) -> dict[float, float]:
    """Accuracy with each of `OCCLUDED_FRACTIONS` of the patches hidden, by fraction."""
    return {
        fraction: metrics_of(predict_logits(model, occlude(pixel_values, fraction, patch=patch, seed=seed)), labels)[
            "accuracy"
        ]
        for fraction in OCCLUDED_FRACTIONS
    }


def corruption_accuracy(
    model: nn.Module, corrupted: Callable[[str, int], torch.Tensor], labels: torch.Tensor
) -> dict[str, float]:
    """Accuracy on images that are made worse, by kind: the mean over the five strengths.

    Args:
        model: The classifier.
        corrupted: Gives the images `[B, channels, H, W]` of a kind and a strength of `images/corruptions.py`.
        labels: `[B]`.
    """
    found = {
        kind: [
            metrics_of(predict_logits(model, corrupted(kind, strength)), labels)["accuracy"] for strength in STRENGTHS
        ]
        for kind in CORRUPTIONS
    }
    return {kind: sum(values) / len(values) for kind, values in found.items()}
