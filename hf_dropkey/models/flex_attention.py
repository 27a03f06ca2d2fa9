"""DropKey inside FlexAttention: the counter-based mask is computed in `score_mod`, so no mask is stored.

The ratio and the seed reach the kernel as tensors, so neither a new step nor another layer compiles it again. A
dropped score is lowered by 1024 in float32: its weight is exactly 0 while the scores of a row lie within 900 of each
other, and a row that lost all its real keys gets its plain weights back, because the softmax ignores a constant.

This file travels with checkpoints: it imports torch, transformers and its neighbours only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from .attention_mask import additive, keep_tokens, settings_of
from .counter_hash import GOLDEN, MIX_1, MIX_2, Ratio, row_keys, threshold_tensor
from .dropkey import DropKeySite
from .patterns import shape_bound_of, shape_centres
from .sample_masks import seed_for


PENALTY = -1024.0
WORD = 0xFFFFFFFF


def _mix(x: torch.Tensor, key: torch.Tensor | int = 0) -> torch.Tensor:
    """lowbias32 in int64 arithmetic masked to 32 bits: compiled FlexAttention gets wrapping int32 wrong on CPU."""
    x = ((x ^ (x >> 16)) * MIX_1) & WORD
    x = ((x ^ (x >> 15) ^ key) * MIX_2) & WORD
    return x ^ (x >> 16)


def _signed(x: torch.Tensor) -> torch.Tensor:
    """The signed reading of 32-bit words."""
    return x - ((x >> 31) << 32)


def _byte_decision(k1: torch.Tensor, k2: torch.Tensor, thresholds: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether a key of the row (k1, k2) is dropped; `thresholds` are the three numbers of `byte_thresholds`."""
    key = key.to(torch.int64)
    block = key >> 6
    word = _mix(k1 ^ ((((block >> 2 << 6) + (key & 63)) * GOLDEN) & WORD), k2)
    dither = _mix(((k1 * 3) & WORD) ^ k2 ^ ((block * GOLDEN) & WORD))
    threshold = torch.where(_signed(dither) < thresholds[2], thresholds[1], thresholds[0])
    return _signed((word << (24 - 8 * (block & 3))) & WORD) < threshold


def score_mod_of(
    seed: torch.Tensor,
    shape: tuple[int, int, int, int],
    ratio: Ratio,
    pattern: str,
    window: int,
    grid: tuple[int, int] | None,
    bias: torch.Tensor | None,
) -> Callable:
    """The `score_mod` of FlexAttention that lowers dropped scores; arguments as `dropped_scores`.

    `bias` is added to the scores: additive float, broadcastable to `[B, H, N, M]`.
    """
    images, heads, queries, keys = shape
    pair = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    # head pairs of one row each are stretched by the index, never in memory
    k1, k2 = (part[..., 0].long() & WORD for part in pair)
    last_row = k1.shape[2] - 1
    if pattern in ("score", "key"):
        thresholds = threshold_tensor(ratio, seed.device).long()

        def dropped(one: torch.Tensor, two: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return _byte_decision(one, two, thresholds, key)
    else:
        offsets, (above, left, _, width), (rows, columns) = shape_centres(pattern, window, keys, grid)
        bound = shape_bound_of(ratio, pattern, window, seed.device)
        limit = torch.as_tensor(bound, dtype=torch.int64, device=seed.device)
        first = keys - rows * columns

        def dropped(one: torch.Tensor, two: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            patch = key.to(torch.int64) - first
            row, column = patch // columns, patch % columns
            found = patch < 0
            for dy, dx in offsets:
                centre = (row + (above - dy)) * width + column + (left - dx)
                found = found | (_signed(_mix(one ^ ((centre * GOLDEN) & WORD), two)) < limit)
            return found & (patch >= 0)

    bias = None if bias is None else bias.expand(shape)

    def score_mod(score: torch.Tensor, image: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        row = query * 0 if last_row == 0 else query
        if bias is not None:
            score = score + bias[image, head, query, key]
        return score + PENALTY * dropped(k1[image, head, row], k2[image, head, row], key)

    return score_mod


def _mask_mod_of(bias: torch.Tensor) -> Callable:
    """The `score_mod` that adds `bias` `[B, 1, 1, M]`."""

    def score_mod(score: torch.Tensor, image: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return score + bias[image, 0, 0, key]

    return score_mod


def flex_dropkey_forward(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, None]:
    """DropKey through FlexAttention. See `dropkey_attention_forward`; `attention_mask` may also be a `BlockMask`.

    Raises:
        ValueError: Gradients on a CPU, or dropout on the weights.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError(
            "attn_implementation='flex_attention' cannot train on a CPU: PyTorch's FlexAttention has no backward "
            "there. Train with model.set_attn_implementation('sdpa'), which drops the same scores, or on a GPU."
        )
    if dropout > 0:
        raise ValueError(
            f"attn_implementation='flex_attention' has no dropout on attention weights (requested {dropout}). "
            "Set attention_probs_dropout_prob=0, or train with 'sdpa' or 'eager'."
        )
    is_tensor = isinstance(attention_mask, torch.Tensor)
    block_mask = None if is_tensor else attention_mask
    blind = None
    seed = seed_for(module, query.shape[0], query.device)
    if module.dropkey_pattern == "token":
        if block_mask is not None:
            # padding is the same for all queries: what the first one sees tells it
            attention_mask = create_mask(
                block_mask.mask_mod, query.shape[0], 1, 1, key.shape[2], device=query.device.type
            )
        left = keep_tokens(seed, key, value, attention_mask, module.dropkey_ratio)
        key, value, blind, block_mask = left.key, left.value, left.blind, None
        score_mod = None if left.attention_mask is None else _mask_mod_of(additive(left.attention_mask))
    else:
        settings = settings_of(module, grid)
        score_mod = score_mod_of(
            seed,
            (*query.shape[:3], key.shape[2]),
            *settings,
            additive(attention_mask) if is_tensor else None,
        )
    output: Any
    if on_cpu:
        # compiled for a second length, the CPU kernel of torch 2.13 does not build (its C++ names an unknown variable)
        output = flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scaling)
    else:
        output = compile_friendly_flex_attention(
            query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scaling, training=module.training
        )
    output = output.transpose(1, 2)
    return (output if blind is None else output.masked_fill(blind, 0.0)).contiguous(), None
