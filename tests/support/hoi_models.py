"""Small models of human-object interaction detection, and inputs for them.

Imports torch, Transformers and the package.
"""

from typing import Any

import torch
from transformers import ConvNextConfig

from hf_dropkey.models.configuration_dropkey_hoi import DropKeyHoiConfig
from hf_dropkey.models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection


TINY: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
    "id2label": {0: "person", 1: "ball", 2: "chair"},
    "verbs": ["hold", "kick"],
}


def tiny_config(**settings: Any) -> DropKeyHoiConfig:
    """A small model on a small ConvNeXt."""
    output: dict[str, Any] = {"out_features": ["stage2"]}
    backbone = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=1.0, **output)
    return DropKeyHoiConfig(**{"backbone_config": backbone, **TINY, **settings})


def tiny_model(**settings: Any) -> DropKeyHoiForObjectDetection:
    torch.manual_seed(0)
    return DropKeyHoiForObjectDetection(tiny_config(**settings))


def tiny_inputs() -> dict[str, Any]:
    """Two images, one padded; two pairs and none."""
    torch.manual_seed(1)
    mask = torch.ones(2, 32, 40, dtype=torch.long)
    mask[1, :, 24:] = 0
    return {"pixel_values": torch.randn(2, 3, 32, 40), "pixel_mask": mask, "labels": tiny_labels()}


def tiny_labels() -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.6], [0.6, 0.6, 0.2, 0.2]])
    full = {
        "class_labels": torch.tensor([1, 2]),
        "verb_labels": torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
        "person_boxes": boxes[[0, 0]],
        "object_boxes": boxes[[1, 0]],
    }
    return [full, {name: value[:0] for name, value in full.items()}]
