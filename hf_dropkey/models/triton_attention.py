"""DropKey inside fused attention, forward and backward, by Triton kernels that compute the mask where they need it.

Which scores are dropped is computed from the seed in both passes, bit for bit as `patterns.dropped_scores` defines it
for the patterns "score" and "key". Nothing of size `N * M` is kept for the backward pass, which gets the output, one
float and one flag per row; between its two kernels, for the pattern "score", lies one bit per score. The patterns "block"
and "cross" are refused; for "token" the caller gathers the kept keys and needs no mask at all.

This file is the host's side: checks, launches, and the operator. The device code is in `triton_kernels`, how it is
launched in `triton_launches`. This file travels with checkpoints: it imports torch, the standard library, its neighbours
and, if there is one, Triton.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from .counter_hash import Ratio, RatioTensor, byte_thresholds, threshold_tensor
from .dropkey import check_ratio
from .operators import register_operator, unit_columns
from .patterns import PATTERNS, check_choice
from .triton_kernels import INTERPRETED, KERNELS
from .triton_launches import (
    KEY_TILE,
    MINIMUM_TRITON,
    NEXT_TRITON,
    ROW_TILE,
    SHORT_ROW,
    SHORTER_ROW,
    launch_configuration,
    tile_side,
)


try:
    import triton
except ImportError:
    triton = None


def _release_of(version: str) -> tuple[int, int]:
    """(major, minor) of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# of Triton
RELEASE = (0, 0) if triton is None else _release_of(triton.__version__)
SUPPORTED_PATTERNS = ("score", "key")
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAXIMUM_WIDTH = 128
LOG2_E = 1.4426950408889634


# --- launches ---------------------------------------------------------------------------------------------------------


def _key_blocks(keys: int) -> tuple[int, int]:
    """How a row of keys is cut: into whole blocks of 64, and a tail tile of this side (0: none) for what is left."""
    blocks, tail = divmod(keys, 64)
    return blocks, tile_side(tail) if tail else 0


def _common_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    limits: torch.Tensor,
    padding: torch.Tensor | None,
    scaling: float,
    shared: bool,
) -> dict[str, Any]:
    """The kernel arguments that forward and backward share."""
    padding = None if padding is None else unit_columns(padding)
    width, value_width = query.shape[-1], value.shape[-1]
    return {
        "p_q": query,
        "p_k": key,
        "p_v": value,
        "p_seed": seed_argument(seed),
        "p_limits": limits.contiguous(),
        "p_padding": padding,
        "strides_q": query.stride()[:3],
        "strides_k": key.stride()[:3],
        "strides_v": value.stride()[:3],
        "stride_padding": 0 if padding is None else padding.stride(0),
        "scale": scaling * LOG2_E,
        "heads": query.shape[1],
        "N": query.shape[2],
        "M": key.shape[2],
        "SHARED": shared,
        "HAS_PADDING": padding is not None,
        "WIDTH": (width, tile_side(width)),
        "VALUE_WIDTH": (value_width, tile_side(value_width)),
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
    }


