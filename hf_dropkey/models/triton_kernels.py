"""Device code of the fused attention: Triton kernels that compute the mask where they need it.

How they follow the definition in `counter_hash`: one tile of words [rows, 64] serves four blocks of 64 keys, which shift
another byte to the top of the word and compare it, signed, with the threshold of (row, block). Dropped scores become
-inf before the running maximum, so a large dropped score cannot underflow the kept ones. A row whose maximum is still
-inf at the end has lost all its keys: its tile is redone without dropping, the row takes that result, and its flag tells
the backward pass. Where the whole row fits on chip (M <= 256) it is one pass without a running maximum.

The backward pass is two kernels. The first walks the keys of its queries and draws as the forward pass does; the second
walks the queries of its keys, where it would hash a word for each score. So the first leaves it one bit for each score,
until the second has run, and it draws nothing.

Each kernel runs compiled on a GPU, or in Triton's interpreter on the CPU under TRITON_INTERPRET=1 (slow: for tests).
This file travels with checkpoints: it imports its neighbours and, if there is one, Triton.
"""

from __future__ import annotations

from typing import Any

from .counter_hash import GOLDEN, MIX_1, MIX_2, STEP_1, STEP_2
from .triton_launches import ROW_TILE


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


# --- the mask ---------------------------------------------------------------------------------------------------------
#
# In kernels b_ is a block in registers, p_ a pointer, o_ offsets and m_ a mask.


