"""The additive mask by one Triton kernel, for attention on a GPU that takes a mask: the default path, `sdpa`.

Drawn by PyTorch's operations, a mask takes over a hundred kernels. Here every program draws some rows, with the same
words, thresholds and rules as everywhere, and writes them in the dtype of the queries. Rows lie at a stride that is a
multiple of eight elements, because PyTorch copies a mask whose stride is none.

This file travels with checkpoints: it imports torch, its neighbours and, if there is one, Triton.
"""

from __future__ import annotations

import contextlib

import torch

from .counter_hash import Ratio
from .patterns import rows_can_empty
from .triton_attention import limits_of, seed_argument, triton_is_available
from .triton_kernels import draw_mask_kernel


# rows of scores that a program draws
ROWS = 16
SUPPORTED_PATTERNS = ("score", "key")


def can_draw(query: torch.Tensor, attention_mask: torch.Tensor | None, pattern: str) -> bool:
    """Whether `drawn_mask` serves this case: a GPU with Triton, outside a compiler, and padding if any mask.

    A compiler fuses PyTorch's operations by itself.
    """
    padding = attention_mask is None or (
        not attention_mask.is_floating_point() and (attention_mask.ndim == 2 or attention_mask.shape[1:3] == (1, 1))
    )
    on_gpu = query.is_cuda and triton_is_available(query.device) and not torch.compiler.is_compiling()
    return on_gpu and padding and pattern in SUPPORTED_PATTERNS


def drawn_mask(
    seed: torch.Tensor,
    query: torch.Tensor,
    keys: int,
    attention_mask: torch.Tensor | None,
    ratio: Ratio,
    pattern: str,
) -> torch.Tensor:
    """`attention_mask.additive_mask` of the patterns "score" and "key", in one launch.

    Args:
        seed: int32 `[2]` or `[B, 2]`.
        query: `[B, H, N, D]`; its dtype is that of the result.
        keys: `M`.
        attention_mask: Padding, bool or integers, `[B|1, M]` or `[B|1, 1, 1, M]`, or None.
        ratio: Drop ratio in [0, 1).
        pattern: "score" or "key".

    Returns:
        `[B, H, N, M]`, or `[B, H, 1, M]` for "key": -inf where dropped or hidden, else 0.
    """
    images, heads, queries = query.shape[:3]
    # the pattern "key" takes the decisions of query 0
    rows = 1 if pattern == "key" else queries
    padding = None
    if attention_mask is not None:
        padding = attention_mask.bool().reshape(-1, keys).expand(images, keys).contiguous()
    stride = -(-keys // 8) * 8
    mask = query.new_empty(images, heads, rows, stride)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        draw_mask_kernel[(images * heads * -(-rows // ROWS),)](
            p_mask=mask,
            p_seed=seed_argument(seed),
            p_limits=limits_of(ratio, query.device),
            p_padding=padding,
            stride_row=stride,
            stride_padding=keys,
            heads=heads,
            N=rows,
            M=keys,
            HAS_PADDING=padding is not None,
            PROTECT=padding is not None or rows_can_empty(pattern, keys, ratio),
            TILE=ROWS,
            num_warps=4,
        )
    return mask[..., :keys]
