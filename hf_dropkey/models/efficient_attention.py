"""DropKey in PyTorch's memory-efficient attention on a GPU, with a mask that is drawn again in the backward pass.

The default path, `sdpa`, on CUDA. Between the passes only the seed is kept; each pass draws the whole mask of its layer,
by the kernel of `triton_mask` where there is Triton, and frees it. Rows of the mask lie at a stride that is a multiple of
eight elements, as the attention kernel wants them. On a CPU the same code runs PyTorch's fused CPU attention: there
`cpu_attention`, which cuts the batch, is the better choice, but tests need no GPU.

Tested on a CPU and on the "meta" device; it has not run on a GPU. This file travels with checkpoints: it imports torch
and its neighbours only.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .attention_mask import Settings, additive_mask, blind_rows, real_keys
from .counter_hash import under_transform
from .operators import seed_in_backward, unit_columns
from .triton_mask import can_draw, drawn_mask


# elements: head widths, and the stride of the mask's rows
ALIGNMENT = 8


def aligned_mask(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    """`attention_mask.additive_mask`, its rows at an aligned stride, where the row of a query that sees no key is 0.

    Returns:
        `[B, H, N, M]`, expanded where it does not differ.
    """
    keys = key.shape[2]
    blind = None if attention_mask is None else blind_rows(real_keys(attention_mask))
    if can_draw(query, attention_mask, settings.pattern):
        mask = drawn_mask(seed, query, keys, attention_mask, settings.ratio, settings.pattern)
        if blind is not None:
            mask.masked_fill_(blind, 0.0)
    else:
        mask = additive_mask(seed, query, key, attention_mask, settings)
        mask = mask if blind is None else mask.masked_fill(blind, 0.0)
        mask = nn.functional.pad(mask, (0, -keys % ALIGNMENT))[..., :keys]
    return mask.expand(*query.shape[:3], keys)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, ...]:
    """The output `[B, H, N, Dv]`, and what the backward operator needs beside it."""
    if query.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return tuple(operator(query, key, value, 0.0, False, attn_mask=mask, scale=scaling))
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return tuple(operator(query, key, value, mask, True, 0.0, False, scale=scaling))


def _backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, from the `results` of `_forward`."""
    if query.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = operator(upstream, query, key, value, *results, 0.0, False, attn_mask=mask, scale=scaling)
    else:
        operator = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        found = operator(upstream, query, key, value, mask, *results, 0.0, wanted, False, scale=scaling)
    return found[0], found[1], found[2]


class RedrawnEfficientAttention(torch.autograd.Function):
    """PyTorch's fused attention with a mask that is drawn in the forward and again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seed: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: Settings,
        scaling: float,
    ) -> torch.Tensor:
        """Returns the output `[B, H, N, Dv]`."""
        mask = aligned_mask(seed, query, key, attention_mask, settings)
        results = _forward(query, key, value, mask, scaling)
        ctx.save_for_backward(query, key, value, seed, attention_mask, *results)
        ctx.settings, ctx.scaling = settings, scaling
        return results[0]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value."""
        query, key, value, seed, attention_mask, *results = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # a compiler that sees both drawings to be the same makes one of them, and saves the mask between the passes
            seed = seed_in_backward(seed, upstream[0])
        mask = aligned_mask(seed, query, key, attention_mask, ctx.settings)
        gradients = _backward(unit_columns(upstream[0]), query, key, value, mask, tuple(results), ctx.scaling)
        return *gradients, None, None, None, None


@lru_cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether the memory-efficient kernels of a GPU take bfloat16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _device_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's memory-efficient attention is there for a dtype on a device, and not switched off."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cuda.mem_efficient_sdp_enabled():
        return False
    return dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and _has_bfloat16(device))


# for compilers: its answer is a constant
_device_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def can_redraw_efficiently(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> bool:
    """Whether `redrawn_efficient_attention` computes this case.

    That is: an NVIDIA GPU whose memory-efficient attention takes the dtype, one dtype, head widths that are multiples of
    eight, no dropout, no gradient for the mask, no transform of `torch.func`.
    """
    if not _device_serves(query.device, query.dtype):
        return False
    plain_mask = attention_mask is None or not attention_mask.requires_grad
    aligned = query.shape[-1] % ALIGNMENT == 0 and value.shape[-1] % ALIGNMENT == 0
    alike = query.dtype == key.dtype == value.dtype
    return aligned and alike and dropout == 0 and plain_mask and not under_transform()


def redrawn_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
    scaling: float,
) -> torch.Tensor:
    """Attention with DropKey, `[B, H, N, Dv]`, where `can_redraw_efficiently`; a query that may see no key gets 0."""
    # the operators below PyTorch's own checks read the last dimension as if it were dense
    query, key, value = (unit_columns(tensor) for tensor in (query, key, value))
    output: torch.Tensor = RedrawnEfficientAttention.apply(query, key, value, seed, attention_mask, settings, scaling)
    if attention_mask is None:
        return output
    # the zeros end the gradient of these queries, too
    return output.masked_fill(blind_rows(real_keys(attention_mask)), 0.0)