def seed_argument(seed: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What kernels take as `p_seed`: a seed int32 `[2]` or `[B, 2]`, and the words from one image's to the next."""
    return seed.contiguous(), 0 if seed.ndim == 1 else 2


def _launch(name: str, arguments: dict[str, Any], **one_pass: Any) -> None:
    """Runs a kernel, with one program per image, head and tile.

    Args:
        name: As `launch_configuration`.
        arguments: What the kernel takes.
        one_pass: What it takes in addition if rows are held on chip.

    Raises:
        ValueError: The GPU is too old.
    """
    query = arguments["p_q"]
    # the interpreter has no registers to fit into: it takes what the smallest device does
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
    if capability < (8, 0):
        raise ValueError(
            f"The fused attention needs compute capability 8.0, got {capability[0]}.{capability[1]} on "
            f"{str(query.device)!r}. Use the backend 'sdpa'."
        )
    width = max(arguments["WIDTH"][1], arguments["VALUE_WIDTH"][1])
    padded = arguments["HAS_PADDING"] or min(arguments["WIDTH"][0], arguments["VALUE_WIDTH"][0]) < width
    name, launch = launch_configuration(
        name, width, query.dtype, arguments["N"], capability, padded=padded, release=RELEASE
    )
    size, tile = (arguments["M"], KEY_TILE) if name == "key_value" else (arguments["N"], launch.tile)
    programs = query.shape[0] * query.shape[1] * -(-size // tile)
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        KERNELS[name][(programs,)](
            **arguments,
            **(one_pass if name.startswith("short") else {}),
            TILE=launch.tile,
            num_warps=launch.warps,
            num_stages=launch.stages,
            # a product and a sum may round once; Triton's default for this is about to change
            enable_fp_fusion=True,
        )


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    limits: torch.Tensor,
    padding: torch.Tensor | None,
    scaling: float,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (unit_columns(tensor) for tensor in (query, key, value))
    output, lse, undone = _forward_outputs(query, key, value)
    arguments = _common_arguments(query, key, value, seed, limits, padding, scaling, shared)
    arguments |= {"p_o": output, "p_lse": lse, "p_undone": undone, "strides_o": output.stride()[:3]}
    keys = key.shape[2]
    blocks, arguments["TAIL"] = _key_blocks(keys)
    if keys > SHORT_ROW:
        _launch("long", arguments)
    else:
        _launch("short" if keys <= SHORTER_ROW and padding is None else "short_full", arguments, BLOCKS=blocks)
    return output, lse, undone


def _forward_outputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised results: the output, the log2 normaliser of each row, and whether its drop was undone."""
    images, heads, queries, _width = query.shape
    # [B, N, H, Dv] in memory, which is what the output projection reads
    output = query.new_empty(images, queries, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(images, heads, queries, dtype=torch.float32)
    return output, lse, query.new_empty(images, heads, queries, dtype=torch.int8)


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    limits: torch.Tensor,
    padding: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    undone: torch.Tensor,
    scaling: float,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = _backward_outputs(grad, query, key, value)
    grad, query, key, value = (unit_columns(tensor) for tensor in (grad, query, key, value))
    arguments = _common_arguments(query, key, value, seed, limits, padding, scaling, shared)
    arguments |= {
        "p_do": grad,
        "p_undone": undone,
        "p_rows": _for_each_row(query, 2, torch.float32),
        "strides_do": grad.stride()[:3],
        "scaling": scaling,
    }
    # a bit for each score, in words of 64 keys; the kernel that stores them takes half a word at a time
    bits = None if shared else _for_each_row(query, -(-key.shape[2] // KEY_TILE), torch.int64)
    query_side: dict[str, Any] = {"p_lse": lse, "p_bits": None if bits is None else bits.view(torch.int32)}
    query_side |= {"p_o": output, "p_dq": grads[0], "TAIL": _key_blocks(key.shape[2])[1]}
    query_side |= {"strides_o": output.stride()[:3], "strides_dq": grads[0].stride()[:3]}
    _launch("query", arguments | query_side)
    key_side: dict[str, Any] = {"p_bits": bits, "p_dk": grads[1], "p_dv": grads[2]}
    key_side |= {"strides_dk": grads[1].stride()[:3], "strides_dv": grads[2].stride()[:3]}
    _launch("key_value", arguments | key_side)
    return grads


def _for_each_row(query: torch.Tensor, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for what one kernel of the backward pass leaves for the next: `[B, H, numbers, N]`, with `N` rounded up."""
    images, heads, queries = query.shape[:3]
    return query.new_empty(images, heads, numbers, -(-queries // ROW_TILE) * ROW_TILE, dtype=dtype)


def _backward_outputs(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised gradients."""
    return _empty_gradient(query), _empty_gradient(key), _empty_gradient(value)


def _empty_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for the gradient of a tensor: in its own dimension order, unless that would set its columns apart."""
    gradient = torch.empty_like(tensor)
    if gradient.stride(-1) == 1:
        return gradient
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# --- the operator -----------------------------------------------------------------------------------------------------
#
# Eager mode takes the autograd function, which costs the host half as much; compiled code the operator, because a
# compiler cannot look into a launch.


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        results = _forward(*inputs)
        _save_for_backward(ctx, inputs, results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(upstream[0], *ctx.saved_tensors, *ctx.constants), None, None, None, None, None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.constants = inputs[6:]


def _differentiate(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None, None


_FILES = [__file__, *(str(Path(__file__).with_name(f"triton_{name}.py")) for name in ("kernels", "launches"))]
_QKV = "Tensor query, Tensor key, Tensor value, Tensor seed, Tensor limits, Tensor? padding"
_RESULTS = "float scaling, bool shared) -> (Tensor, Tensor, Tensor)"
_attention = register_operator(
    "attention",
    _FILES,
    f"({_QKV}, {_RESULTS}",
    _forward,
    _forward_outputs,
    backward=_differentiate,
    setup_context=_save_for_backward,
)
_attention_backward = register_operator(
    "attention_backward",
    _FILES,
    f"(Tensor grad, {_QKV}, Tensor output, Tensor lse, Tensor undone, {_RESULTS}",
    _backward,
    _backward_outputs,
)


# --- the public function ----------------------------------------------------------------------------------------------


def check_triton(version: str) -> None:
    """Raises ImportError unless the kernels are known to compile, without spilled registers, by `version` of Triton.

    PyTorch brings its own: 3.6 comes with torch 2.11, 3.7 with torch 2.13.
    """
    if not MINIMUM_TRITON <= _release_of(version) < NEXT_TRITON:
        wanted = f"triton>={MINIMUM_TRITON[0]}.{MINIMUM_TRITON[1]},<{NEXT_TRITON[0]}.{NEXT_TRITON[1]}"
        raise ImportError(
            f"The fused attention needs {wanted}, but {version} is installed: run `pip install '{wanted}'` with a torch "
            "that takes it (2.11 brings 3.6, 2.13 brings 3.7), or use the backend 'sdpa'."
        )


def triton_is_available(device: torch.device | None = None) -> bool:
    """Whether the kernels can run: on `device`, or on any device of this machine."""
    if triton is None or not MINIMUM_TRITON <= RELEASE < NEXT_TRITON:
        return False
    if INTERPRETED:
        return device is None or device.type in ("cpu", "cuda")
    return torch.cuda.is_available() and (device is None or device.type == "cuda")


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    pattern: str,
    padding: torch.Tensor | None,
) -> None:
    """Raises unless the kernels can do exactly what is requested."""
    if triton is None:
        raise ImportError("The fused attention needs Triton: run `pip install triton`, or use the backend 'sdpa'.")
    check_triton(triton.__version__)
    check_choice(pattern, PATTERNS, "dropkey_pattern")
    if pattern not in SUPPORTED_PATTERNS:
        raise ValueError(
            f"The fused attention drops keys in the patterns {', '.join(map(repr, SUPPORTED_PATTERNS))}, got "
            f"{pattern!r}. For 'token', leave the keys out beforehand; for 'block' and 'cross', use the backend 'sdpa'."
        )
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    q, k, v = shapes
    if any(len(shape) != 4 for shape in shapes) or not (q[:2] == k[:2] == v[:2] and k[2] == v[2] and q[3] == k[3]):
        raise ValueError(
            "Expected query [B, H, N, D], key [B, H, M, D] and value [B, H, M, Dv], got "
            f"{q}, {k} and {v}. Repeat keys and values if several query heads share them."
        )
    if 0 in q or 0 in v:
        raise ValueError(f"The fused attention needs at least one of everything, got query {q} and value {v}.")
    if max(q[3], v[3]) > MAXIMUM_WIDTH:
        raise ValueError(
            f"The fused attention takes head widths up to {MAXIMUM_WIDTH}, got {q[3]} for queries and {v[3]} for "
            "values. Use the backend 'sdpa'."
        )
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"The fused attention takes one dtype of {', '.join(map(str, SUPPORTED_DTYPES))} for query, key and value, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}. Convert them, or use the backend 'sdpa'."
        )
    if not triton_is_available(query.device):
        raise ValueError(
            f"The fused attention needs a GPU, got tensors on {str(query.device)!r}. Use the backend 'sdpa', or set "
            "TRITON_INTERPRET=1 before Python starts to test it on the CPU."
        )
    if tuple(seed.shape) not in ((2,), (q[0], 2)) or seed.dtype != torch.int32:
        raise ValueError(
            f"`seed` must be int32 of shape (2,) or {(q[0], 2)}, got {seed.dtype} of shape {tuple(seed.shape)}. Take it "
            "from `draw_seed`."
        )
    if padding is not None and (tuple(padding.shape) != (q[0], k[2]) or padding.dtype != torch.bool):
        raise ValueError(
            f"`padding` must be bool of shape {(q[0], k[2])}, one True per key to attend, got {padding.dtype} of shape "
            f"{tuple(padding.shape)}. Use the backend 'sdpa' for masks that differ between queries or carry a bias."
        )
    for name, tensor in (("key", key), ("value", value), ("seed", seed), ("padding", padding)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(
                f"`{name}` is on {str(tensor.device)!r} but `query` on {str(query.device)!r}: move it there."
            )


def triton_dropkey_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    ratio: Ratio,
    *,
    scaling: float | None = None,
    pattern: str = "score",
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with DropKey in one kernel, differentiable, without a mask that is kept for the backward pass.

    The scores that `patterns.dropped_scores` names for the seed are left out of the softmax, under the rule of
    `patterns.protect_rows`. The backward pass is deterministic.

    Args:
        query: `[B, H, N, D]` in float16, bfloat16 or float32, any strides, D up to 128.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`, Dv up to 128.
        seed: int32 `[2]` (`counter_hash.draw_seed`) or `[B, 2]` (`counter_hash.row_keys`) on the same device; read by
            the kernels, never by the host.
        ratio: Drop ratio in [0, 1), a number, or as data for compiled code (`dropkey.ratio_tensor`).
        scaling: Factor on the scores, above 0, default `D ** -0.5`.
        pattern: "score" or "key".
        padding: bool `[B, M]`, True for keys to attend. What padded positions hold, NaN included, reaches neither the
            output of other positions nor any gradient, as long as no gradient arrives at the padded queries.

    Returns:
        `[B, H, N, Dv]`, laid out as `[B, N, H, Dv]`. A row without a single real key is zero.

    Raises:
        ImportError: Triton is not installed.
        TypeError: The dtypes differ or are not supported, or `ratio` is not a number.
        ValueError: A shape, width, device, pattern, ratio, seed or padding that the kernels do not take.
    """
    if not isinstance(ratio, RatioTensor):
        check_ratio(ratio)
    _check(query, key, value, seed, pattern, padding)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not scaling > 0:
        raise ValueError(f"`scaling` must be above 0, got {scaling}. Negate the queries for a negative factor.")
    inputs = query, key, value, seed, limits_of(ratio, query.device), padding, scaling, pattern == "key"
    return _attention(*inputs)[0] if torch.compiler.is_compiling() else _FusedAttention.apply(*inputs)


def limits_of(ratio: Ratio, device: torch.device) -> torch.Tensor:
    """`threshold_tensor`, without a copy to the device at each call."""
    if isinstance(ratio, RatioTensor) or torch.compiler.is_compiling():
        return threshold_tensor(ratio, device)
    key = byte_thresholds(ratio), device
    found = _LIMITS.get(key)
    if found is None:
        # saved for a backward pass, which a tensor of inference mode may not be
        with torch.inference_mode(False):
            found = threshold_tensor(ratio, device)
        # a stand-in (of a fake mode, of a transform) must not outlive what it stands in
        if type(found) is torch.Tensor:
            if len(_LIMITS) >= 1024:
                _LIMITS.clear()
            _LIMITS[key] = found
    return found


# one tensor for each ratio and device in use; what it holds never changes
_LIMITS: dict[tuple[tuple[int, int, int], torch.device], torch.Tensor] = {}
