"""How a classifier holds up: its logits on many images, the same with patches hidden, and the metrics of both."""

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from ..classification.metrics import classification_metrics
from ..inference import eval_mode


# shares of the patches of an image that are hidden, beside none
OCCLUDED_SHARES = (0.25, 0.5, 0.75)


def predict_logits(model: nn.Module, pixel_values: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
    """Logits `[B, C]` of images `[B, channels, H, W]` in eval mode, without gradients; every module's mode is put back."""
    with eval_mode(model), torch.inference_mode():
        return torch.cat([model(pixel_values=part).logits for part in pixel_values.split(batch_size)])


def occlude(pixel_values: torch.Tensor, share: float, *, patch: int, seed: int = 0) -> torch.Tensor:
    """A copy of images `[B, channels, H, W]` in which a share of the patches is grey.

    Each image loses its own random choice of `round(share * patches)` patches, the same for every model and on every
    call with the same seed. Grey is 0 after normalisation, the mean colour.

    Args:
        pixel_values: Normalised images.
        share: Share of the patches to hide, [0, 1].
        patch: Side of a patch in pixels.
        seed: Chooses the patches.

    Raises:
        ValueError: The share is outside [0, 1], or patches do not fill the images.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of the patches is outside [0, 1]; choose for example 0.5")
    height, width = pixel_values.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patches of {patch} pixels do not fill images of {height} x {width}; choose a divisor of both"
        )
    rows, columns = height // patch, width // patch
    draws = torch.rand(len(pixel_values), rows * columns, generator=torch.Generator().manual_seed(seed))
    hidden = draws.argsort(dim=1) < round(share * rows * columns)
    grid = hidden.view(-1, 1, rows, columns).to(pixel_values.device)
    return pixel_values.masked_fill(grid.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3), 0.0)


def metrics_of(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """`classification_metrics` of logits `[B, C]` and labels `[B]`."""
    return classification_metrics(EvalPrediction(np.asarray(logits.cpu()), np.asarray(labels.cpu())))


def occlusion_accuracy(
    model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor, *, patch: int, seed: int = 0
) -> dict[float, float]:
    """Accuracy with each of `OCCLUDED_SHARES` of the patches hidden, by share."""
    return {
        share: metrics_of(predict_logits(model, occlude(pixel_values, share, patch=patch, seed=seed)), labels)[
            "accuracy"
        ]
        for share in OCCLUDED_SHARES
    }