def _jit(function: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing, so that this module always imports."""
    if triton is None:
        return function
    # these change with the batch, and no value of them has better code than another
    return triton.jit(function, do_not_specialize=["heads", "N", "M"])


def _word(value: int) -> Any:
    """A 32-bit word as a constant that kernels may read from this module."""
    return value if triton is None else tl.constexpr(value & 0xFFFFFFFF)


_MIX_1, _MIX_2, _GOLDEN, _STEP_1, _STEP_2 = (_word(value) for value in (MIX_1, MIX_2, GOLDEN, STEP_1, STEP_2))
_ROW_TILE = _word(ROW_TILE)


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
    # one seed for the batch, or one for each image, which is image 0 of its seed (`sample_masks`): (pointer, stride)
    p_pair = p_seed[0] + image.to(tl.int64) * p_seed[1]
    k1 = tl.load(p_pair).to(tl.uint32, bitcast=True)
    k2 = tl.load(p_pair + 1).to(tl.uint32, bitcast=True)
    k1, k2 = _step(k1, k2, tl.where(p_seed[1] == 0, image, 0))
    k1, k2 = _step(k1, k2, head)
    # the pattern "key" takes the decisions of query 0 for all
    return _step(k1, k2, tl.zeros([1, 1], tl.int32) if SHARED else o_rows)


@_jit
def _limits(p_limits):
    # in memory, not among the arguments: compiled models take one graph for all ratios
    return tl.load(p_limits), tl.load(p_limits + 1), tl.load(p_limits + 2)


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
INTERPRETED = triton is not None and not isinstance(_is_dropped, triton.JITFunction)


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
    # reduced along two axes: Triton up to 3.7 cannot compile a reduction of one dimension here for 10.x
    if tl.max(tl.max(m_undone.to(tl.int32)[None, :], 1), 0) > 0:
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
    p_q, p_k, p_v, p_o, p_lse, p_undone, p_seed, p_limits, p_padding,
    strides_q, strides_k, strides_v, strides_o, stride_padding, scale, heads, N, M,
    SHARED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of any length: a loop over blocks of 64 keys with a running maximum."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = _limits(p_limits)

    p_q += _head_offset(image, head, strides_q)
    b_q = _load_rows(p_q, o_rows, strides_q[2], m_rows, True, WIDTH, UPCAST)
    b_m = tl.full([TILE], float("-inf"), tl.float32)
    b_l = tl.zeros([TILE], tl.float32)
    b_o = tl.zeros([TILE, tl.constexpr(VALUE_WIDTH[1])], tl.float32)
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
    p_q, p_k, p_v, p_o, p_lse, p_undone, p_seed, p_limits, p_padding,
    strides_q, strides_k, strides_v, strides_o, stride_padding, scale, heads, N, M,
    SHARED: tl.constexpr, HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of up to 256 keys: all scores of the row stay on chip, in blocks of 64 and a tail cut to what is left."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = _limits(p_limits)

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
    b_o = tl.zeros([TILE, tl.constexpr(VALUE_WIDTH[1])], tl.float32)
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
def _padded_rows(N):
    # whole tiles, so that the next kernel loads rows in the widest pieces; 64 bits: times blocks it passes 2^31
    return tl.cdiv(N, _ROW_TILE).to(tl.int64) * _ROW_TILE


@_jit
def _store_statistics(p_rows, b_lse, b_delta, o_rows, N, TILE: tl.constexpr):
    rows = _padded_rows(N)
    tl.store(p_rows + o_rows, b_lse)
    tl.store(p_rows + rows + o_rows, b_delta)
    # the memory behind the last tile, which larger tiles of the next kernel reach, holds rows of probability 0
    end = tl.program_id(0) % tl.cdiv(N, TILE) * TILE + TILE
    for start in range(tl.where(end < N, rows, end), rows, TILE):
        tl.store(p_rows + start + tl.arange(0, TILE), tl.full([TILE], float("inf"), tl.float32))
        tl.store(p_rows + rows + start + tl.arange(0, TILE), tl.zeros([TILE], tl.float32))


@_jit
def _store_gone(p_bits, m_gone, b_s, o_rows, SIZE: tl.constexpr):
    # A row of the block is two words, each the sum of the bits of 32 keys. Bits start from a zero made of the scores, which
    # the compiler finds out only after it has chosen layouts: so it sums them in the layout of the scores, where their words
    # were hashed, and does not hash them again in another one.
    o_keys = tl.arange(0, SIZE)
    b_zero = (b_s.to(tl.uint32, bitcast=True) & 1) >> 1
    b_bits = tl.where(m_gone, (tl.full([SIZE], 1, tl.uint32) << (o_keys % 32))[None, :], b_zero)
    if SIZE > 32:
        b_halves = tl.sum(tl.reshape(b_bits, [b_bits.shape[0], 2, 32]), 2)
        tl.store(p_bits + 2 * o_rows[:, None] + tl.arange(0, 2)[None, :], b_halves.to(tl.int32, bitcast=True))
    else:
        # the other half is of keys past the end, whose gradients are not stored
        tl.store(p_bits + 2 * o_rows, tl.sum(b_bits, 1).to(tl.int32, bitcast=True))


@_jit
def _load_gone(p_bits, o_rows):
    # both halves of a row as one number, and of them the word of 32 keys that holds a key's bit: [keys, queries]
    b_both = tl.load(p_bits + o_rows)
    o_keys = tl.arange(0, 64)
    b_half = tl.where((o_keys < 32)[:, None], b_both.to(tl.int32)[None, :], (b_both >> 32).to(tl.int32)[None, :])
    return b_half & (tl.full([64], 1, tl.int32) << (o_keys % 32))[:, None] != 0


@_jit
def _query_block(
    b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, o_rows, block, p_k, p_v, p_bits, p_padding,
    stride_k, stride_v, N, M, scale, limits, SHARED: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    HAS_PADDING: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_keys = 64 * block + tl.arange(0, SIZE)
    m_keys = _real_keys(p_padding, o_keys, M, HAS_PADDING)
    # nothing is below the smallest integer: a row whose drop was undone drops nothing
    b_threshold = tl.where(m_undone[:, None], -(2**31), _thresholds(k1, k2, block, limits))
    m_gone = _is_dropped(b_words, block, b_threshold)
    b_k = _load_rows(p_k, o_keys, stride_k, m_keys, MASKED, WIDTH, UPCAST)
    b_v = _load_rows(p_v, o_keys, stride_v, m_keys, MASKED, VALUE_WIDTH, UPCAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    if MASKED:
        m_gone = m_gone | ~m_keys[None, :]
    if not SHARED:
        _store_gone(p_bits + 2 * block * _padded_rows(N), m_gone, b_s, o_rows, SIZE)
    b_p = tl.where(m_gone, 0.0, tl.exp2(b_s - b_lse[:, None]))
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return b_dq + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")


@_jit
def _query_kernel(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_lse, p_undone, p_rows, p_bits, p_seed, p_limits, p_padding,
    strides_q, strides_k, strides_v, strides_o, strides_do, strides_dq, stride_padding,
    scale, scaling, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries; for the next kernel each row's normaliser and delta (output times its gradient), and
    which scores are gone.
    """
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    p_k += _head_offset(image, head, strides_k)
    p_v += _head_offset(image, head, strides_v)
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], SHARED)
    limits = _limits(p_limits)

    first_row = (image.to(tl.int64) * heads + head) * N
    p_rows += (image * heads + head) * 2 * _padded_rows(N)
    if not SHARED:
        p_bits += (image * heads + head) * 2 * tl.cdiv(M, 64) * _padded_rows(N)
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
    _store_statistics(p_rows, b_lse, b_delta, o_rows, N, TILE)

    b_dq = tl.zeros([TILE, tl.constexpr(WIDTH[1])], tl.float32)
    b_words = tl.zeros([1 if SHARED else TILE, 64], tl.uint32)
    for block in range(M // 64):
        if block % 4 == 0:
            b_words = _words(k1, k2, (16 * block + tl.arange(0, 64))[None, :])
        b_dq = _query_block(
            b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, o_rows, block, p_k, p_v, p_bits, p_padding,
            strides_k[2], strides_v[2], N, M, scale, limits,
            SHARED, 64, HAS_PADDING, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
        )  # fmt: skip
    if TAIL > 0:
        block = M // 64
        b_words = _words(k1, k2, (block // 4 * 64 + tl.arange(0, TAIL))[None, :])
        b_dq = _query_block(
            b_dq, b_q, b_do, b_lse, b_delta, m_undone, b_words, k1, k2, o_rows, block, p_k, p_v, p_bits, p_padding,
            strides_k[2], strides_v[2], N, M, scale, limits,
            SHARED, TAIL, True, HAS_PADDING, WIDTH, VALUE_WIDTH, UPCAST,
        )  # fmt: skip
    p_dq += _head_offset(image, head, strides_dq)
    _store_rows(p_dq, o_rows, strides_dq[2], b_dq * scaling, m_rows, WIDTH)


@_jit
def _key_value_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_undone, p_rows, p_bits, p_seed, p_limits, p_padding,
    strides_q, strides_k, strides_v, strides_do, strides_dk, strides_dv, stride_padding,
    scale, scaling, heads, N, M, SHARED: tl.constexpr, HAS_PADDING: tl.constexpr,
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
    p_rows += (image * heads + head) * 2 * _padded_rows(N)
    if not SHARED:
        p_bits += ((image * heads + head) * tl.cdiv(M, 64) + block) * _padded_rows(N)
    o_words = (block // 4 * 64 + tl.arange(0, 64))[:, None]
    limits = _limits(p_limits)

    b_k = _load_rows(p_k, o_keys, strides_k[2], m_keys, True, WIDTH, UPCAST)
    b_v = _load_rows(p_v, o_keys, strides_v[2], m_keys, True, VALUE_WIDTH, UPCAST)
    b_dk = tl.zeros([64, tl.constexpr(WIDTH[1])], tl.float32)
    b_dv = tl.zeros([64, tl.constexpr(VALUE_WIDTH[1])], tl.float32)
    # tiles are [keys, queries] here: probabilities enter the products as they are, not transposed
    for start in range(0, N, TILE):
        o_rows = start + tl.arange(0, TILE)
        m_rows = o_rows < N
        b_lse = tl.load(p_rows + o_rows)
        b_delta = tl.load(p_rows + _padded_rows(N) + o_rows)
        # silent rows, which must not be read, have an infinite normaliser, as have rows past the end
        m_read = b_lse != float("inf") if HAS_PADDING else m_rows
        b_q = _load_rows(p_q, o_rows, strides_q[2], m_read, True, WIDTH, UPCAST)
        b_do = _load_rows(p_do, o_rows, strides_do[2], m_rows, True, VALUE_WIDTH, UPCAST)
        if SHARED:
            k1, k2 = _row_pairs(p_seed, image, head, o_rows[None, :], SHARED)
            p_flags = p_undone + (image.to(tl.int64) * heads + head) * N
            m_undone = tl.load(p_flags + o_rows, mask=m_rows, other=0) != 0
            b_threshold = tl.where(m_undone[None, :], -(2**31), _thresholds(k1, k2, block, limits))
            m_gone = _is_dropped(_words(k1, k2, o_words), block, b_threshold)
        else:
            m_gone = _load_gone(p_bits, o_rows)
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


# --- the mask alone ---------------------------------------------------------------------------------------------------


@_jit
def _dropped_block(k1, k2, b_words, block, limits, p_padding, M, HAS_PADDING: tl.constexpr):
    o_keys = 64 * block + tl.arange(0, 64)
    m_dropped = _is_dropped(b_words, block, _thresholds(k1, k2, block, limits))
    return o_keys, m_dropped, _real_keys(p_padding, o_keys, M, HAS_PADDING)


@_jit
def draw_mask_kernel(
    p_mask, p_seed, p_limits, p_padding, stride_row, stride_padding, heads, N, M,
    HAS_PADDING: tl.constexpr, PROTECT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of the additive mask: -inf where a score is dropped or its key hidden, else 0."""
    o_rows, image, head = _program(N, TILE, heads)
    m_rows = o_rows < N
    if HAS_PADDING:
        p_padding += image.to(tl.int64) * stride_padding
    k1, k2 = _row_pairs(p_seed, image, head, o_rows[:, None], False)
    limits = _limits(p_limits)
    b_words = tl.zeros([TILE, 64], tl.uint32)
    # a row that would lose all its real keys drops none
    b_kept = tl.full([TILE], 0 if PROTECT else 1, tl.int32)
    if PROTECT:
        for block in range(tl.cdiv(M, 64)):
            if block % 4 == 0:
                b_words = _words(k1, k2, (16 * block + tl.arange(0, 64))[None, :])
            o_keys, m_dropped, m_real = _dropped_block(k1, k2, b_words, block, limits, p_padding, M, HAS_PADDING)
            b_kept = tl.maximum(b_kept, tl.max((m_real[None, :] & ~m_dropped).to(tl.int32), 1))
    p_rows = p_mask + ((image * heads + head).to(tl.int64) * N + o_rows) * stride_row
    for block in range(tl.cdiv(M, 64)):
        if block % 4 == 0:
            b_words = _words(k1, k2, (16 * block + tl.arange(0, 64))[None, :])
        o_keys, m_dropped, m_real = _dropped_block(k1, k2, b_words, block, limits, p_padding, M, HAS_PADDING)
        m_gone = (m_dropped & (b_kept > 0)[:, None]) | ~m_real[None, :]
        b_mask = tl.where(m_gone, float("-inf"), 0.0).to(p_mask.dtype.element_ty)
        tl.store(p_rows[:, None] + o_keys[None, :], b_mask, mask=m_rows[:, None] & (o_keys < M)[None, :])


KERNELS = {
    "short": _short_kernel,
    "short_full": _short_kernel,
    "long": _long_kernel,
    "query": _query_kernel,
    "key_value": _key_value_kernel,
}
