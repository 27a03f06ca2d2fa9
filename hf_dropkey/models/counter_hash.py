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
`score_is_dropped` states points 1 to 3 in plain Python integers; tests hold every backend to it.

This file travels with checkpoints: it imports torch and the standard library only.
"""

import math

import torch


def _signed(value: int) -> int:
    """The 32-bit two's complement reading of an integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# multipliers of lowbias32 (C. Wellons, https://nullprogram.com/blog/2018/07/31/) and of the golden ratio sequence
MIX_1, MIX_2, GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B9)
# distinct odd offsets keep the pair (0, 0) with index 0 away from the fixed point mix(0) = 0
STEP_1, STEP_2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)
# the top bit of each byte, and the bits of float32's -inf
_TOP_BITS, _INFINITY = _signed(0x80808080), _signed(0xFF800000)


def draw_seed(device: torch.device) -> torch.Tensor:
    """Two random 32-bit words, int32 `[2]`, from torch's global generator of `device`.

    The global generator is what seeding, activation checkpointing and resumed training restore.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)


def _mix(x: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
    """lowbias32 of an int32 tensor, with `key` folded in between the multiplications."""
    # the shift of a signed tensor is arithmetic; the mask makes it logical
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    if key is not None:
        x = x ^ key
    x = x * MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def _step(k1: torch.Tensor, k2: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of words of the `index`-th child of (k1, k2)."""
    offset = index * GOLDEN
    k1 = _mix(k1 ^ (offset + STEP_1))
    return k1, _mix(k2 ^ (offset + STEP_2) ^ k1)


