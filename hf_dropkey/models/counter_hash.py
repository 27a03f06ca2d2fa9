"""The random numbers behind DropKey: a hash of (seed, image, head, query, key) that decides whether a score is dropped.

Shapes are `B` images, `H` heads, `N` queries, `M` keys. All integers are 32-bit and wrap:

1.  `mix` is the lowbias32 finaliser. `step` turns a pair of words and an index into a new pair. A row of scores gets
    its pair (k1, k2) by three steps from the seed: image, head, query.
2.  Word w of a row hashes (k1, w) with k2 folded in between the two multiplications. It serves four keys: with
    w = 64 g + l, byte j of the word (j = 0 is the lowest) belongs to key 256 g + 64 j + l.
3.  A key is dropped if its byte is below a threshold. The ratio r rarely is a multiple of 1/256, so each (row, block of
    64 keys) takes floor(256 r) or that plus one, chosen by a hash of its own with the probability that makes the
    expected drop fraction exactly r (to 2^-40).

Nothing depends on N, M, the dtype, or how a batch is cut into heads, so every backend drops the same scores for a seed.
The package's `reference.py` states points 1 to 3 again in plain Python integers; tests hold every backend to it.

Results come as bool (True = dropped) or as a float bias to add to scores (-inf = dropped, else 0). On a CPU in eager mode
both are made by `drop_bias_of_rows`, which works in place on large blocks; elsewhere by `_dropped_blocks`, plain tensor
operations that a compiler fuses.

This file travels with checkpoints: it imports torch and the standard library only.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch


def _signed(value: int) -> int:
    """The 32-bit two's complement reading of an integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# multipliers of lowbias32 (C. Wellons, https://nullprogram.com/blog/2018/07/31/) and of the golden ratio sequence
MIX_1, MIX_2, GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B9)
# distinct odd offsets keep the pair (0, 0) with index 0 away from the fixed point mix(0) = 0
STEP_1, STEP_2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)
# the integers that masks are made as, and the bits of -inf, by dtype; others are converted from float32
BITS = {
    torch.float32: (torch.int32, _signed(0xFF800000)),
    torch.bfloat16: (torch.int16, 0xFF80 - 2**16),
    torch.float16: (torch.int16, 0xFC00 - 2**16),
}
# words of a mask that are drawn at a time on a CPU: smaller chunks fit the cache, larger ones amortise call overhead
CHUNK_WORDS = 2**18
# What draws the rows of a mask on a CPU instead of the code below, with the same bits, if anything: takes a `RowState`, the
# ratio and where to write, integers `[rows, M]` for the bits of floats, and those of -inf. And what hashes their pairs
# there: takes the arguments of `row_keys`. Set by the package's `enable_fast_masks` alone; a checkpoint's copy of this file
# has no hand in it.
FAST_ROWS: Callable[["RowState", float, torch.Tensor, int], None] | None = None
FAST_KEYS: Callable[[torch.Tensor, int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None


class _Numbers(NamedTuple):
    """The numbers that the hash works with."""

    sixteen: Any = 16
    low_16: Any = 0xFFFF
    mix_1: Any = MIX_1
    fifteen: Any = 15
    low_17: Any = 0x1FFFF
    mix_2: Any = MIX_2
    golden: Any = GOLDEN
    step_1: Any = STEP_1
    step_2: Any = STEP_2
    top_bits: Any = _signed(0x80808080)


def _numbers(device: torch.device) -> _Numbers:
    """The numbers as integers, or in eager mode on a CPU as 0-d tensors, which halve the overhead of small operations."""
    if draws_in_place(device):
        return _Numbers(*torch.tensor(_Numbers(), dtype=torch.int32, device=device).unbind())
    return _Numbers()


def under_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, ...) is running, for which in-place code has no rule."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def draws_in_place(device: torch.device) -> bool:
    """Whether masks are drawn by the in-place code: in eager mode on a CPU."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and not under_transform()


def draw_seed(device: torch.device) -> torch.Tensor:
    """Two random 32-bit words, int32 `[2]`, from torch's global generator of `device`.

    The global generator is what seeding, activation checkpointing and resumed training restore.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)


def _fold(x: torch.Tensor, numbers: _Numbers) -> torch.Tensor:
    """An int32 tensor with its upper half folded into the lower."""
    # the shift of a signed tensor is arithmetic; the mask makes it logical
    return x ^ ((x >> numbers.sixteen) & numbers.low_16)


