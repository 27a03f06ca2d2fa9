"""Attention modules and their inputs as the backends see them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def site(ratio: float = 0.3, pattern: str = "score", window: int = 2) -> Any:
    """An attention module as the backends see it."""
    module: Any = nn.Module()
    module.dropkey_ratio, module.dropkey_pattern, module.dropkey_window = ratio, pattern, window
    return module.train()


def tensors(*sizes: int, dtype: torch.dtype = torch.float64, keys: int | None = None) -> list[torch.Tensor]:
    """query, key, value of [B, H, N, D], as views of [B, N, H, D] like a model's."""
    torch.manual_seed(0)
    images, heads, queries, width = sizes
    lengths = (queries, keys or queries, keys or queries)
    return [
        torch.randn(images, n, heads, width, dtype=dtype).transpose(1, 2).detach().requires_grad_() for n in lengths
    ]


def saved_sizes(call: Callable[[], torch.Tensor]) -> list[int]:
    """Bytes of each tensor that is saved for the backward pass of a call, which then runs."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    output.sum().backward()
    return sizes
