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
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .counter_hash import GOLDEN, MIX_1, MIX_2, STEP_1, STEP_2, byte_thresholds
from .dropkey import PATTERNS, check_choice, check_ratio


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


SUPPORTED_PATTERNS = ("score", "key")
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAXIMUM_WIDTH = 128
# keys that a program of the backward pass owns
KEY_TILE = 64
# longest row of scores that is held on chip as a whole, and longest one that leaves room for the largest tiles
SHORT_ROW, SHORTER_ROW = 256, 208
LOG2_E = 1.4426950408889634


# --- launch configurations --------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How a kernel is launched: queries per tile, warps per program, stages of the software pipeline."""

    tile: int
    warps: int
    stages: int


def _by_width(narrow: Launch | None, middle: Launch | None, wide: Launch | None) -> dict[int, Launch | None]:
    """The launches for padded head widths up to 32, of 64 and of 128."""
    return {16: narrow, 32: narrow, 64: middle, 128: wide}


# 16-bit tensors, by the first number of the compute capability; None: such rows do not fit on chip, "long" takes them
_LAUNCHES = {
    8: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), Launch(32, 8, 1)),
        "short_full": _by_width(Launch(64, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
        "long": _by_width(Launch(64, 4, 3), Launch(64, 8, 3), Launch(32, 8, 2)),
        "query": _by_width(Launch(64, 4, 3), Launch(64, 4, 3), Launch(32, 8, 2)),
        "key_value": _by_width(Launch(64, 4, 3), Launch(32, 4, 2), Launch(64, 8, 2)),
    },
    9: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), None),
        "short_full": _by_width(None, Launch(32, 8, 1), None),
        "long": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2)),
        "query": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2)),
        "key_value": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(32, 4, 2)),
    },
    10: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1)),
        "short_full": _by_width(Launch(64, 8, 1), Launch(64, 8, 1), Launch(64, 8, 1)),
        "long": _by_width(Launch(64, 4, 2), Launch(128, 8, 2), Launch(64, 8, 2)),
        "query": _by_width(Launch(64, 4, 2), Launch(64, 8, 2), Launch(64, 4, 2)),
        "key_value": _by_width(Launch(64, 4, 2), Launch(64, 8, 2), Launch(64, 4, 1)),
    },
}
# where padded keys or columns need more registers: generation, kernel, padded head width
_LAUNCHES_PADDED = {
    (8, "query", 128): Launch(16, 8, 2),
    (8, "key_value", 128): Launch(16, 8, 2),
    (9, "query", 128): Launch(64, 8, 2),
    (9, "key_value", 128): Launch(32, 8, 2),
    (10, "short", 128): Launch(64, 8, 1),
}
_LAUNCHES_FLOAT32 = {
    "short": _by_width(None, None, None),
    "short_full": _by_width(None, None, None),
    "long": _by_width(Launch(32, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    "query": _by_width(Launch(32, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    "key_value": _by_width(Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
}


def launch_configuration(
    kernel: str, width: int, dtype: torch.dtype, queries: int, capability: tuple[int, int], *, padded: bool
) -> tuple[str, Launch]:
    """Tile, warps and stages of a kernel, all of them chosen without a GPU.

    The kernels have run in Triton's interpreter only, never on a device. Each entry is the largest of a few tiles that
    compiles for sm_80, sm_90 or sm_100 without spilling registers; tests compile them again. Float32 at width 128 does
    spill.

    Predictions, to be replaced by measurements: kernels are bound by instruction issue, not by memory, at every width
    up to 64. "key_value" is the slowest, since it computes a whole word for each byte it uses. Rows in one pass save
    the rescaling of the output, about one multiplication per score at width 64. "short_full" on 9.x gives up the wider
    matrix instruction for tiles of 32 and may lose to "long". Float32 has no tensor cores to use, and is for tests.

    Args:
        kernel: "short" (rows up to 208 keys without padding), "short_full" (other rows up to 256), "long", "query" or
            "key_value".
        width: The larger padded head width: 16, 32, 64 or 128.
        dtype: Of query, key and value.
        queries: `N`; tiles are no larger than it needs.
        capability: Compute capability of the device.
        padded: Whether keys are padded, or the head width is.

    Returns:
        The kernel's name and its launch; those of "long" where rows do not fit on chip.
    """
    # 12.x has the matrix instructions and the shared memory of 8.x, 11.x those of 10.x
    major = {11: 10, 12: 8}.get(capability[0], min(capability[0], 10))
    table = _LAUNCHES_FLOAT32 if dtype == torch.float32 else _LAUNCHES[major]
    launch = table[kernel][width]
    if padded and dtype != torch.float32:
        launch = _LAUNCHES_PADDED.get((major, kernel, width), launch)
    if launch is None:
        return launch_configuration("long", width, dtype, queries, capability, padded=padded)
    return kernel, launch._replace(tile=min(launch.tile, _tile_side(queries)))


def _tile_side(size: int) -> int:
    """The smallest side of a tile that holds `size`: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


# --- the mask, inside a kernel ----------------------------------------------------------------------------------------
#
# In kernels b_ is a block in registers, p_ a pointer, o_ offsets and m_ a mask.


def _jit(function: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing, so that this module always imports."""
    if triton is None:
        return function
    # these change with the step, the layer or the batch, and no value of them has better code than another
    return triton.jit(function, do_not_specialize=["lower", "upper", "fraction", "heads", "N", "M"])


def _word(value: int) -> Any:
    """A 32-bit word as a constant that kernels may read from this module."""
    return value if triton is None else tl.constexpr(value & 0xFFFFFFFF)


_MIX_1, _MIX_2, _GOLDEN, _STEP_1, _STEP_2 = (_word(value) for value in (MIX_1, MIX_2, GOLDEN, STEP_1, STEP_2))


@_jit
def _mix(x, key):
    # words are unsigned here, so shifts are logical; products wrap on purpose, which debug mode would report
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
def _row_pairs(p_seed, image, head, o_rows, SHARED: tl.constexpr):
    k1 = tl.load(p_seed).to(tl.uint32, bitcast=True)
    k2 = tl.load(p_seed + 1).to(tl.uint32, bitcast=True)
    k1, k2 = _step(k1, k2, image)
    k1, k2 = _step(k1, k2, head)
    # the pattern "key" takes the decisions of query 0 for all
    return _step(k1, k2, tl.zeros([1, 1], tl.int32) if SHARED else o_rows)


@_jit
def _words(k1, k2, o_words):
    return _mix(k1 ^ tl.mul(o_words.to(tl.uint32), _GOLDEN, sanitize_overflow=False), k2)


@_jit
def _thresholds(k1, k2, block, limits):
    # the block number is a Python integer in the interpreter
    b_block = tl.full([1, 1], block, tl.int32).to(tl.uint32)
    b_offset = tl.mul(b_block, _GOLDEN, sanitize_overflow=False)
    b_dither = _mix(tl.mul(k1, 3, sanitize_overflow=False) ^ k2 ^ b_offset, 0)
    return tl.where(b_dither.to(tl.int32, bitcast=True) < limits[2], limits[1], limits[0])


@_jit
def _is_dropped(b_words, block, b_threshold):
    return (b_words << (24 - 8 * (block % 4))).to(tl.int32, bitcast=True) < b_threshold


# `triton.jit` reads TRITON_INTERPRET once, when a kernel is defined
_INTERPRETED = triton is not None and not isinstance(_is_dropped, triton.JITFunction)


# --- tiles ------------------------------------------------------------------------------------------------------------


@_jit
def _load_rows(p_head, o_rows, stride, m_rows, MASKED: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    o_columns = tl.arange(0, WIDTH[1])
    # 64 bits: rows times stride passes 2^31 in large tensors
    p_tile = p_head + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    if MASKED and WIDTH[0] != WIDTH[1]:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & (o_columns < WIDTH[0])[None, :], other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    elif WIDTH[0] != WIDTH[1]:
        b_tile = tl.load(p_tile, mask=(o_columns < WIDTH[0])[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    # the interpreter would multiply the bit patterns of bfloat16
    if UPCAST:
        b_tile = b_tile.to(tl.float32)
    return b_tile


@_jit
def _store_rows(p_head, o_rows, stride, b_tile, m_rows, WIDTH: tl.constexpr):
    o_columns = tl.arange(0, WIDTH[1])
    p_tile = p_head + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    tl.store(p_tile, b_tile.to(p_head.dtype.element_ty), mask=m_rows[:, None] & (o_columns < WIDTH[0])[None, :])


@_jit
def _program(size, TILE: tl.constexpr, heads):
    # one axis, because the others end at 65535; neighbours share a head, and so its keys in the cache
    tiles = tl.cdiv(size, TILE)
    image_head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles * TILE + tl.arange(0, TILE), image_head // heads, image_head % heads


@_jit
def _head_offset(image, head, strides):
    return image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@_jit
def _real_keys(p_padding, o_keys, M, HAS_PADDING: tl.constexpr):
    m_keys = o_keys < M
    if HAS_PADDING:
        m_keys = tl.load(p_padding + o_keys, mask=m_keys, other=0) != 0
    return m_keys


# --- forward ----------------------------------------------------------------------------------------------------------


@_jit
def _scores(b_q, p_k, stride, o_keys, m_keys, MASKED: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    b_k = _load_rows(p_k, o_keys, stride, m_keys, MASKED, WIDTH, UPCAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if MASKED:
        b_s = tl.where(m_keys[None, :], b_s, float("-inf"))
    return b_s


@_jit
def _online_softmax(b_m, b_l, b_o, b_s, b_v, scale):
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    # a row that has kept nothing yet must not compute -inf - -inf
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_shrink = tl.exp2(b_m - b_base)
    b_o = b_o * b_shrink[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_new, b_l * b_shrink + tl.sum(b_p, 1), b_o


@_jit
def _store_forward(b_m, b_l, b_o, o_rows, m_rows, p_o, p_lse, stride_o, VALUE_WIDTH: tl.constexpr):
    # no real key at all: the output is 0, and an infinite normaliser makes all probabilities of the backward pass 0
    m_empty = b_m == float("-inf")
    b_l = tl.where(m_empty, 1.0, b_l)
    _store_rows(p_o, o_rows, stride_o, b_o / b_l[:, None], m_rows, VALUE_WIDTH)
    tl.store(p_lse + o_rows, tl.where(m_empty, float("inf"), b_m + tl.log2(b_l)), mask=m_rows)


@_jit
def _finish_rows(
    b_m, b_l, b_o, b_q, o_rows, m_rows, p_k, p_v, p_o, p_lse, p_undone, p_padding, stride_k, stride_v, stride_o,
    M, scale, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m_undone = m_rows & (b_m == float("-inf"))
    tl.store(p_undone + o_rows, m_undone.to(tl.int8), mask=m_rows)
    _store_forward(b_m, b_l, b_o, o_rows, m_rows & ~m_undone, p_o, p_lse, stride_o, VALUE_WIDTH)
    # r^M is the chance that a row lost all its keys: rare but for short rows and long padding
    if tl.max(m_undone.to(tl.int32), 0) > 0:
        b_m = tl.full(b_m.shape, float("-inf"), tl.float32)
        b_l = tl.zeros(b_l.shape, tl.float32)
        b_o = tl.zeros(b_o.shape, tl.float32)
        for start in range(0, M, 64):
            o_keys = start + tl.arange(0, 64)
            m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
            b_s = _scores(b_q, p_k, stride_k, o_keys, m_keys, True, WIDTH, UPCAST)
            b_v = _load_rows(p_v, o_keys, stride_v, m_keys, True, VALUE_WIDTH, UPCAST)
            b_m, b_l, b_o = _online_softmax(b_m, b_l, b_o, b_s, b_v, scale)
        _store_forward(b_m, b_l, b_o, o_rows, m_undone, p_o, p_lse, stride_o, VALUE_WIDTH)


@_jit
def _kept_scores(
    b_q, b_words, k1, k2, block, p_k, p_padding, stride_k, M, limits, SIZE: tl.constexpr,
    MASKED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_keys = 64 * block + tl.arange(0, SIZE)
    m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
    m_dropped = _is_dropped(b_words, block, _thresholds(k1, k2, block, limits))
    b_s = _scores(b_q, p_k, stride_k, o_keys, m_keys, MASKED, WIDTH, UPCAST)
    return tl.where(m_dropped, float("-inf"), b_s)


@_jit
def _load_values(
    p_v, p_padding, block, stride_v, M, SIZE: tl.constexpr, MASKED: tl.constexpr, HAS_PADDING: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_keys = 64 * block + tl.arange(0, SIZE)
    m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
    return _load_rows(p_v, o_keys, stride_v, m_keys, MASKED, VALUE_WIDTH, UPCAST)


@_jit
def _long_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_undone, p_seed, p_padding, strides_q, strides_k, strides_v, strides_o, stride_padding,
    lower, upper, fraction, scale, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of any length: a loop over blocks of 64 keys with a running maximum."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = (lower, upper, fraction)

    p_q += _head_offset(image, head, strides_q)
    b_q = _load_rows(p_q, o_rows, strides_q[2], m_rows, True, WIDTH, UPCAST)
    b_m = tl.full([TILE], float("-inf"), tl.float32)
    b_l = tl.zeros([TILE], tl.float32)
    b_o = tl.zeros([TILE, VALUE_WIDTH[1]], tl.float32)
    b_words = tl.zeros([1 if SHARED else TILE, 64], tl.uint32)
    for block in range(M // 64):
        if block % 4 == 0:
            b_words = _words(k1, k2, (16 * block + tl.arange(0, 64))[None, :])
        b_s = _kept_scores(
            b_q, b_words, k1, k2, block, p_k, p_padding, strides_k[2], M, limits,
            64, HAS_PADDING, HAS_PADDING, WIDTH, UPCAST,
        )  # fmt: skip
        b_v = _load_values(p_v, p_padding, block, strides_v[2], M, 64, HAS_PADDING, HAS_PADDING, VALUE_WIDTH, UPCAST)
        b_m, b_l, b_o = _online_softmax(b_m, b_l, b_o, b_s, b_v, scale)
    if TAIL > 0:
        block = M // 64
        b_words = _words(k1, k2, (block // 4 * 64 + tl.arange(0, TAIL))[None, :])
        b_s = _kept_scores(
            b_q, b_words, k1, k2, block, p_k, p_padding, strides_k[2], M, limits,
            TAIL, True, HAS_PADDING, WIDTH, UPCAST,
        )  # fmt: skip
        b_v = _load_values(p_v, p_padding, block, strides_v[2], M, TAIL, True, HAS_PADDING, VALUE_WIDTH, UPCAST)
        b_m, b_l, b_o = _online_softmax(b_m, b_l, b_o, b_s, b_v, scale)
    first_row = (image.to(tl.int64) * heads + head) * N
    p_o += _head_offset(image, head, strides_o)
    _finish_rows(
        b_m, b_l, b_o, b_q, o_rows, m_rows, p_k, p_v, p_o, p_lse + first_row, p_undone + first_row, p_padding,
        strides_k[2], strides_v[2], strides_o[2], M, scale, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
    )  # fmt: skip


@_jit
def _short_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_undone, p_seed, p_padding, strides_q, strides_k, strides_v, strides_o, stride_padding,
    lower, upper, fraction, scale, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of up to 256 keys: all scores of the row stay on chip, in blocks of 64 and a tail cut to what is left."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = (lower, upper, fraction)

    p_q += _head_offset(image, head, strides_q)
    b_q = _load_rows(p_q, o_rows, strides_q[2], m_rows, True, WIDTH, UPCAST)
    b_m = tl.full([TILE], float("-inf"), tl.float32)
    scores = ()
    if BLOCKS > 0:
        b_words = _words(k1, k2, tl.arange(0, 64)[None, :])
        for block in tl.static_range(BLOCKS):
            b_s = _kept_scores(
                b_q, b_words, k1, k2, block, p_k, p_padding, strides_k[2], M, limits,
                64, HAS_PADDING, HAS_PADDING, WIDTH, UPCAST,
            )  # fmt: skip
            b_m = tl.maximum(b_m, tl.max(b_s, 1) * scale)
            scores = scores + (b_s,)
    if TAIL > 0:
        b_words = _words(k1, k2, tl.arange(0, TAIL)[None, :])
        b_s = _kept_scores(
            b_q, b_words, k1, k2, BLOCKS, p_k, p_padding, strides_k[2], M, limits,
            TAIL, True, HAS_PADDING, WIDTH, UPCAST,
        )  # fmt: skip
        b_m = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        scores = scores + (b_s,)
    # a row that has kept nothing must not compute -inf - -inf
    b_base = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.zeros([TILE], tl.float32)
    b_o = tl.zeros([TILE, VALUE_WIDTH[1]], tl.float32)
    for block in tl.static_range(BLOCKS):
        b_v = _load_values(p_v, p_padding, block, strides_v[2], M, 64, HAS_PADDING, HAS_PADDING, VALUE_WIDTH, UPCAST)
        b_p = tl.exp2(scores[block] * scale - b_base[:, None])
        b_l += tl.sum(b_p, 1)
        b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if TAIL > 0:
        b_v = _load_values(p_v, p_padding, BLOCKS, strides_v[2], M, TAIL, True, HAS_PADDING, VALUE_WIDTH, UPCAST)
        b_p = tl.exp2(scores[BLOCKS] * scale - b_base[:, None])
        b_l += tl.sum(b_p, 1)
        b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    first_row = (image.to(tl.int64) * heads + head) * N
    p_o += _head_offset(image, head, strides_o)
    _finish_rows(
        b_m, b_l, b_o, b_q, o_rows, m_rows, p_k, p_v, p_o, p_lse + first_row, p_undone + first_row, p_padding,
        strides_k[2], strides_v[2], strides_o[2], M, scale, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
    )  # fmt: skip


# --- backward ---------------------------------------------------------------------------------------------------------


@_jit
def _load_statistics(p_lse, p_undone, o_rows, m_rows):
    # rows past the end get probability 0
    b_lse = tl.load(p_lse + o_rows, mask=m_rows, other=float("inf"))
    return b_lse, tl.load(p_undone + o_rows, mask=m_rows, other=0) != 0


@_jit
def _query_block(
    b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, block, p_k, p_v, p_padding, stride_k, stride_v,
    M, scale, limits, SIZE: tl.constexpr, MASKED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_keys = 64 * block + tl.arange(0, SIZE)
    m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
    # nothing is below the smallest integer: a row whose drop was undone drops nothing
    b_threshold = tl.where(m_undone[:, None], -(2**31), _thresholds(k1, k2, block, limits))
    m_gone = _is_dropped(b_words, block, b_threshold)
    if MASKED:
        m_gone = m_gone | ~m_keys[None, :]
    b_k = _load_rows(p_k, o_keys, stride_k, m_keys, MASKED, WIDTH, UPCAST)
    b_v = _load_rows(p_v, o_keys, stride_v, m_keys, MASKED, VALUE_WIDTH, UPCAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_p = tl.where(m_gone, 0.0, tl.exp2(b_s - b_lse[:, None]))
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return b_dq + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")


@_jit
def _query_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_undone, p_delta, p_seed, p_padding,
    strides_q, strides_k, strides_v, strides_o, strides_do, strides_dq, stride_padding,
    lower, upper, fraction, scale, scaling, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries, and for the next kernel delta, the sum of output times its gradient per row."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = (lower, upper, fraction)

    first_row = (image.to(tl.int64) * heads + head) * N
    b_lse, m_undone = _load_statistics(p_lse + first_row, p_undone + first_row, o_rows, m_rows)
    p_q += _head_offset(image, head, strides_q)
    p_o += _head_offset(image, head, strides_o)
    p_do += _head_offset(image, head, strides_do)
    b_q = _load_rows(p_q, o_rows, strides_q[2], m_rows, True, WIDTH, UPCAST)
    b_o = _load_rows(p_o, o_rows, strides_o[2], m_rows, True, VALUE_WIDTH, UPCAST)
    b_do = _load_rows(p_do, o_rows, strides_do[2], m_rows, True, VALUE_WIDTH, UPCAST)
    if HAS_PADDING:
        # a row without a gradient is that of a padded query, which may be NaN and must not be read
        m_silent = tl.max((b_do != 0).to(tl.int32), 1) == 0
        b_q = tl.where(m_silent[:, None], 0.0, b_q).to(b_q.dtype)
        b_o = tl.where(m_silent[:, None], 0.0, b_o).to(b_o.dtype)
        b_lse = tl.where(m_silent, float("inf"), b_lse)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + first_row + o_rows, b_delta, mask=m_rows)

    b_dq = tl.zeros([TILE, WIDTH[1]], tl.float32)
    b_words = tl.zeros([1 if SHARED else TILE, 64], tl.uint32)
    for block in range(M // 64):
        if block % 4 == 0:
            b_words = _words(k1, k2, (16 * block + tl.arange(0, 64))[None, :])
        b_dq = _query_block(
            b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, block, p_k, p_v, p_padding,
            strides_k[2], strides_v[2], M, scale, limits, 64, HAS_PADDING, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
        )  # fmt: skip
    if TAIL > 0:
        block = M // 64
        b_words = _words(k1, k2, (block // 4 * 64 + tl.arange(0, TAIL))[None, :])
        b_dq = _query_block(
            b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, block, p_k, p_v, p_padding,
            strides_k[2], strides_v[2], M, scale, limits, TAIL, True, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
        )  # fmt: skip
    p_dq += _head_offset(image, head, strides_dq)
    _store_rows(p_dq, o_rows, strides_dq[2], b_dq * scaling, m_rows, WIDTH)


@_jit
def _key_value_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse, p_undone, p_delta, p_seed, p_padding,
    strides_q, strides_k, strides_v, strides_do, strides_dk, strides_dv, stride_padding,
    lower, upper, fraction, scale, scaling, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values: a program owns one block of 64 keys, so nothing is added atomically."""
    o_keys, image, head = _program(M, 64, heads)
    block = tl.program_id(0) % tl.cdiv(M, 64)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
    p_q += _head_offset(image, head, strides_q)
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    p_do += _head_offset(image, head, strides_do)
    first_row = (image.to(tl.int64) * heads + head) * N
    o_words = (block // 4 * 64 + tl.arange(0, 64))[:, None]

    b_k = _load_rows(p_k, o_keys, strides_k[2], m_keys, True, WIDTH, UPCAST)
    b_v = _load_rows(p_v, o_keys, strides_v[2], m_keys, True, VALUE_WIDTH, UPCAST)
    b_dk = tl.zeros([64, WIDTH[1]], tl.float32)
    b_dv = tl.zeros([64, VALUE_WIDTH[1]], tl.float32)
    # tiles are [keys, queries] here: probabilities enter the products as they are, not transposed
    for start in range(0, N, TILE):
        o_rows = start + tl.arange(0, TILE)
        m_rows = o_rows < N
        b_q = _load_rows(p_q, o_rows, strides_q[2], m_rows, True, WIDTH, UPCAST)
        b_do = _load_rows(p_do, o_rows, strides_do[2], m_rows, True, VALUE_WIDTH, UPCAST)
        b_lse, m_undone = _load_statistics(p_lse + first_row, p_undone + first_row, o_rows, m_rows)
        b_delta = tl.load(p_delta + first_row + o_rows, mask=m_rows, other=0.0)
        if HAS_PADDING:
            m_silent = tl.max((b_do != 0).to(tl.int32), 1) == 0
            b_q = tl.where(m_silent[:, None], 0.0, b_q).to(b_q.dtype)
            b_lse = tl.where(m_silent, float("inf"), b_lse)
        k1, k2 = _row_pairs(p_seed, image, head, o_rows[None, :], SHARED)
        b_threshold = _thresholds(k1, k2, block, (lower, upper, fraction))
        b_threshold = tl.where(m_undone[None, :], -(2**31), b_threshold)
        m_gone = _is_dropped(_words(k1, k2, o_words), block, b_threshold)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
        b_p = tl.where(m_gone, 0.0, tl.exp2(b_s - b_lse[None, :]))
        b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision="ieee")
    # padded keys were read as zeros, whose probabilities are not
    b_dk = tl.where(m_keys[:, None], b_dk * scaling, 0.0)
    b_dv = tl.where(m_keys[:, None], b_dv, 0.0)
    p_dk += _head_offset(image, head, strides_dk)
    p_dv += _head_offset(image, head, strides_dv)
    _store_rows(p_dk, o_keys, strides_dk[2], b_dk, o_keys < M, WIDTH)
    _store_rows(p_dv, o_keys, strides_dv[2], b_dv, o_keys < M, VALUE_WIDTH)


KERNELS = {
    "short": _short_kernel,
    "short_full": _short_kernel,
    "long": _long_kernel,
    "query": _query_kernel,
    "key_value": _key_value_kernel,
}


# --- launches ---------------------------------------------------------------------------------------------------------


def unit_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy if its last dimension is not dense; the kernels take any other stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _key_blocks(keys: int) -> tuple[int, int]:
    """How a row of keys is cut: into whole blocks of 64, and a tail tile of this side (0: none) for what is left."""
    blocks, tail = divmod(keys, 64)
    return blocks, _tile_side(tail) if tail else 0


def _common_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    padding: torch.Tensor | None,
    ratio: float,
    scaling: float,
    shared: bool,
) -> dict[str, Any]:
    """The kernel arguments that forward and backward share."""
    lower, upper, fraction = byte_thresholds(ratio)
    padding = None if padding is None else unit_columns(padding)
    width, value_width = query.shape[-1], value.shape[-1]
    return {
        "p_q": query,
        "p_k": key,
        "p_v": value,
        "p_seed": seed.contiguous(),
        "p_padding": padding,
        "strides_q": query.stride()[:3],
        "strides_k": key.stride()[:3],
        "strides_v": value.stride()[:3],
        "stride_padding": 0 if padding is None else padding.stride(0),
        "lower": lower,
        "upper": upper,
        "fraction": fraction,
        "scale": scaling * LOG2_E,
        "heads": query.shape[1],
        "N": query.shape[2],
        "M": key.shape[2],
        "SHARED": shared,
        "HAS_PADDING": padding is not None,
        "WIDTH": (width, _tile_side(width)),
        "VALUE_WIDTH": (value_width, _tile_side(value_width)),
        "UPCAST": _INTERPRETED and query.dtype == torch.bfloat16,
    }


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
    name, launch = launch_configuration(name, width, query.dtype, arguments["N"], capability, padded=padded)
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
    padding: torch.Tensor | None,
    ratio: float,
    scaling: float,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (unit_columns(tensor) for tensor in (query, key, value))
    output, lse, undone = _forward_outputs(query, key, value)
    arguments = _common_arguments(query, key, value, seed, padding, ratio, scaling, shared)
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
    padding: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    undone: torch.Tensor,
    ratio: float,
    scaling: float,
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = _backward_outputs(grad, query, key, value)
    grad, query, key, value = (unit_columns(tensor) for tensor in (grad, query, key, value))
    delta = torch.empty_like(lse)
    arguments = _common_arguments(query, key, value, seed, padding, ratio, scaling, shared)
    arguments |= {
        "p_do": grad,
        "p_lse": lse,
        "p_undone": undone,
        "p_delta": delta,
        "strides_do": grad.stride()[:3],
        "scaling": scaling,
    }
    query_side: dict[str, Any] = {"p_o": output, "p_dq": grads[0], "TAIL": _key_blocks(key.shape[2])[1]}
    query_side |= {"strides_o": output.stride()[:3], "strides_dq": grads[0].stride()[:3]}
    _launch("query", arguments | query_side)
    key_side: dict[str, Any] = {"p_dk": grads[1], "p_dv": grads[2]}
    key_side |= {"strides_dk": grads[1].stride()[:3], "strides_dv": grads[2].stride()[:3]}
    _launch("key_value", arguments | key_side)
    return grads


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


# --- custom operators -------------------------------------------------------------------------------------------------
#
# An operator is opaque to torch.compile, which takes its fake implementation for its shapes. Torch knows operators by
# name, and a second registration pulls the first from under its users. So the name carries this file's contents: the
# same code in a package and in a checkpoint shares one operator, another release has its own.


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.constants = inputs[5:]


def _differentiate(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return *grads, None, None, None, None, None


def _register(name: str, function: Any, fake: Any, tensors: str, differentiate: Any = None) -> Any:
    """The operator `name` of this file, registered unless it is; its arguments are `tensors` and the constants."""
    name = f"{name}_{zlib.crc32(Path(__file__).read_bytes()):08x}"
    if not hasattr(torch.ops.hf_dropkey, name):
        operator = torch.library.custom_op(
            f"hf_dropkey::{name}",
            function,
            mutates_args=(),
            schema=f"({tensors}, float ratio, float scaling, bool shared) -> (Tensor, Tensor, Tensor)",
        )
        operator.register_fake(fake)
        if differentiate is not None:
            operator.register_autograd(differentiate, setup_context=_save_for_backward)
    return getattr(torch.ops.hf_dropkey, name).default


_QKV = "Tensor query, Tensor key, Tensor value, Tensor seed, Tensor? padding"
_attention = _register("attention", _forward, _forward_outputs, _QKV, _differentiate)
_attention_backward = _register(
    "attention_backward",
    _backward,
    _backward_outputs,
    f"Tensor grad, {_QKV}, Tensor output, Tensor lse, Tensor undone",
)


# --- the public function ----------------------------------------------------------------------------------------------


def triton_is_available(device: torch.device | None = None) -> bool:
    """Whether the kernels can run: on `device`, or on any device of this machine."""
    if triton is None:
        return False
    if _INTERPRETED:
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
    """Raises unless the kernels can do exactly what is asked for."""
    if triton is None:
        raise ImportError("The fused attention needs Triton: run `pip install triton`, or use the backend 'sdpa'.")
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
    if tuple(seed.shape) != (2,) or seed.dtype != torch.int32:
        raise ValueError(
            f"`seed` must be int32 of shape (2,), got {seed.dtype} of shape {tuple(seed.shape)}. Take it from "
            "`draw_seed`."
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
    ratio: float,
    *,
    scaling: float | None = None,
    pattern: str = "score",
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with DropKey in one kernel, differentiable, without a stored mask.

    The scores that `dropkey.dropped_scores` names for the seed are left out of the softmax, under the rule of
    `dropkey.protect_rows`. The backward pass is deterministic.

    Args:
        query: `[B, H, N, D]` in float16, bfloat16 or float32, any strides, D up to 128.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`, Dv up to 128.
        seed: int32 `[2]` (`dropkey.draw_seed`) on the same device; read by the kernels, never by the host.
        ratio: Drop ratio in [0, 1).
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
    check_ratio(ratio)
    _check(query, key, value, seed, pattern, padding)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not scaling > 0:
        raise ValueError(f"`scaling` must be above 0, got {scaling}. Negate the queries for a negative factor.")
    return _attention(query, key, value, seed, padding, float(ratio), scaling, pattern == "key")[0]