def row_keys(seed: torch.Tensor, images: int, heads: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs (k1, k2) of all rows, each int32 `[B, H, N, 1]`."""
    k1, k2 = seed.view(2, 1, 1, 1, 1).unbind()
    for axis, size in enumerate((images, heads, queries)):
        shape = [1, 1, 1, 1]
        shape[axis] = size
        k1, k2 = _step(k1, k2, torch.arange(size, dtype=torch.int32, device=seed.device).view(shape))
    return k1, k2


def row_words(k1: torch.Tensor, k2: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` words of each row, int32 `[B, H, N, count]`."""
    return _mix(k1 ^ (torch.arange(count, dtype=torch.int32, device=k1.device) * GOLDEN), k2)


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


def dropped_by_byte(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float) -> torch.Tensor:
    """Independent decisions of rate `ratio` for the first `keys` keys of each row, bool `[B, H, N, M]`."""
    if k1.device.type == "cpu":
        # there, floats are faster to make than bools
        return drop_bias_by_byte(k1, k2, keys, ratio) != 0
    return torch.cat(_dropped_blocks(k1, k2, keys, ratio), -1)


def drop_bias_by_byte(
    k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """`dropped_by_byte` as float32 to add to scores: -inf where dropped, else 0, `[B, H, N, M]`.

    On a CPU, in eager mode, `scratch` is where to write it: int32, `[at least B * H * N, M]`.
    """
    if k1.device.type == "cpu" and not torch.compiler.is_compiling():
        return _bytes_in_cache(k1, k2, keys, ratio, scratch)
    # joined after the choice of floats: compiled for a CPU, joined bools take thirty times as long
    return torch.cat([torch.where(part, float("-inf"), 0.0) for part in _dropped_blocks(k1, k2, keys, ratio)], -1)


def _dropped_blocks(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float) -> list[torch.Tensor]:
    """The decisions of each block of 64 keys, bool `[B, H, N, 64]` (the last one may be narrower)."""
    lower, upper, fraction = byte_thresholds(ratio)
    threshold = torch.where(_dither(k1, k2, keys) < fraction, upper, lower).to(torch.int32)
    words = row_words(k1, k2, _word_count(keys))
    parts = []
    for block in range(threshold.shape[-1]):
        lanes, byte = _lanes(block, keys)
        parts.append((words[..., lanes] << (24 - 8 * byte)) < threshold[..., block : block + 1])
    return parts


def _dither(k1: torch.Tensor, k2: torch.Tensor, keys: int) -> torch.Tensor:
    """The words that choose between the two thresholds, one for each block of 64 keys of a row."""
    blocks = torch.arange(-(-keys // 64), dtype=torch.int32, device=k1.device)
    return _mix(k1 * 3 ^ k2 ^ blocks * GOLDEN)


def _word_count(keys: int) -> int:
    return keys // 256 * 64 + min(keys % 256, 64)


def _lanes(block: int, keys: int) -> tuple[slice, int]:
    """Which words of a row decide a block of 64 keys, and with which of their bytes."""
    # one word serves keys 64 apart: the words of a group of 256 keys, then their four bytes in turn
    group, byte = divmod(block, 4)
    return slice(64 * group, 64 * group + min(64, keys - 64 * block)), byte


def _bytes_in_cache(
    k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float, scratch: torch.Tensor | None
) -> torch.Tensor:
    """The same decisions as float32 to add to scores: -inf where a key is dropped and 0 elsewhere, `[B, H, N, M]`.

    On a CPU memory traffic is the cost. So a megabyte of words is treated at a time, in place, and the four bytes of a
    word are compared at once.
    """
    _, _, fraction = byte_thresholds(ratio)
    base = math.floor(256 * ratio)
    blocks = -(-keys // 64)
    above = (_dither(k1, k2, keys) < fraction).to(torch.int32)
    shape = torch.broadcast_shapes(k1.shape, k2.shape)[:-1]
    k1, k2, above = (tensor.expand(*shape, -1).reshape(-1, tensor.shape[-1]) for tensor in (k1, k2, above))
    # Bytes and thresholds are compared with their top bits flipped. With u = threshold modulo 128 and b7 the lower bits
    # of a byte, (u - 1) - (128 + b7) never borrows from the byte above, and its top bit tells whether b7 < u.
    packed = torch.nn.functional.pad(above + base % 128, (0, -blocks % 4)).unflatten(-1, (-1, 4))
    packed = (packed << torch.arange(0, 32, 8, dtype=torch.int32)).sum(-1, dtype=torch.int32) - 1
    found = torch.empty(len(k1), keys, dtype=torch.int32) if scratch is None else scratch[: len(k1)]
    columns = torch.arange(_word_count(keys), dtype=torch.int32) * GOLDEN
    step = max(1, 2**18 // len(columns))
    words, results = torch.empty(2, min(step, len(k1)), len(columns), dtype=torch.int32)
    for row in range(0, len(k1), step):
        rows = slice(row, row + step)
        word, dropped = words[: len(k1) - row], results[: len(k1) - row]
        torch.bitwise_xor(k1[rows], columns, out=word)
        _mix_in_place(word, k2[rows], dropped)
        torch.bitwise_or(word, _TOP_BITS, out=dropped)
        for group in range(packed.shape[-1]):
            part = dropped[:, 64 * group : 64 * group + 64]
            torch.sub(packed[rows, group : group + 1], part, out=part)
        # a threshold from 128 on drops all bytes of the lower half
        _ = dropped.bitwise_and_(word) if base < 128 else dropped.bitwise_or_(word)
        for block in range(blocks):
            lanes, byte = _lanes(block, keys)
            part = found[rows, 64 * block : 64 * block + 64]
            # the top bit of the byte alone, then moved over the bits of -inf
            if byte < 3:
                torch.bitwise_and(dropped[:, lanes], 0x80 << 8 * byte, out=part).mul_(-(1 << 16 - 8 * byte))
            else:
                torch.bitwise_right_shift(dropped[:, lanes], 8, out=part).bitwise_and_(_INFINITY)
    return found.view(torch.float32).view(*shape, keys)


def _mix_in_place(x: torch.Tensor, key: torch.Tensor, scratch: torch.Tensor) -> None:
    """`_mix(x, key)` written over `x`."""
    x ^= torch.bitwise_right_shift(x, 16, out=scratch).bitwise_and_(0xFFFF)
    x *= MIX_1
    x ^= torch.bitwise_right_shift(x, 15, out=scratch).bitwise_and_(0x1FFFF)
    x ^= key
    x *= MIX_2
    x ^= torch.bitwise_right_shift(x, 16, out=scratch).bitwise_and_(0xFFFF)


def _mix_integer(x: int, key: int = 0) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15 ^ key) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def score_is_dropped(seed: tuple[int, int], image: int, head: int, query: int, key: int, ratio: float) -> bool:
    """The definition of the pattern "score", in plain integers: is this one score dropped? ("key" takes query 0.)

    Args:
        seed: Two 32-bit words, signed or not.
        image, head, query, key: Indices from 0.
        ratio: Drop ratio in [0, 1).
    """
    word = 0xFFFFFFFF
    golden, step_1, step_2 = GOLDEN & word, STEP_1 & word, STEP_2 & word
    k1, k2 = (part & word for part in seed)
    for index in (image, head, query):
        k1 = _mix_integer(k1 ^ (index * golden + step_1) & word)
        k2 = _mix_integer(k2 ^ (index * golden + step_2) & word ^ k1)
    group, byte, lane = key // 256, key % 256 // 64, key % 64
    bits = _mix_integer(k1 ^ ((64 * group + lane) * golden) & word, k2) >> 8 * byte & 255
    dither = _mix_integer((k1 * 3) & word ^ k2 ^ (key // 64 * golden) & word)
    base = math.floor(256 * ratio)
    fraction = math.floor((256 * ratio - base) * 2**32)
    # the signed comparison of the tensor code orders bytes and dithers with their top bit flipped
    return (bits ^ 128) < base + ((dither ^ 1 << 31) < fraction)