def _mix(x: torch.Tensor, numbers: _Numbers, key: torch.Tensor | None = None) -> torch.Tensor:
    """lowbias32 of an int32 tensor, with `key` folded in between the multiplications."""
    x = _fold(x, numbers) * numbers.mix_1
    x = x ^ ((x >> numbers.fifteen) & numbers.low_17)
    if key is not None:
        x = x ^ key
    return _fold(x * numbers.mix_2, numbers)


def step(
    k1: torch.Tensor, k2: torch.Tensor, index: torch.Tensor, numbers: _Numbers | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of words that follows from a pair and an index; all int32, broadcastable to each other."""
    numbers = numbers or _numbers(k1.device)
    offset = index * numbers.golden
    k1 = _mix(k1 ^ (offset + numbers.step_1), numbers)
    return k1, _mix(k2 ^ (offset + numbers.step_2) ^ k1, numbers)


def row_keys(seed: torch.Tensor, images: int, heads: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs (k1, k2) of all rows, each int32 `[B, H, N, 1]`.

    Args:
        seed: int32 `[2]`; or `[B, 2]`, a seed for each image, which then is image 0 of its seed (`sample_masks`).
        images: `B`.
        heads: `H`.
        queries: `N`.
    """
    if FAST_KEYS is not None and draws_in_place(seed.device):
        return FAST_KEYS(seed, images, heads, queries)
    numbers = _numbers(seed.device)
    k1, k2 = seed.view(-1, 2, 1, 1, 1).unbind(1)
    for axis, size in enumerate((images if seed.ndim == 1 else 1, heads, queries)):
        shape = [1, 1, 1, 1]
        shape[axis] = size
        index = torch.arange(size, dtype=torch.int32, device=seed.device).view(shape)
        k1, k2 = step(k1, k2, index, numbers)
    return k1, k2


def row_words(k1: torch.Tensor, k2: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` words of each row, int32 `[B, H, N, count]`."""
    numbers = _numbers(k1.device)
    return _mix(k1 ^ (torch.arange(count, dtype=torch.int32, device=k1.device) * numbers.golden), numbers, k2)


class RatioTensor(NamedTuple):
    """A drop ratio as data, so that compiled code takes one graph for all ratios; see `DropKeyRatioMixin`."""

    # int32 [4] on the CPU: the three of `byte_thresholds`, and the bound of `shape_bound`
    thresholds: torch.Tensor
    # a row of more visible keys than this never loses them all (`rows_can_empty`): a power of two, so that nearly all
    # ratios share it
    longest_at_risk: int

    # a tuple's own comparison would ask a tensor for its truth
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RatioTensor) or self.longest_at_risk != other.longest_at_risk:
            return False
        return torch.equal(self.thresholds, other.thresholds)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((*self.thresholds.tolist(), self.longest_at_risk))


# a drop ratio in [0, 1) as a function of this package takes it
Ratio = float | RatioTensor


def byte_thresholds(ratio: float) -> tuple[int, int, int]:
    """How a ratio becomes thresholds for the signed comparison of a byte moved to the top of a word.

    Returns:
        The lower threshold, the upper threshold, and the signed 32-bit bound below which a block takes the upper one.
    """
    base = math.floor(256 * ratio)
    fraction = math.floor((256 * ratio - base) * 2**32) - 2**31
    # byte threshold t in 0..256 reads (t - 128) << 24; 256 ("all of them") saturates
    lower, upper = (min((t - 128) << 24, 2**31 - 1) for t in (base, base + 1))
    return lower, upper, fraction


def threshold_tensor(ratio: Ratio, device: torch.device) -> torch.Tensor:
    """`byte_thresholds` as int32 `[3]` on `device`."""
    if isinstance(ratio, RatioTensor):
        return ratio.thresholds[:3].to(device)
    return torch.tensor(byte_thresholds(ratio), dtype=torch.int32, device=device)


def dropped_by_byte(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: Ratio) -> torch.Tensor:
    """Independent decisions of rate `ratio` for the first `keys` keys of each row, bool `[B, H, N, M]`."""
    if k1.device.type == "cpu" and not under_transform():
        # there, floats are faster to make than bools
        return drop_bias_by_byte(k1, k2, keys, ratio) != 0
    return torch.cat(_dropped_blocks(k1, k2, keys, ratio), -1)


def drop_bias_by_byte(
    k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: Ratio, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`dropped_by_byte` as floats to add to scores: -inf where dropped, else 0, `[B, H, N, M]`."""
    if draws_in_place(k1.device) and not isinstance(ratio, RatioTensor):
        return drop_bias_of_rows(row_state(k1, k2, keys, ratio), keys, ratio, dtype)
    # joined after the choice of floats: compiled for a CPU, joined bools take thirty times as long
    parts = [torch.where(part, float("-inf"), 0.0) for part in _dropped_blocks(k1, k2, keys, ratio)]
    return torch.cat(parts, -1).to(dtype)


def _dropped_blocks(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: Ratio) -> list[torch.Tensor]:
    """The decisions of each block of 64 keys, bool `[B, H, N, 64]` (the last one may be narrower)."""
    lower: Any
    # numbers where they are known: a kernel takes them as arguments, a tensor would be copied to the device
    lower, upper, fraction = (
        threshold_tensor(ratio, k1.device).unbind() if isinstance(ratio, RatioTensor) else byte_thresholds(ratio)
    )
    threshold = torch.where(_dither(k1, k2, keys, _numbers(k1.device)) < fraction, upper, lower).to(torch.int32)
    words = row_words(k1, k2, _word_count(keys))
    parts = []
    for block in range(threshold.shape[-1]):
        lanes, byte = _lanes(block, keys)
        parts.append((words[..., lanes] << (24 - 8 * byte)) < threshold[..., block : block + 1])
    return parts


def _dither(k1: torch.Tensor, k2: torch.Tensor, keys: int, numbers: _Numbers) -> torch.Tensor:
    """The words that choose between the two thresholds, one for each block of 64 keys of a row."""
    blocks = torch.arange(-(-keys // 64), dtype=torch.int32, device=k1.device)
    return _mix(k1 * 3 ^ k2 ^ blocks * numbers.golden, numbers)


def _word_count(keys: int) -> int:
    return keys // 256 * 64 + min(keys % 256, 64)


def _lanes(block: int, keys: int) -> tuple[slice, int]:
    """Which words of a row decide a block of 64 keys, and with which of their bytes."""
    # one word serves keys 64 apart: the words of a group of 256 keys, then their four bytes in turn
    group, byte = divmod(block, 4)
    return slice(64 * group, 64 * group + min(64, keys - 64 * block)), byte


class RowState(NamedTuple):
    """What the decisions of each row are made from on a CPU: a few words, each int32 `[B, H, N, 1 or more]`."""

    # k1 with its upper half folded into the lower
    k1: torch.Tensor
    k2: torch.Tensor
    # those of the four blocks of each 256 keys; none, `[B, H, N, 0]`, if `FAST_ROWS` was set
    thresholds: torch.Tensor


def row_state(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float) -> RowState:
    """What `drop_bias_of_rows` takes, for tensors on a CPU."""
    numbers = _numbers(k1.device)
    if FAST_ROWS is not None:
        return RowState(_fold(k1, numbers), k2, k2.new_empty((*k2.shape[:-1], 0)))
    return RowState(_fold(k1, numbers), k2, _packed_thresholds(k1, k2, keys, ratio, numbers))


def _packed_thresholds(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float, numbers: _Numbers) -> torch.Tensor:
    """The thresholds of the blocks of each row, four to a word, int32 `[B, H, N, M / 256]`."""
    above = _dither(k1, k2, keys, numbers) < byte_thresholds(ratio)[2]
    # Bytes and thresholds are compared with their top bits flipped. With u = threshold modulo 128 and b7 the lower bits
    # of a byte, (u - 1) - (128 + b7) always borrows one from the byte above, which serves as its - 1, and its top bit
    # tells whether b7 < u. One int32 holds the thresholds of four blocks, the lowest byte first, as CPUs in use do.
    thresholds = above.view(torch.uint8) + math.floor(256 * ratio) % 128
    return torch.nn.functional.pad(thresholds, (0, -thresholds.shape[-1] % 4)).view(torch.int32).sub_(1)


def bias_integers(dtype: torch.dtype) -> torch.dtype:
    """The integers that `drop_bias_of_rows` draws a mask of `dtype` as."""
    return BITS.get(dtype, BITS[torch.float32])[0]


def drop_bias_of_rows(
    state: RowState,
    keys: int,
    ratio: float,
    dtype: torch.dtype = torch.float32,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """`drop_bias_by_byte` from what `row_state` returned for the same `keys` and `ratio`, in eager mode on a CPU.

    Passes over memory and calls are the cost there. So `CHUNK_WORDS` words are treated at a time, in place, the four
    bytes of a word are compared at once, and all bytes become floats by one clamp.

    Args:
        state: Of all rows, or of a part of them.
        keys: `M`.
        ratio: Drop ratio in [0, 1).
        dtype: Of the result. Half precision is drawn in 16 bits, which saves half of the passes over memory.
        memory: Where to write the result, uint8, enough of them for `B * H * N * M` of `bias_integers`. Default: fresh memory.
    """
    drawn = dtype if dtype in BITS else torch.float32
    shape, integers = state.k1.shape[:-1], bias_integers(dtype)
    count = math.prod(shape) * keys
    # the default device may be another one
    empty = torch.empty(count, dtype=integers, device="cpu") if memory is None else memory[: count * integers.itemsize]
    found = empty.view(integers).view(-1, keys)
    if FAST_ROWS is not None:
        FAST_ROWS(state, ratio, found, BITS[drawn][1])
    else:
        _fill_rows(state, ratio, found, BITS[drawn][1])
    return found.view(drawn).view(*shape, keys).to(dtype)


def _fill_rows(state: RowState, ratio: float, found: torch.Tensor, infinity: int) -> None:
    """Writes the mask of `drop_bias_of_rows` as the bits of floats; those of -inf are `infinity`."""
    keys = found.shape[-1]
    k1, k2, thresholds = (tensor.flatten(0, -2) for tensor in state)
    numbers, empty = _numbers(k1.device), partial(torch.empty, dtype=torch.int32, device=k1.device)
    if not thresholds.shape[-1]:
        # made while `FAST_ROWS` was set; a fold undoes itself
        thresholds = _packed_thresholds(_fold(k1, numbers), k2, keys, ratio, numbers)
    # the first fold of `_mix` distributes over the xor of row and column
    columns = torch.arange(_word_count(keys), dtype=torch.int32, device=k1.device)
    columns = _fold(columns * numbers.golden, numbers)
    step = max(1, CHUNK_WORDS // len(columns))
    # groups of 256 keys are treated together where there are many, and one by one where calls are few
    groups = keys // 256 if keys >= 2048 else 0
    # two buffers serve all chunks: the words, and what is made from them
    words, results = empty(2, min(step, len(k1)), len(columns))
    for row in range(0, len(k1), step):
        rows = slice(row, row + step)
        word, dropped, part = words[: len(k1) - row], results[: len(k1) - row], found[rows]
        _hash_chunk(word, dropped, k1[rows], k2[rows], columns, numbers)
        # the top bit of each byte is set, so that the subtraction below borrows within it alone; see `row_state`
        torch.bitwise_or(word, numbers.top_bits, out=dropped)
        if groups:
            whole = dropped[:, : 64 * groups].unflatten(1, (groups, 64))
            torch.sub(thresholds[rows, :groups, None], whole, out=whole)
        for group in range(groups, thresholds.shape[1]):
            lanes = dropped[:, 64 * group : 64 * group + 64]
            torch.sub(thresholds[rows, group : group + 1], lanes, out=lanes)
        # the byte's own top bit decides where the threshold does not: one from 128 on drops all bytes of the lower half
        _ = dropped.bitwise_and_(word) if ratio < 0.5 else dropped.bitwise_or_(word)
        # now each byte is 128 (dropped) or 0
        dropped &= numbers.top_bits
        # a multiplication moves the byte of each block of 64 keys to the sign of an integer of its own
        if groups:
            blocks = part[:, : 256 * groups].unflatten(1, (groups, 4, 64))
            for byte in range(4):
                torch.mul(*_byte_of(whole, byte, part.dtype), out=blocks[:, :, byte])
        for block in range(4 * groups, -(-keys // 64)):
            lanes, byte = _lanes(block, keys)
            torch.mul(*_byte_of(dropped[:, lanes], byte, part.dtype), out=part[:, 64 * block : 64 * block + 64])
        # a dropped key is an integer far below the one with the bits of -inf, and becomes it; a kept one, which holds
        # the bytes below its own, is not negative and becomes 0
        part.clamp_(infinity, 0)


def _byte_of(words: torch.Tensor, byte: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Integers of `dtype`, and a factor that moves a byte of the int32 `words` to their sign."""
    if dtype == torch.int32:
        return words, 1 << 24 - 8 * byte
    # one half of each word; the lowest comes first, as CPUs in use have it
    return words.view(torch.int16)[..., byte // 2 :: 2], 1 << 8 - 8 * (byte % 2)


def _hash_chunk(
    word: torch.Tensor,
    spare: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    columns: torch.Tensor,
    numbers: _Numbers,
) -> None:
    """`_mix` of some rows, without its first fold, written to `word`; `spare` is overwritten."""
    torch.bitwise_xor(k1, columns, out=word)
    word *= numbers.mix_1
    word ^= torch.bitwise_right_shift(word, numbers.fifteen, out=spare).bitwise_and_(numbers.low_17)
    word ^= k2
    word *= numbers.mix_2
    word ^= torch.bitwise_right_shift(word, numbers.sixteen, out=spare).bitwise_and_(numbers.low_16)
