"""DropKey in PyTorch's fused CPU attention, with a mask that is drawn again in the backward pass, not saved.

Saving the masks of all layers would need as much memory as the attention weights that fused attention spares. Only the
seed is saved; for the pattern "score" also the state of each row's hash (`RowState`), which is expensive to recompute.

The mask of a batch is drawn and used chunk by chunk, because fresh memory for all of it costs more time than drawing.
Compiled code takes the batch as one chunk, and leaves the fusion to the compiler.

This file travels with checkpoints: it imports torch and its neighbours only.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from .attention_mask import Settings, additive, additive_mask, real_keys
from .counter_hash import RatioTensor, RowState, bias_scratch, drop_bias_of_rows, row_keys, row_state, under_transform
from .operators import seed_in_backward, unit_columns
from .patterns import protect_bias_rows


# of a batch: which images, all heads, which queries
Chunk = tuple[slice, slice, slice]
WHOLE = (slice(None), slice(None), slice(None))
# bytes of the float32 scores of a chunk
CHUNK_BYTES = 2**25


def chunks_of(query: torch.Tensor, key: torch.Tensor) -> list[Chunk]:
    """A batch cut so that the float32 scores of a chunk take at most `CHUNK_BYTES`, or belong to one query of few images.

    PyTorch's backward pass on a CPU gives each thread whole heads, so a chunk holds a head for every thread; where that
    is too much, its queries are cut.
    """
    images, heads, queries = query.shape[:3]
    row_bytes = 4 * heads * key.shape[2]
    needed = -(-torch.get_num_threads() // heads)
    together = min(images, max(needed, CHUNK_BYTES // (row_bytes * queries)))
    cuts = -(-queries // max(1, CHUNK_BYTES // (row_bytes * together)))
    rows = -(-queries // cuts)
    return [
        (slice(image, image + together), slice(None), slice(row, row + rows))
        for image in range(0, images, together)
        for row in range(0, queries, rows)
    ]


def _state_of_rows(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> RowState | None:
    """What `additive_mask_chunks` draws masks from chunk by chunk, a few words for each row; None where it cannot."""
    ratio, pattern, _, _ = settings
    if isinstance(ratio, RatioTensor) or torch.compiler.is_compiling():
        return None
    if pattern != "score":
        return None
    return row_state(*row_keys(seed, *query.shape[:3]), key.shape[2], ratio)


def additive_mask_chunks(
    seed: torch.Tensor,
    state: RowState | None,
    chunks: list[Chunk],
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """`additive_mask`, drawn from `state` chunk by chunk; each chunk is written over the one before it."""
    ratio = settings.ratio
    if state is None or isinstance(ratio, RatioTensor):
        yield chunks[0], additive_mask(seed, query, key, attention_mask, settings)
        return
    keys = key.shape[2]
    scratch = bias_scratch(math.prod(state.k1[chunks[0]].shape), keys, query.dtype)
    for chunk in chunks:
        bias = drop_bias_of_rows(RowState(*(tensor[chunk] for tensor in state)), keys, ratio, query.dtype, scratch)
        if attention_mask is None:
            yield chunk, protect_bias_rows(bias, settings.pattern, ratio)
        else:
            yield chunk, masked_bias(bias, part_of_mask(attention_mask, chunk))


def part_of_mask(attention_mask: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The part of a mask, of any form that `real_keys` takes, that belongs to a chunk, in four dimensions."""
    if attention_mask.ndim == 2:
        floats = attention_mask.is_floating_point()
        attention_mask = attention_mask[None, None] if floats else attention_mask[:, None, None]
    # a dimension of 1 serves the whole batch
    return attention_mask[
        tuple(slice(None) if size == 1 else part for size, part in zip(attention_mask.shape[:3], chunk, strict=True))
    ]


