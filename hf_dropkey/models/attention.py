"""DropKey on each attention backend, in Transformers' calling convention.

A backend is a function (module, query, key, value, attention_mask, ...) of `[B, H, N, D]` tensors that returns the
output `[B, N, H, D]` and, on `eager`, the weights `[B, H, N, M]`. All settings are plain attributes of the attention
module (`dropkey_ratio`, `dropkey_pattern`, `dropkey_window`), so the functions are stateless: a package copy and a
checkpoint's copy of this file can share a process.

This file travels with checkpoints: it imports torch, transformers and its neighbours only.
"""

from collections.abc import Callable

import torch
from torch import nn

from .dropkey import draw_seed, dropped_scores, kept_tokens, protect_rows, real_keys, token_order


def dropkey_is_active(module: nn.Module) -> bool:
    """Whether this attention module drops keys now: in training, with a ratio above 0."""
    return module.training and module.dropkey_ratio > 0


def dropped_by_module(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """Draws a seed and returns the scores that `module` drops, True = dropped, the row rule applied.

    Returns:
        bool, broadcastable to `[B, H, N, M]`.
    """
    real = real_keys(attention_mask)
    dropped = dropped_scores(
        draw_seed(query.device),
        (*query.shape[:3], key.shape[2]),
        module.dropkey_ratio,
        pattern=module.dropkey_pattern,
        window=module.dropkey_window,
        grid=grid,
        real=real,
    )
    return protect_rows(dropped, real)


def eager_dropkey_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DropKey with explicit attention weights; softmax in float32 at least. See `dropkey_attention_forward`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.is_floating_point():
        scores = scores + attention_mask
    elif attention_mask is not None:
        scores = scores.masked_fill(~real_keys(attention_mask), torch.finfo(scores.dtype).min)
    dropped = dropped_by_module(module, query, key, attention_mask, grid)
    scores = scores.masked_fill(dropped, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _sdpa_tokens(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The keys and values that the pattern "token" keeps, physically, and what is left of the mask."""
    images, _, keys, _ = key.shape
    real = real_keys(attention_mask)
    order, kept = token_order(draw_seed(key.device), images, keys, module.dropkey_ratio, real)
    count = kept_tokens(keys, module.dropkey_ratio)
    order, kept = order[:, None, :count], kept[:, None, None, :count]
    if attention_mask is None:
        mask = None
    elif attention_mask.is_floating_point():
        mask = attention_mask.expand(images, -1, -1, -1).take_along_dim(order[:, :, None], -1)
        mask = mask.masked_fill(~kept, float("-inf"))
    else:
        mask = kept
    return key.take_along_dim(order[..., None], 2), value.take_along_dim(order[..., None], 2), mask


def sdpa_dropkey_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, None]:
    """DropKey through `scaled_dot_product_attention`. See `dropkey_attention_forward`."""
    if module.dropkey_pattern == "token":
        key, value, mask = _sdpa_tokens(module, key, value, attention_mask)
    else:
        dropped = dropped_by_module(module, query, key, attention_mask, grid)
        if attention_mask is not None and attention_mask.is_floating_point():
            mask = attention_mask.masked_fill(dropped, float("-inf"))
        else:
            mask = ~dropped if attention_mask is None else real_keys(attention_mask) & ~dropped
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


DROPKEY_BACKENDS: dict[str, Callable] = {"eager": eager_dropkey_forward, "sdpa": sdpa_dropkey_forward}


def dropkey_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    implementation: str | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with DropKey on the backend `implementation`; call it only while `dropkey_is_active(module)`.

    Args:
        module: The attention module, with `dropkey_ratio`, `dropkey_pattern` and `dropkey_window`.
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        attention_mask: None, bool or additive float `[B|1, H|1, N|1, M]`, or padding `[B, M]`.
        implementation: Transformers' `attn_implementation`.
        scaling: Factor on the scores.
        dropout: Ratio of dropout on the attention weights, for comparison.
        grid: Patch rows and columns, for the patterns "block" and "cross".

    Returns:
        The output `[B, N, H, Dv]`, and the weights after the drop `[B, H, N, M]` on `eager`, else None.

    Raises:
        ValueError: The backend cannot leave single scores out.
    """
    backend = DROPKEY_BACKENDS.get(implementation or "eager")
    if backend is None:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot leave out single attention scores, so it cannot train with "
            f"DropKey (here at ratio {module.dropkey_ratio}). Train with one of "
            f"{', '.join(map(repr, DROPKEY_BACKENDS))}, for example model.set_attn_implementation('sdpa'), or set the "
            "ratio to 0. Inference works on every backend."
        )
    return backend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, grid=grid)
