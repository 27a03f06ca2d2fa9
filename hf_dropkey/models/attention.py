"""DropKey on each attention backend, in Transformers' calling convention; and one function over all of them.

A backend is a function (module, query, key, value, attention_mask, ...) of `[B, H, N, D]` tensors that returns the
output `[B, N, H, D]` and, on `eager`, the weights `[B, H, N, M]`. All settings are plain attributes of the attention
module (`dropkey_ratio`, `dropkey_pattern`, `dropkey_window`), so the functions are stateless: a package copy and a
checkpoint's copy of this file can share a process.

Rules that hold on every backend: the same seed drops the same scores; a row never loses all its real keys; a query that
may see no key gets 0, and gives no gradient.

The pattern "token" has two ways. Leaving the dropped keys out of keys and values ("gathering", `keep_tokens`) costs less
than no drop, and the backend needs no mask for it: so it is done by `dropkey_attention_forward` for `sdpa`, the fused
kernel, `flash_attention_*` and whatever else is registered, and by `flex_attention` for itself, because it takes padding
out of a `BlockMask`. `eager` alone masks, because its weights are shown, with a place for every key.

This file travels with checkpoints: it imports torch, transformers and its neighbours only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention_mask import (
    additive,
    additive_mask,
    blind_rows,
    is_drop_alone,
    keep_tokens,
    protected_drops,
    real_keys,
    settings_of,
)
from .backend_proofs import PROOFS
from .counter_hash import under_transform
from .cpu_attention import can_redraw, redrawn_mask_attention
from .dropkey import PATTERNS, DropKeySite, check_choice, check_ratio, ratio_of
from .efficient_attention import can_redraw_efficiently, redrawn_efficient_attention
from .flex_attention import flex_dropkey_forward
from .patterns import padding_of
from .sample_masks import layer_number, seed_for
from .triton_attention import (
    MAXIMUM_WIDTH,
    SUPPORTED_PATTERNS,
    triton_dropkey_attention,
    triton_is_available,
)
from .triton_mask import can_draw, drawn_mask


# --- the backends -----------------------------------------------------------------------------------------------------


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
    seed, settings = seed_for(module, query.shape[0], query.device), settings_of(module, grid)
    blind = None
    if is_drop_alone(attention_mask, settings) and query.device.type == "cpu":
        # added by the matrix product itself, which spares three passes over the scores and one backward
        bias = additive_mask(seed, query, key, None, settings).flatten(0, 1)
        products = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scaling)
        scores = products.unflatten(0, query.shape[:2])
    else:
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        gone = protected_drops(seed, query, key, attention_mask, settings)
        if attention_mask is not None:
            real = real_keys(attention_mask)
            blind = blind_rows(real)
            # a row of -inf throughout would be NaN: it is computed over hidden keys, and not used
            gone = (gone | ~real) & ~blind
            if attention_mask.is_floating_point():
                scores = scores + attention_mask.masked_fill(blind, 0.0)
        scores = scores.masked_fill(gone, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


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
    seed, settings = seed_for(module, query.shape[0], query.device), settings_of(module, grid)
    if can_redraw(query, key, value, attention_mask, dropout):
        output = redrawn_mask_attention(query, key, value, seed, attention_mask, settings, scaling)
    elif can_redraw_efficiently(query, key, value, attention_mask, dropout):
        output = redrawn_efficient_attention(query, key, value, seed, attention_mask, settings, scaling)
    else:
        if can_draw(query, attention_mask, settings.pattern):
            mask = drawn_mask(seed, query, key.shape[2], attention_mask, settings.ratio, settings.pattern)
        else:
            mask = additive_mask(seed, query, key, attention_mask, settings)
        output = _masked_sdpa(query, key, value, mask, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def _masked_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """PyTorch's attention under the additive or bool `mask` that was made from `attention_mask`, `[B, H, N, Dv]`."""
    blind = None if attention_mask is None else blind_rows(real_keys(attention_mask))
    if mask is not None and blind is not None:
        # not every kernel of PyTorch gives 0 where all keys are hidden
        mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output if blind is None else output.masked_fill(blind, 0.0)


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
            f"attn_implementation={TRITON_NAME!r} takes neither dropout on attention weights (requested {dropout}) nor "
            "additive masks. Train with model.set_attn_implementation('sdpa'), which drops the same scores."
        )
    padding = None
    if attention_mask is not None:
        padding = padding_of(real_keys(attention_mask), f"attn_implementation {TRITON_NAME!r}", attention_mask)
        padding = padding.expand(query.shape[0], -1)
    output = triton_dropkey_attention(
        query,
        key,
        value,
        seed_for(module, query.shape[0], query.device),
        ratio_of(module),
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


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value in the dtype that autocast gives PyTorch's fused attention, which ours is not known to."""
    device = tensors[0].device.type
    # some devices, "meta" for one, have none to ask about
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # autocast leaves float64 alone
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def gathers_tokens(implementation: str) -> bool:
    """Whether `dropkey_attention_forward` gathers the keys of the pattern "token" for this backend (see above)."""
    return implementation in ALL_ATTENTION_FUNCTIONS.keys() - {"flex_attention"}


def _plain_over_kept_tokens(
    module: DropKeySite,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    implementation: str,
    scaling: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pattern "token" by gathering: the plain function of the backend, over the keys that are left."""
    seed = seed_for(module, key.shape[0], key.device)
    left = keep_tokens(seed, key, value, attention_mask, module.dropkey_ratio)
    mask = left.attention_mask
    if implementation in ("sdpa", TRITON_NAME) and mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    plain = ALL_ATTENTION_FUNCTIONS[implementation]
    output, weights = plain(
        module, query, left.key, left.value, mask, scaling=scaling, dropout=dropout, is_causal=False
    )
    return output if left.blind is None else output.masked_fill(left.blind, 0.0), weights


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


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU where there is none that works.

    A build of torch for GPUs names its accelerator on machines without a driver, too.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def default_backend(
    device_type: str, dtype: torch.dtype, *, tokens: int | None = None, head_width: int | None = None
) -> str:
    """The fastest backend that is known to be correct for a device, which models take where none is requested.

    On a CPU without matrix units PyTorch's fused attention is slower than explicit weights in half precision
    (`scripts/benchmark_attention.py`). On a GPU this is `sdpa`, but for shapes in which rows of benchmarks prove the fused
    kernel faster on a GPU of the same name (`backend_proofs.PROOFS`).

    Args:
        device_type: As in `torch.device.type`.
        dtype: Of the model's weights.
        tokens: How many keys a query has, where that is known and the fused kernel takes the case.
        head_width: `D`, as `tokens`.

    Returns:
        An `attn_implementation`.
    """
    if device_type == "cpu" and dtype.itemsize == 2 and not torch.cpu._is_amx_tile_supported():
        return "eager"
    if device_type == "cuda" and PROOFS and tokens is not None and head_width is not None:
        return TRITON_NAME if _fused_is_faster(dtype, tokens, head_width) else "sdpa"
    return "sdpa"


def _fused_is_faster(dtype: torch.dtype, tokens: int, head_width: int) -> bool:
    """Whether the fused kernel is there, and a row proves it faster on the current GPU."""
    if not triton_is_available(torch.device("cuda")):
        return False
    here = (torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    wanted = (*here, str(dtype).removeprefix("torch."), head_width, tokens)
    return any(proof.covers(*wanted) for proof in PROOFS)


# for compilers: its answer is a constant
_fused_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def default_backend_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, pattern: str
) -> str:
    """`default_backend` of one attention call, which the fused kernel may not take."""
    if not PROOFS:
        return default_backend(query.device.type, query.dtype)
    padding = attention_mask is None or (
        not attention_mask.is_floating_point() and (attention_mask.ndim == 2 or attention_mask.shape[1:3] == (1, 1))
    )
    narrow = max(query.shape[-1], value.shape[-1]) <= MAXIMUM_WIDTH and query.shape[-1] == value.shape[-1]
    alike = query.dtype == key.dtype == value.dtype
    fused = pattern in SUPPORTED_PATTERNS and padding and narrow and alike and not under_transform()
    sizes = {"tokens": key.shape[2], "head_width": query.shape[-1]} if fused else {}
    return default_backend(query.device.type, query.dtype, **sizes)


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
    if implementation != "eager":
        query, key, value = _as_autocast(query, key, value)
    # the fused kernel never reads what padding holds
    if isinstance(attention_mask, torch.Tensor) and implementation != TRITON_NAME:
        query, key, value = _cleared_padding(query, key, value, attention_mask)
    if module.dropkey_pattern == "token" and gathers_tokens(implementation):
        return _plain_over_kept_tokens(
            module, query, key, value, attention_mask, implementation=implementation, scaling=scaling, dropout=dropout
        )
    backend = DROPKEY_BACKENDS.get(implementation)
    if backend is None:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot leave out single attention scores, so it cannot train with "
            f"DropKey (here at ratio {module.dropkey_ratio}, pattern {module.dropkey_pattern!r}). Train with one of "
            f"{', '.join(map(repr, DROPKEY_BACKENDS))}, for example model.set_attn_implementation('sdpa'), with the "
            "pattern 'token', or with the ratio 0. Inference works on every backend."
        )
    return backend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, grid=grid)


# --- for any module ---------------------------------------------------------------------------------------------------


@dataclass
class _Site:
    """The settings of one call, as an attention module has them."""

    dropkey_ratio: float
    dropkey_pattern: str
    dropkey_window: int
    training: bool = True
    # as Transformers' attention functions read it
    is_causal: bool = False
    dropkey_layer: torch.Tensor | None = None


def dropkey_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ratio: float,
    *,
    pattern: str = "score",
    window: int = 3,
    grid: tuple[int, int] | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    backend: str | None = None,
    training: bool = True,
    layer: int | None = None,
) -> torch.Tensor:
    """Attention with DropKey for any `nn.Module`, where it would call PyTorch's `scaled_dot_product_attention`.

    Args:
        query: `[B, H, N, D]`, any float dtype that the backend takes.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        ratio: Drop ratio in [0, 1).
        pattern: What is dropped together: "score" (the paper), "key", "token", "block" or "cross"; see
            `dropped_scores`.
        window: Side of a block, or length of each arm of a cross, in patches.
        grid: Patch rows and columns behind the keys, for "block" and "cross"; keys in front of them are not patches.
            Default the largest square that fits, which suits a class token.
        attention_mask: None; bool (True = attend) or additive float, broadcastable to `[B, H, N, M]`; padding `[B, M]` of
            bool or integers; or additive float `[N, M]`. Additive values at or below -1e4 hide a key.
        scaling: Factor on the scores, default `D ** -0.5`.
        backend: "eager", "sdpa", "flex_attention" or "dropkey_triton"; default the one of `default_backend`. All drop
            the same scores for the same state of torch's generator.
        training: Whether to drop anything; pass the module's `self.training`.
        layer: Number of this attention in its model; needed within `sample_ids` only.

    Returns:
        `[B, H, N, Dv]` in the dtype of the query (under autocast, of autocast). A query that may see no key gets 0.
        Where nothing is dropped, PyTorch's own attention, on every backend.

    Example:

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return self.proj(dropkey_attention(query, key, value, 0.1, training=self.training).transpose(1, 2).flatten(2))

    Raises:
        TypeError: `ratio` is not a number.
        ValueError: A ratio outside [0, 1), an unknown pattern or backend, tensors whose shapes do not belong together, a
            mask of another form, or what the backend cannot do.
    """
    check_ratio(ratio, "ratio")
    check_choice(pattern, PATTERNS, "pattern")
    if backend is not None:
        check_choice(backend, tuple(DROPKEY_BACKENDS), "backend")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    q, k, v = shapes
    if any(len(shape) != 4 for shape in shapes) or not (q[:2] == k[:2] == v[:2] and k[2] == v[2] and q[3] == k[3]):
        raise ValueError(
            f"Expected query [B, H, N, D], key [B, H, M, D] and value [B, H, M, Dv], got {q}, {k} and {v}. Repeat keys "
            "and values if several query heads share them."
        )
    if not training or ratio == 0:
        return _plain_attention(query, key, value, attention_mask, scaling)
    output, _ = dropkey_attention_forward(
        _Site(ratio, pattern, window, dropkey_layer=layer_number(layer)),
        query,
        key,
        value,
        attention_mask,
        implementation=backend or default_backend_of(query, key, value, attention_mask, pattern),
        scaling=q[3] ** -0.5 if scaling is None else scaling,
        grid=grid,
    )
    return output.transpose(1, 2)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """PyTorch's attention, with a mask of any form that `real_keys` takes."""
    mask = attention_mask
    if attention_mask is not None:
        floats = attention_mask.is_floating_point()
        mask = additive(attention_mask).to(query.dtype) if floats else real_keys(attention_mask)
    return _masked_sdpa(query, key, value, mask, attention_mask, scaling)