def masked_bias(bias: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`additive_mask` of an attention mask and a drop bias `[B, H, N, M]`, into which it is written.

    Args:
        bias: -inf where dropped, else 0; before the rule that a row keeps a key.
        attention_mask: Bool, integers or additive float, broadcastable to the bias.
    """
    real = real_keys(attention_mask)
    hidden = additive(attention_mask).to(bias.dtype) if attention_mask.is_floating_point() else None
    zero, infinity = bias.new_zeros(()), bias.new_full((), float("-inf"))
    # where hidden keys are -inf a row without a key to keep has no other number
    lost = bias.add_(torch.where(real, zero, infinity)).amax(-1, keepdim=True) == -torch.inf
    if lost.any():
        bias.copy_(torch.where(lost, torch.where(real, zero, infinity), bias))
    return bias if hidden is None else bias.add_(hidden)


def _joined(pieces: list[tuple[Chunk, torch.Tensor]], whole: torch.Tensor) -> torch.Tensor:
    """The pieces of a batch in one tensor: the only one, or all of them written into `whole`."""
    if len(pieces) == 1:
        return pieces[0][1]
    for chunk, piece in pieces:
        whole[chunk] = piece
    return whole


class RedrawnMaskAttention(torch.autograd.Function):
    """PyTorch's fused CPU attention with a mask that is drawn in the forward and again in the backward pass."""

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
        state = _state_of_rows(seed, query, key, attention_mask, settings)
        # kept for the backward pass, until which the number of threads may change
        chunks = [WHOLE] if state is None else chunks_of(query, key)
        outputs, log_sums = [], []
        for chunk, mask in additive_mask_chunks(seed, state, chunks, query, key, attention_mask, settings):
            output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[chunk], key[chunk[0]], value[chunk[0]], 0.0, False, attn_mask=mask, scale=scaling
            )
            outputs.append((chunk, output))
            log_sums.append((chunk, log_sum))
        joined = _joined(outputs, torch.empty_like(query))
        log_sum = _joined(log_sums, log_sum.new_empty(query.shape[:3]))
        ctx.save_for_backward(query, key, value, seed, attention_mask, joined, log_sum, *(state or (None, None, None)))
        ctx.settings, ctx.scaling, ctx.chunks = settings, scaling, chunks
        return joined

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value."""
        query, key, value, seed, attention_mask, output, log_sum, k1, k2, thresholds = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # a compiler that sees both drawings to be the same makes one of them, and saves the mask between the passes
            seed = seed_in_backward(seed, upstream[0])
        state = None if k1 is None else RowState(k1, k2, thresholds)
        masks = additive_mask_chunks(seed, state, ctx.chunks, query, key, attention_mask, ctx.settings)
        query_pieces: list[tuple[Chunk, torch.Tensor]] = []
        sums: list[torch.Tensor] = []
        for chunk, mask in masks:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream[0][chunk],
                query[chunk],
                key[chunk[0]],
                value[chunk[0]],
                output[chunk],
                log_sum[chunk],
                0.0,
                False,
                attn_mask=mask,
                scale=ctx.scaling,
            )
            query_pieces.append((chunk, found[0]))
            if len(ctx.chunks) == 1:
                sums = list(found[1:])
                break
            # keys and values get a share from each chunk of the queries
            wide = torch.promote_types(key.dtype, torch.float32)
            sums = sums or [torch.zeros_like(tensor, dtype=wide) for tensor in (key, value)]
            for total, share in zip(sums, found[1:], strict=True):
                total[chunk[0]] += share
        joined = _joined(query_pieces, torch.empty_like(query))
        return joined, *(total.to(key.dtype) for total in sums), None, None, None, None


def can_redraw(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> bool:
    """Whether `redrawn_mask_attention` computes this case.

    That is: a CPU, one width and dtype, no dropout, no gradient for the mask, no transform of `torch.func`.
    """
    plain_mask = attention_mask is None or not attention_mask.requires_grad
    alike = query.shape[-1] == value.shape[-1] and query.dtype == key.dtype == value.dtype
    return query.device.type == "cpu" and alike and dropout == 0 and plain_mask and not under_transform()


def redrawn_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
    scaling: float,
) -> torch.Tensor:
    """Attention with DropKey, `[B, H, N, D]`, where `can_redraw`; a query that may see no key gets 0."""
    # the operator below PyTorch's own checks reads the last dimension as if it were dense
    query, key, value = (unit_columns(tensor) for tensor in (query, key, value))
    return RedrawnMaskAttention.apply(query, key, value, seed, attention_mask, settings, scaling)
