"""DropKey inside fused attention: forward and backward Triton kernels that compute the mask where they need it.

Which scores are dropped is recomputed from the seed in every kernel, bit for bit as `dropkey.dropped_scores` defines it
for the patterns "score" and "key". Nothing of size `N * M` is ever stored: the backward pass keeps the output, one
float and one flag per row. The patterns "block" and "cross" are refused; for "token" the caller gathers the kept keys
and needs no mask at all.

How the kernels follow the definition: one tile of words [rows, 64] serves four blocks of 64 keys, which shift another
byte to the top of the word and compare it, signed, with the threshold of (row, block). Dropped scores become -inf
before the running maximum, so a large dropped score cannot underflow the kept ones. A row whose maximum is still -inf
at the end has lost all its keys: its tile is redone without dropping, the row takes that result, and its flag tells
the backward pass. Where the whole row fits on chip (M <= 256) it is one pass without a running maximum.

Each kernel runs compiled on a GPU, or in Triton's interpreter on the CPU under TRITON_INTERPRET=1 (slow: for tests).
This file travels with checkpoints: it imports torch, the standard library, its neighbour `dropkey` and, if there is
one, Triton.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from typing import Any

import torch

from .dropkey import GOLDEN, MIX_1, MIX_2, STEP_1, STEP_2, _byte_thresholds, check_choice, check_ratio


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


SUPPORTED_PATTERNS = ("score", "key")
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAXIMUM_WIDTH = 128
# longest row of scores that is held on chip as a whole
SHORT_ROW = 256
LOG2_E = 1.4426950408889634


# --- launch configurations --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel is launched: rows of queries per tile, warps per program, stages of the software pipeline."""

    rows: int
    warps: int
    stages: int


# kernel, then padded head width: 16-bit tensors on every GPU from sm_80 on
_LAUNCHES_16_BIT = {
    "short": {16: Launch(64, 4, 1), 32: Launch(64, 4, 1), 64: Launch(64, 4, 1), 128: Launch(64, 4, 1)},
    "long": {16: Launch(64, 4, 2), 32: Launch(64, 4, 2), 64: Launch(64, 4, 2), 128: Launch(64, 4, 2)},
    "query": {16: Launch(64, 4, 2), 32: Launch(64, 4, 2), 64: Launch(64, 4, 2), 128: Launch(64, 4, 2)},
    "key_value": {16: Launch(64, 4, 2), 32: Launch(64, 4, 2), 64: Launch(64, 4, 2), 128: Launch(64, 4, 2)},
}
_LAUNCHES_32_BIT = {
    "short": {16: Launch(32, 4, 1), 32: Launch(32, 4, 1), 64: Launch(32, 4, 1), 128: Launch(32, 8, 1)},
    "long": {16: Launch(32, 4, 1), 32: Launch(32, 4, 1), 64: Launch(32, 4, 1), 128: Launch(32, 8, 1)},
    "query": {16: Launch(32, 4, 1), 32: Launch(32, 4, 1), 64: Launch(32, 4, 1), 128: Launch(32, 8, 1)},
    "key_value": {16: Launch(32, 4, 1), 32: Launch(32, 4, 1), 64: Launch(32, 4, 1), 128: Launch(32, 8, 1)},
}


def launch_configuration(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int], rows: int) -> Launch:
    """Block size, warps and stages of a kernel."""
    table = _LAUNCHES_32_BIT if dtype == torch.float32 else _LAUNCHES_16_BIT
    launch = table[kernel][width]
    return dataclasses.replace(launch, rows=min(launch.rows, _power_of_two(rows)))


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 16, the smallest side of a tile in a product."""
    return max(16, 1 << (size - 1).bit_length())


# --- the mask, inside a kernel ----------------------------------------------------------------------------------------


def _jit(function: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing, so that this module always imports."""
    if triton is None:
        return function
    # none of these changes the code that is best for a kernel, so none may cause a recompilation
    return triton.jit(function, do_not_specialize=["lower", "upper", "fraction", "heads", "N", "M"])


def _constant(value: int) -> Any:
    """A number that kernels may read from this module."""
    return value if triton is None else tl.constexpr(value & 0xFFFFFFFF)


_MIX_1, _MIX_2, _GOLDEN, _STEP_1, _STEP_2 = (_constant(value) for value in (MIX_1, MIX_2, GOLDEN, STEP_1, STEP_2))


@_jit
def _mix(x, key):
    # unsigned, so shifts are logical; the products wrap on purpose, which Triton's debug mode would report
    x = x ^ (x >> 16)
    x = tl.mul(x, _MIX_1, sanitize_overflow=False)
    x = x ^ (x >> 15) ^ key
    x = tl.mul(x, _MIX_2, sanitize_overflow=False)
    return x ^ (x >> 16)


@_jit
def _step(k1, k2, index):
    offset = tl.mul(index.to(tl.uint32), _GOLDEN, sanitize_overflow=False)
    k1 = _mix(k1 ^ tl.add(offset, _STEP_1, sanitize_overflow=False), 0)
    return k1, _mix(k2 ^ tl.add(offset, _STEP_2, sanitize_overflow=False) ^ k1, 0)


@_jit
def _head_pair(p_seed, image, head):
    k1 = tl.load(p_seed).to(tl.uint32, bitcast=True)
    k2 = tl.load(p_seed + 1).to(tl.uint32, bitcast=True)
    k1, k2 = _step(k1, k2, image)
    return _step(k1, k2, head)


@_jit
def _words(k1, k2, word):
    return _mix(k1 ^ tl.mul(word.to(tl.uint32), _GOLDEN, sanitize_overflow=False), k2)


@_jit
def _thresholds(k1, k2, block, lower, upper, fraction):
    offset = tl.mul(block.to(tl.uint32), _GOLDEN, sanitize_overflow=False)
    dither = _mix(tl.mul(k1, 3, sanitize_overflow=False) ^ k2 ^ offset, 0)
    return tl.where(dither.to(tl.int32, bitcast=True) < fraction, upper, lower)


@_jit
def _is_dropped(b_words, byte, b_threshold):
    return (b_words << (24 - 8 * byte)).to(tl.int32, bitcast=True) < b_threshold
