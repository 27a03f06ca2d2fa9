"""DropKey in PyTorch's fused CPU attention, with a mask that is drawn again in the backward pass, not saved.

Saving the masks of all layers would need as much memory as the attention weights that fused attention spares. Only the
seed is saved; for the pattern "score" also the state of each row's hash (`RowState`), which is expensive to recompute.

Fresh memory for a mask costs more time than drawing it. So large batches are drawn and used chunk by chunk, and all layers
draw into the same memory: that of the last mask of the thread, as long as a layer between its two passes holds it.
Compiled code takes the batch as one chunk, and leaves the fusion to the compiler.

This file travels with checkpoints: it imports torch and its neighbours only.
"""

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .attention_mask import Settings, additive, additive_mask, real_keys
from .counter_hash import RatioTensor, RowState, bias_integers, drop_bias_of_rows, row_keys, row_state, under_transform
from .operators import seed_in_backward, unit_columns
from .patterns import protect_bias_rows


# of a batch: which images, which heads, which queries
Chunk = tuple[slice, slice, slice]
WHOLE = (slice(None), slice(None), slice(None))
# bytes of the float32 scores of a chunk
CHUNK_BYTES = 2**24


def chunks_of(query: torch.Tensor, key: torch.Tensor) -> list[Chunk]:
    """A batch cut so that the float32 scores of a chunk take at most `CHUNK_BYTES`, or belong to one query of few heads.

    PyTorch's backward pass on a CPU gives each thread whole heads, so a chunk holds a head for every thread; where that
    is too much, its queries are cut, too. A batch of up to two such chunks stays whole: short rows spend more on joining
    the parts than on fresh memory.
    """
    images, heads, queries = query.shape[:3]
    row_bytes = 4 * key.shape[2]
    if row_bytes * queries * heads * images <= 2 * CHUNK_BYTES:
        return [(slice(0, images), slice(0, heads), slice(0, queries))]
    threads, fit = torch.get_num_threads(), CHUNK_BYTES // (row_bytes * queries)
    # whole images, or heads of one
    of_images = min(images, max(-(-threads // heads), fit // heads))
    of_heads = heads if of_images > 1 or fit >= heads else min(heads, max(threads, fit // threads * threads))
    cuts = -(-queries // max(1, CHUNK_BYTES // (row_bytes * of_heads * of_images)))
    rows = -(-queries // cuts)
    return [
        (slice(image, image + of_images), slice(head, head + of_heads), slice(row, row + rows))
        for image in range(0, images, of_images)
        for head in range(0, heads, of_heads)
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


class _LastMask(threading.local):
    """The bytes that this thread drew its last mask into, uint8 `[n]`, or None if nothing holds them any more."""

    memory: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)


_LAST_MASK = _LastMask()


def mask_memory(chunks: list[Chunk], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Bytes for the mask of the largest chunk, uint8 `[n]`; the same ones again for the next call in the thread.

    They are free as soon as nobody holds them: the caller while it uses them, a layer between its two passes.
    """
    size = math.prod(query[chunks[0]].shape[:3]) * key.shape[2] * bias_integers(query.dtype).itemsize
    memory = _LAST_MASK.memory()
    if memory is None or len(memory) < size:
        # not of inference mode, since code outside of it writes into them, too; and not on a default device
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        _LAST_MASK.memory = weakref.ref(memory)
    return memory


def additive_mask_chunks(
    seed: torch.Tensor,
    state: RowState | None,
    chunks: list[Chunk],
    memory: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """`additive_mask`, drawn from `state` chunk by chunk into `memory`, each over the one before it."""
    ratio = settings.ratio
    if state is None or isinstance(ratio, RatioTensor):
        yield chunks[0], additive_mask(seed, query, key, attention_mask, settings)
        return
    for chunk in chunks:
        part = RowState(*(tensor[chunk] for tensor in state))
        bias = drop_bias_of_rows(part, key.shape[2], ratio, query.dtype, memory)
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


class _Gradients:
    """The gradients of a batch, from those of its chunks."""

    def __init__(self, chunks: list[Chunk], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        self.dtype = key.dtype
        # keys and values get a share from each chunk of the queries
        self.shared = chunks[0][2].stop is not None and chunks[0][2].stop < query.shape[2]
        self.query = torch.empty_like(query)
        wide = torch.promote_types(key.dtype, torch.float32)
        self.key, self.value = (
            torch.zeros_like(tensor, dtype=wide) if self.shared else torch.empty_like(tensor)
            for tensor in (key, value)
        )

    def add(self, chunk: Chunk, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes those of one chunk."""
        self.query[chunk] = query
        for total, share in ((self.key, key), (self.value, value)):
            if self.shared:
                total[chunk[:2]] += share
            else:
                total[chunk[:2]] = share

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of query, key and value."""
        return self.query, self.key.to(self.dtype), self.value.to(self.dtype)


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
        # held until then, so that the layers between draw into it, too
        ctx.memory = memory = None if state is None else mask_memory(chunks, query, key)
        whole: list[torch.Tensor] = []
        for chunk, mask in additive_mask_chunks(seed, state, chunks, memory, query, key, attention_mask, settings):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[chunk], key[chunk[:2]], value[chunk[:2]], 0.0, False, attn_mask=mask, scale=scaling
            )
            if len(chunks) == 1:
                whole = list(found)
                break
            whole = whole or [torch.empty_like(query), found[1].new_empty(query.shape[:3])]
            for tensor, part in zip(whole, found, strict=True):
                tensor[chunk] = part
            # or they would stay while the next ones are made
            del found, part
        output, log_sum = whole
        ctx.save_for_backward(query, key, value, seed, attention_mask, output, log_sum, *(state or (None, None, None)))
        ctx.settings, ctx.scaling, ctx.chunks = settings, scaling, chunks
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value."""
        query, key, value, seed, attention_mask, output, log_sum, k1, k2, thresholds = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # a compiler that sees both drawings to be the same makes one of them, and saves the mask between the passes
            seed = seed_in_backward(seed, upstream[0])
        state = None if k1 is None else RowState(k1, k2, thresholds)
        # that of this thread, which may be another one than that of the forward pass
        memory = None if state is None else mask_memory(ctx.chunks, query, key)
        ctx.memory = None
        masks = additive_mask_chunks(seed, state, ctx.chunks, memory, query, key, attention_mask, ctx.settings)
        gradients: tuple[torch.Tensor, ...] = ()
        whole = _Gradients(ctx.chunks, query, key, value) if len(ctx.chunks) > 1 else None
        for chunk, mask in masks:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream[0][chunk],
                query[chunk],
                key[chunk[:2]],
                value[chunk[:2]],
                output[chunk],
                log_sum[chunk],
                0.0,
                False,
                attn_mask=mask,
                scale=ctx.scaling,
            )
            if whole is None:
                gradients = tuple(found)
                break
            whole.add(chunk, *found)
            del found
        gradients = gradients if whole is None else whole.tensors()
        return *gradients, None, None, None, None


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
