"""DropKey on each attention backend, in Transformers' calling convention.

A backend is a function (module, query, key, value, attention_mask, ...) of `[B, H, N, D]` tensors that returns the
output `[B, N, H, D]` and, on `eager`, the weights `[B, H, N, M]`. All settings are plain attributes of the attention
module (`dropkey_ratio`, `dropkey_pattern`, `dropkey_window`), so the functions are stateless: a package copy and a
checkpoint's copy of this file can share a process.

This file travels with checkpoints: it imports torch, transformers and its neighbours only.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .counter_hash import RowDraws, draw_seed, drop_bias_of_rows, row_draws, row_keys
from .dropkey import (
    DropKeySite,
    drop_bias,
    dropped_scores,
    keep_tokens,
    padding_of,
    protect_bias_rows,
    protect_rows,
    real_keys,
    rows_can_empty,
)
from .flex_attention import flex_dropkey_forward
from .triton_attention import triton_dropkey_attention, unit_columns


# what `dropped_scores` is told beside the seed and the shape: ratio, pattern, window, grid
Settings = tuple[float, str, int, tuple[int, int] | None]


def dropkey_is_active(module: DropKeySite) -> bool:
    """Whether this attention module drops keys now: in training, with a ratio above 0.

    An attribute `dropkey_mode` of "always" or "never" overrules training, for Monte-Carlo inference and for
    comparisons.
    """
    mode = getattr(module, "dropkey_mode", "training")
    return module.dropkey_ratio > 0 and (mode == "always" or (mode == "training" and module.training))


def settings_of(module: DropKeySite, grid: tuple[int, int] | None) -> Settings:
    """The DropKey settings of an attention module, as they are now."""
    return module.dropkey_ratio, module.dropkey_pattern, module.dropkey_window, grid


def drop_mask(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    """The scores dropped for `seed`, True = dropped, with the rule that a row keeps a real key.

    Returns:
        bool, broadcastable to `[B, H, N, M]`.
    """
    ratio, pattern, window, grid = settings
    real = real_keys(attention_mask)
    shape = (*query.shape[:3], key.shape[2])
    dropped = dropped_scores(seed, shape, ratio, pattern=pattern, window=window, grid=grid, real=real)
    if real is None and not rows_can_empty(pattern, shape[3], ratio):
        return dropped
    return protect_rows(dropped, real)


def eager_dropkey_forward(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DropKey with explicit attention weights; softmax in float32 at least. See `dropkey_attention_forward`."""
    seed, settings = draw_seed(query.device), settings_of(module, grid)
    if _only_drops(attention_mask, settings) and query.device.type == "cpu":
        # added by the matrix product itself, which spares three passes over the scores and one backward
        bias = _additive_drop(seed, query, key, None, settings).flatten(0, 1)
        products = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scaling)
        scores = products.unflatten(0, query.shape[:2])
    else:
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        if attention_mask is not None and attention_mask.is_floating_point():
            scores = scores + attention_mask
        elif attention_mask is not None:
            scores = scores.masked_fill(~real_keys(attention_mask), torch.finfo(scores.dtype).min)
        scores = scores.masked_fill(drop_mask(seed, query, key, attention_mask, settings), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _only_drops(attention_mask: torch.Tensor | None, settings: Settings) -> bool:
    """Whether the scores need nothing but independent drops."""
    return attention_mask is None and settings[1] in ("score", "key")


def _additive_drop(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    """What to add to the scores so that dropped and padded keys leave the softmax, in the dtype of `query`."""
    ratio, pattern, _, _ = settings
    if _only_drops(attention_mask, settings):
        bias = drop_bias(seed, (*query.shape[:3], key.shape[2]), ratio, pattern)
        return protect_bias_rows(bias, pattern, ratio).to(query.dtype)
    gone = drop_mask(seed, query, key, attention_mask, settings)
    if attention_mask is not None and attention_mask.is_floating_point():
        return attention_mask.to(query.dtype).masked_fill(gone, float("-inf"))
    if attention_mask is not None:
        gone = gone | ~real_keys(attention_mask)
    zero, infinity = (torch.tensor(number, dtype=query.dtype, device=query.device) for number in (0, float("-inf")))
    return torch.where(gone, infinity, zero)


# of a batch: which images, all heads, which queries
Part = tuple[slice, slice, slice]
WHOLE = (slice(None), slice(None), slice(None))
# the masks of all images at once would cost more time for fresh memory than for drawing
PART_BYTES = 2**25


def _parts(query: torch.Tensor, key: torch.Tensor) -> list[Part]:
    """A batch cut so that the float32 scores of a part take at most `PART_BYTES`, or belong to one query of a few images.

    PyTorch's backward pass on a CPU gives each thread whole heads, so a part holds a head for every thread; where that
    is too much, its queries are cut.
    """
    images, heads, queries = query.shape[:3]
    row_bytes = 4 * heads * key.shape[2]
    needed = -(-torch.get_num_threads() // heads)
    together = min(images, max(needed, PART_BYTES // (row_bytes * queries)))
    cuts = -(-queries // max(1, PART_BYTES // (row_bytes * together)))
    rows = -(-queries // cuts)
    return [
        (slice(image, image + together), slice(None), slice(row, row + rows))
        for image in range(0, images, together)
        for row in range(0, queries, rows)
    ]


def _row_draws(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> RowDraws | None:
    """What `_additive_drops` makes masks of part by part, where it can; a few words for each row of scores."""
    ratio, pattern, _, _ = settings
    if torch.compiler.is_compiling() or pattern != "score" or not _only_drops(attention_mask, settings):
        return None
    return row_draws(*row_keys(seed, *query.shape[:3]), key.shape[2], ratio)


def _additive_drops(
    seed: torch.Tensor,
    draws: RowDraws | None,
    parts: list[Part],
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> Iterator[tuple[Part, torch.Tensor]]:
    """`_additive_drop`, from `draws` part by part; each part is written over the one before it."""
    if draws is None:
        yield parts[0], _additive_drop(seed, query, key, attention_mask, settings)
        return
    ratio, pattern, _, _ = settings
    rows = math.prod(draws.k1[parts[0]].shape)
    scratch = torch.empty(rows, key.shape[2], dtype=torch.int32, device=query.device)
    for part in parts:
        drawn = RowDraws(*(tensor[part] for tensor in draws))
        bias = drop_bias_of_rows(drawn, key.shape[2], ratio, scratch)
        yield part, protect_bias_rows(bias, pattern, ratio).to(query.dtype)


def _joined(pieces: list[tuple[Part, torch.Tensor]], whole: torch.Tensor) -> torch.Tensor:
    """The pieces of a batch in one tensor: the only one, or all of them written into `whole`."""
    if len(pieces) == 1:
        return pieces[0][1]
    for part, piece in pieces:
        whole[part] = piece
    return whole


class RedrawnMaskAttention(torch.autograd.Function):
    """PyTorch's fused CPU attention with a mask that is drawn again in the backward pass, not kept.

    Kept, the masks of all layers would cost as much memory as the weights that fused attention saves. What is kept is the
    seed, and of the pattern "score" the few words of each row (`RowDraws`), whose making is a good part of the time.
    """

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
        """Returns the output `[B, H, N, D]`."""
        draws = _row_draws(seed, query, key, attention_mask, settings)
        # the number of threads may change until the backward pass
        parts = [WHOLE] if draws is None else _parts(query, key)
        outputs, log_sums = [], []
        for part, mask in _additive_drops(seed, draws, parts, query, key, attention_mask, settings):
            output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[part], key[part[0]], value[part[0]], 0.0, False, attn_mask=mask, scale=scaling
            )
            outputs.append((part, output))
            log_sums.append((part, log_sum))
        joined = _joined(outputs, torch.empty_like(query))
        log_sum = _joined(log_sums, log_sum.new_empty(query.shape[:3]))
        ctx.save_for_backward(query, key, value, seed, attention_mask, joined, log_sum, *(draws or (None, None, None)))
        ctx.settings, ctx.scaling, ctx.parts = settings, scaling, parts
        return joined

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value."""
        query, key, value, seed, attention_mask, output, log_sum, k1, k2, thresholds = ctx.saved_tensors
        draws = None if k1 is None else RowDraws(k1, k2, thresholds)
        drops = _additive_drops(seed, draws, ctx.parts, query, key, attention_mask, ctx.settings)
        query_pieces: list[tuple[Part, torch.Tensor]] = []
        sums: list[torch.Tensor] = []
        for part, mask in drops:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream[0][part],
                query[part],
                key[part[0]],
                value[part[0]],
                output[part],
                log_sum[part],
                0.0,
                False,
                attn_mask=mask,
                scale=ctx.scaling,
            )
            query_pieces.append((part, found[0]))
            if len(ctx.parts) == 1:
                sums = list(found[1:])
                break
            # keys and values get a share from each part of the queries
            wide = torch.promote_types(key.dtype, torch.float32)
            sums = sums or [torch.zeros_like(tensor, dtype=wide) for tensor in (key, value)]
            for total, share in zip(sums, found[1:], strict=True):
                total[part[0]] += share
        joined = _joined(query_pieces, torch.empty_like(query))
        return joined, *(total.to(key.dtype) for total in sums), None, None, None, None


def _can_redraw(query: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float) -> bool:
    """Whether `RedrawnMaskAttention` computes this case: CPU, one width and dtype, no dropout, no gradient for the mask."""
    plain_mask = attention_mask is None or not attention_mask.requires_grad
    alike = query.shape[-1] == value.shape[-1] and query.dtype == value.dtype
    return query.device.type == "cpu" and alike and dropout == 0 and plain_mask


def sdpa_dropkey_forward(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, None]:
    """DropKey through `scaled_dot_product_attention`. See `dropkey_attention_forward`."""
    seed, settings = draw_seed(query.device), settings_of(module, grid)
    if _can_redraw(query, value, attention_mask, dropout):
        # the operator below PyTorch's own checks reads the last dimension as if it were dense
        query, key, value = (unit_columns(tensor) for tensor in (query, key, value))
        output = RedrawnMaskAttention.apply(query, key, value, seed, attention_mask, settings, scaling)
    else:
        mask = _additive_drop(seed, query, key, attention_mask, settings)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return output.transpose(1, 2).contiguous(), None


def triton_dropkey_forward(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, None]:
    """DropKey in the fused kernel, patterns "score" and "key", padding only. See `dropkey_attention_forward`."""
    if dropout > 0 or (attention_mask is not None and attention_mask.is_floating_point()):
        raise ValueError(
            f"attn_implementation={TRITON_NAME!r} takes neither dropout on attention weights (asked for {dropout}) nor "
            "additive masks. Train with model.set_attn_implementation('sdpa'), which drops the same scores."
        )
    padding = None
    if attention_mask is not None:
        padding = padding_of(real_keys(attention_mask), f"attn_implementation {TRITON_NAME!r}")
        padding = padding.expand(query.shape[0], -1)
    output = triton_dropkey_attention(
        query,
        key,
        value,
        draw_seed(query.device),
        module.dropkey_ratio,
        scaling=scaling,
        pattern=module.dropkey_pattern,
        padding=padding,
    )
    return output.transpose(1, 2).contiguous(), None


def _cleared_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in which no NaN of a key that no query may see can reach outputs or gradients."""
    hidden = ~real_keys(attention_mask).any(2).any(1)[:, None, :, None]
    if query.shape[2] == key.shape[2]:
        # in self-attention it is a query too: nobody looks at its output, but its gradient would reach the real keys
        query = query.masked_fill(hidden & ~query.isfinite(), 0.0)
    return query, key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


TRITON_NAME = "dropkey_triton"
DROPKEY_BACKENDS: dict[str, Callable] = {
    "eager": eager_dropkey_forward,
    "sdpa": sdpa_dropkey_forward,
    "flex_attention": flex_dropkey_forward,
    TRITON_NAME: triton_dropkey_forward,
}
# where nothing is dropped, the name of the fused kernel means sdpa, masks included
AttentionInterface.register(TRITON_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(TRITON_NAME, sdpa_mask)


def default_backend(device_type: str, dtype: torch.dtype) -> str:
    """The fastest backend that is known to be correct for a device, which models take where none is asked for.

    On a CPU without matrix units PyTorch's fused attention is slower than explicit weights in half precision
    (`scripts/benchmark_attention.py`). On a GPU this is `sdpa` until the fused kernel has been measured on one.

    Args:
        device_type: As in `torch.device.type`.
        dtype: Of the model's weights.

    Returns:
        An `attn_implementation`.
    """
    if device_type == "cpu" and dtype.itemsize == 2 and not torch.cpu._is_amx_tile_supported():
        return "eager"
    return "sdpa"


def dropkey_attention_forward(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
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
        attention_mask: None, bool or additive float `[B|1, H|1, N|1, M]`, or padding `[B, M]`; on `flex_attention`
            also a `BlockMask`.
        implementation: Transformers' `attn_implementation`.
        scaling: Factor on the scores.
        dropout: Ratio of dropout on the attention weights, for comparison.
        grid: Patch rows and columns, for the patterns "block" and "cross".

    Returns:
        The output `[B, N, H, Dv]`, and the weights after the drop `[B, H, N, M]` on `eager`, else None.

    Raises:
        ValueError: The backend cannot leave single scores out, or there are no scores.
    """
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(
            f"DropKey needs at least one score, got query {tuple(query.shape)} and key {tuple(key.shape)}. Leave empty "
            "batches out, or set the ratio to 0 for them."
        )
    implementation = implementation or "eager"
    # the fused kernel never reads what padding holds
    if isinstance(attention_mask, torch.Tensor) and implementation != TRITON_NAME:
        query, key, value = _cleared_padding(query, key, value, attention_mask)
    # flex_attention takes padding out of a BlockMask by itself
    if module.dropkey_pattern == "token" and implementation in ALL_ATTENTION_FUNCTIONS.keys() - {"flex_attention"}:
        key, value, attention_mask = keep_tokens(key, value, attention_mask, module.dropkey_ratio)
        if implementation in ("sdpa", TRITON_NAME) and attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None]
        plain = ALL_ATTENTION_FUNCTIONS[implementation]
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=False)
    backend = DROPKEY_BACKENDS.get(implementation)
    if backend is None:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot leave out single attention scores, so it cannot train with "
            f"DropKey (here at ratio {module.dropkey_ratio}, pattern {module.dropkey_pattern!r}). Train with one of "
            f"{', '.join(map(repr, DROPKEY_BACKENDS))}, for example model.set_attn_implementation('sdpa'), with the "
            "pattern 'token', or with the ratio 0. Inference works on every backend."
        )
    return backend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, grid=grid)
