"""Mixup and CutMix: batches whose images, and labels with them, are mixtures of two.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Mixing:
    """How much the images of a batch are mixed; the defaults do not mix.

    Attributes:
        mixup_alpha: Both parameters of the Beta distribution of mixup's weights, at least 0; 0: no mixup.
        cutmix_alpha: The same of CutMix's areas.
        probability: Probability that a batch is mixed, [0, 1]. Where both are on, each is chosen half of the time.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"--{name.removesuffix('_alpha')} {getattr(self, name)} is below 0; choose for example 0.2, or 0 for none"
                )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"--mixing_probability {self.probability} is outside [0, 1]; choose a value inside it")

    def __bool__(self) -> bool:
        """Whether anything is mixed."""
        return bool(self.probability and (self.mixup_alpha or self.cutmix_alpha))

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[B, C, H, W]` mixed with those of the reversed batch, and targets `[B, classes]` mixed alike.

        Args:
            pixel_values: The images.
            labels: Targets `[B, classes]` that sum to 1.
            generator: Draws the method and the weight.
        """
        mixed, cut = generator.random() < self.probability, generator.random() < 0.5
        cut = bool(self.cutmix_alpha) and (cut or not self.mixup_alpha)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        if not mixed:
            return pixel_values, labels
        kept = float(generator.beta(alpha, alpha))
        if cut:
            pixel_values, kept = paste_box(pixel_values, kept, generator)
        else:
            pixel_values = kept * pixel_values + (1 - kept) * pixel_values.flip(0)
        return pixel_values, kept * labels + (1 - kept) * labels.flip(0)


def paste_box(images: torch.Tensor, kept: float, generator: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Images `[B, C, H, W]` with a box of the reversed batch pasted in, and the fraction of pixels that stayed.

    The box has the images' aspect ratio and about `1 - kept` of their area; its centre is uniform, and what lies
    outside the image is cut off.
    """
    height, width = images.shape[-2:]
    rows, columns = round(height * (1 - kept) ** 0.5), round(width * (1 - kept) ** 0.5)
    row, column = int(generator.integers(height)), int(generator.integers(width))
    top, bottom = max(row - rows // 2, 0), min(row + (rows + 1) // 2, height)
    left, right = max(column - columns // 2, 0), min(column + (columns + 1) // 2, width)
    pasted = images.clone()
    pasted[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


class MixingCollator:
    """A collator whose batches are mixed; the draws are a function of the seed, the epoch and the rows of the batch.

    Args:
        collate: Makes a batch with `pixel_values` `[B, C, H, W]` and `labels` `[B]` from rows.
        mixing: The settings.
        classes: Number of classes.
        transform: The training transform, which knows the epoch (`epoch`).
        seed: Seed of the draws.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
        mixing: Mixing,
        *,
        classes: int,
        transform: Any,
        seed: int,
    ) -> None:
        """Arguments as in the class docstring."""
        self.collate, self.mixing, self.classes = collate, mixing, classes
        self.transform, self.seed = transform, seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows to a batch; its `labels` are targets `[B, classes]` if the rows say that they are for training."""
        batch = self.collate(rows)
        if "row" not in rows[0]:
            return batch
        targets = nn.functional.one_hot(batch["labels"], self.classes).to(batch["pixel_values"].dtype)
        generator = np.random.default_rng((self.seed, int(self.transform.epoch), *(int(row["row"]) for row in rows)))
        batch["pixel_values"], batch["labels"] = self.mixing(batch["pixel_values"], targets, generator)
        return batch


def mixed_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of logits `[B, C]` and targets `[B, C]`, or labels `[B]`; for `Trainer(compute_loss_func=...)`.

    Args:
        outputs: With `logits`.
        labels: Targets or labels.
        num_items_in_batch: What `Trainer` counts in the labels of all accumulated batches: with targets it is the number
            of their entries, B times C. None for the mean over this batch.
        label_smoothing: Weight of the uniform distribution in the targets, which `Trainer` leaves to this function.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    smoothed = partial(nn.functional.cross_entropy, logits.float(), labels, label_smoothing=label_smoothing)
    if num_items_in_batch is None:
        mean: torch.Tensor = smoothed()
        return mean
    total: torch.Tensor = smoothed(reduction="sum") * (labels.shape[1] if labels.ndim == 2 else 1)
    return total / num_items_in_batch
