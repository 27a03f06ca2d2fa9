"""Tiny models that drop keys, of every kind, and what must be left as it was after looking at one."""

from typing import Any

import torch
from stock_architectures import VIT, quiet, tiny_vit
from torch import nn

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.classification.families import FAMILIES


def native(**settings: Any) -> Any:
    torch.manual_seed(0)
    return DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.5, num_labels=5, **settings))


def patched(pattern: str = "score") -> Any:
    model = tiny_vit()
    quiet(model, 0.5, pattern=pattern)
    return model


def nano(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    about = FAMILIES[family]
    return about.model_class(about.config_class(**about.sizes["nano"], image_size=64, dropkey_ratio=0.5, **settings))


def state(model: nn.Module) -> Any:
    plain = [
        {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "config"}
        for module in model.modules()
    ]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return plain, hooks, model.config._attn_implementation
