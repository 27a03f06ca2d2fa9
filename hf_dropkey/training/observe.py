"""What a job measures at its end for `report.html`: the fractions of keys that its attentions drop."""

from typing import Any

import torch
from torch import nn

from ..inspection.analysis import LayerDrop, measured_drops
from ..patching.apply import dropkey_modules
from ..patching.sites import transformers_model
from .trainer import GuardedTrainer


IMAGES, PASSES = 8, 4
# above, the attention weights of all layers at once would take gigabytes
MOST_PIXELS = 400 * 400


def observed_drops(trainer: GuardedTrainer) -> tuple[list[LayerDrop], str]:
    """Configured ratios and measured fractions of the trained model, and what was measured on, or why nothing was."""
    # without an adapter's wrapper
    model: nn.Module = transformers_model(trainer.accelerator.unwrap_model(trainer.model))
    if not any(module.dropkey_ratio for _, module in dropkey_modules(model)):
        return [], ""
    layers = [
        LayerDrop(name, float(module.dropkey_ratio), reason="not measured") for name, module in dropkey_modules(model)
    ]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return layers, "Not measured: the weights are spread over several processes."
    dataset: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    count = min(IMAGES, len(dataset))
    batch = trainer.data_collator([dataset[row] for row in range(count)])
    pixels = batch["pixel_values"]
    if pixels.shape[-1] * pixels.shape[-2] > MOST_PIXELS:
        sides = " x ".join(map(str, pixels.shape[-2:]))
        return layers, f"Not measured: the attention weights of images of {sides} pixels would take too much memory."
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels" and torch.is_tensor(value)}
    try:
        return measured_drops(model, inputs, passes=PASSES), f"Measured on {count} images in {PASSES} training passes."
    except (ValueError, torch.OutOfMemoryError) as error:
        return layers, f"Not measured: {error}"
