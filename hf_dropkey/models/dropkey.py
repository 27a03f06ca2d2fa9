"""The mathematics of DropKey: which attention scores are dropped, the ratio of each layer, and the reference attention.

DropKey (Li et al., "DropKey for Vision Transformer", CVPR 2023, arXiv 2208.02646) removes random scores from the
softmax of self-attention, in training only. Shapes here are `B` images, `H` heads, `N` queries, `M` keys, `D` head width.

The decision for one score is a pure function of (seed, image, head, query, key). All integers are 32-bit and wrap:

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
from typing import Protocol, overload

import torch


PATTERNS = ("score", "key", "token", "block", "cross")
SCHEDULES = ("decreasing", "constant", "increasing")

# additive mask values at or below this are padding, anything above is a bias (half precision's minimum is -65504)
PADDING_THRESHOLD = -1e4


def _signed(value: int) -> int:
    """The 32-bit two's complement reading of an integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


# multipliers of lowbias32 (C. Wellons, https://nullprogram.com/blog/2018/07/31/) and of the golden ratio sequence
MIX_1, MIX_2, GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B9)
# distinct odd offsets keep the pair (0, 0) with index 0 away from the fixed point mix(0) = 0
STEP_1, STEP_2 = _signed(0x85EBCA6B), _signed(0xC2B2AE35)


class DropKeySite(Protocol):
    """An attention module as the backends see it; any module with these attributes is one."""

    training: bool
    # in [0, 1), a plain float that may be changed at any time
    dropkey_ratio: float
    # one of `PATTERNS`
    dropkey_pattern: str
    # side of a block or arm of a cross, in patches
    dropkey_window: int


# --- the ratio of each layer ------------------------------------------------------------------------------------------


def check_ratio(ratio: float, name: str = "dropkey_ratio") -> None:
    """Raises an error unless `ratio` is a number in [0, 1).

    Raises:
        TypeError: `ratio` is not a number.
        ValueError: `ratio` is NaN or outside [0, 1).
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"`{name}` must be a number in [0, 1), got {ratio!r}. Pass for example {name}=0.1.")
    if not 0 <= ratio < 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1), got {ratio!r}. 0 turns DropKey off; the paper uses 0.05 to 0.3."
        )


def check_choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Raises ValueError, listing `allowed`, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"Unknown `{name}` {value!r}. Known values: {', '.join(map(repr, allowed))}.")


def layer_ratios(depth: int, ratio: float, final_ratio: float = 0.0, schedule: str = "decreasing") -> list[float]:
    """The drop ratio of each of `depth` layers, first layer first.

    The paper finds that a linear decrease with depth works best (section 3.3) but does not print the formula, so both
    ends are explicit here.

    Args:
        depth: Number of regularised layers, at least 1.
        ratio: The largest ratio, in [0, 1): of the first layer if "decreasing", of the last if "increasing".
        final_ratio: The ratio at the other end of the ramp, in [0, ratio]. Unused if "constant".
        schedule: "decreasing", "constant" or "increasing".

    Returns:
        `depth` floats, linearly spaced; a single layer gets `ratio`.

    Raises:
        TypeError, ValueError: An argument is outside the range above.
    """
    check_ratio(ratio)
    check_ratio(final_ratio, "dropkey_final_ratio")
    check_choice(schedule, SCHEDULES, "dropkey_schedule")
    if depth < 1:
        raise ValueError(f"`depth` must be at least 1, got {depth!r}.")
    if schedule == "constant":
        return [float(ratio)] * depth
    if final_ratio > ratio:
        raise ValueError(
            f"`dropkey_final_ratio` ({final_ratio}) must not exceed `dropkey_ratio` ({ratio}), the largest ratio. "
            "Swap the two and choose the schedule 'increasing' to grow with depth."
        )
    weights = [layer / max(depth - 1, 1) for layer in range(depth)]
    # in this form both ends are exact
    ramp = [ratio * (1 - weight) + final_ratio * weight for weight in weights]
    return ramp if schedule == "decreasing" else ramp[::-1]


# --- which scores are dropped -----------------------------------------------------------------------------------------


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


def _words(k1: torch.Tensor, k2: torch.Tensor, count: int) -> torch.Tensor:
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


def _dropped_by_byte(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float) -> torch.Tensor:
    """Independent decisions of rate `ratio` for the first `keys` keys of each row, bool `[B, H, N, M]`."""
    if k1.device.type == "cpu" and not torch.compiler.is_compiling():
        return _bytes_in_cache(k1, k2, keys, ratio, -1) != 0
    lower, upper, fraction = byte_thresholds(ratio)
    threshold = torch.where(_dither(k1, k2, keys) < fraction, upper, lower).to(torch.int32)
    words = _words(k1, k2, _word_count(keys))
    parts = []
    for block in range(threshold.shape[-1]):
        lanes, byte = _lanes(block, keys)
        parts.append((words[..., lanes] << (24 - 8 * byte)) < threshold[..., block : block + 1])
    return torch.cat(parts, -1)


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


def _bytes_in_cache(k1: torch.Tensor, k2: torch.Tensor, keys: int, ratio: float, bits: int) -> torch.Tensor:
    """The same decisions as int32 words, `bits` where a key is dropped and 0 elsewhere, `[B, H, N, M]`.

    On a CPU memory traffic and comparisons are the cost. So a megabyte of words is treated at a time, in place, and a
    comparison is a subtraction whose sign is spread over the word.
    """
    _, _, fraction = byte_thresholds(ratio)
    threshold = (_dither(k1, k2, keys) < fraction).to(torch.int32) + math.floor(256 * ratio)
    shape = torch.broadcast_shapes(k1.shape, k2.shape)[:-1]
    k1, k2, threshold = (tensor.expand(*shape, -1).reshape(-1, tensor.shape[-1]) for tensor in (k1, k2, threshold))
    found = torch.empty(len(k1), keys, dtype=torch.int32)
    columns = torch.arange(_word_count(keys), dtype=torch.int32) * GOLDEN
    step = max(1, 2**18 // len(columns))
    scratch = torch.empty(min(step, len(k1)), len(columns), dtype=torch.int32)
    for row in range(0, len(k1), step):
        rows = slice(row, row + step)
        word = k1[rows] ^ columns
        _mix_in_place(word, k2[rows], scratch[: len(word)])
        # a signed comparison of bytes is one of unsigned bytes with their top bits flipped
        word ^= _signed(0x80808080)
        for block in range(threshold.shape[-1]):
            lanes, byte = _lanes(block, keys)
            part = torch.bitwise_right_shift(word[:, lanes], 8 * byte, out=found[rows, 64 * block : 64 * block + 64])
            part.bitwise_and_(255).sub_(threshold[rows, block : block + 1])
            part.bitwise_right_shift_(31).bitwise_and_(bits)
    return found.view(*shape, keys)


def _mix_in_place(x: torch.Tensor, key: torch.Tensor, scratch: torch.Tensor) -> None:
    """`_mix(x, key)` written over `x`."""
    x ^= torch.bitwise_right_shift(x, 16, out=scratch).bitwise_and_(0xFFFF)
    x *= MIX_1
    x ^= torch.bitwise_right_shift(x, 15, out=scratch).bitwise_and_(0x1FFFF)
    x ^= key
    x *= MIX_2
    x ^= torch.bitwise_right_shift(x, 16, out=scratch).bitwise_and_(0xFFFF)


def _offsets(pattern: str, window: int) -> list[tuple[int, int]]:
    """The (row, column) offsets from a centre that a block or a cross covers."""
    if pattern == "block":
        return [(row, column) for row in range(window) for column in range(window)]
    arm = range(-window, window + 1)
    return [(0, column) for column in arm] + [(row, 0) for row in arm if row]


def shape_centres(
    ratio: float, pattern: str, window: int, keys: int, grid: tuple[int, int] | None
) -> tuple[list[tuple[int, int]], int, tuple[int, int, int, int], tuple[int, int]]:
    """Where centres of blocks or crosses lie and how often: a patch is dropped if one of its possible centres is drawn.

    Every patch is covered by exactly as many possible centres as the shape has cells, because centres may lie outside
    the grid. With c cells and centres drawn at the rate 1 - (1 - ratio)^(1/c), a patch is then dropped with
    probability `ratio` exactly, overlaps and borders included. (DropBlock's own correction ignores overlaps.)

    Returns:
        The offsets (row, column) from a centre to the patches it covers; the signed 32-bit bound below which the word
        of a centre is drawn; the grid of centres as (rows above the patches, columns left of them, height, width),
        numbered row by row; and the patch grid.

    Raises:
        ValueError: The window or the grid does not fit.
    """
    rows, columns = patch_grid(keys, grid)
    check_window(window, (rows, columns))
    offsets = _offsets(pattern, window)
    rate = 1 - (1 - ratio) ** (1 / len(offsets))
    (above, left), (up, back) = ([edge(offset[axis] for offset in offsets) for axis in (0, 1)] for edge in (max, min))
    bounds = (above, left, rows + above - up, columns + left - back)
    return offsets, math.floor(rate * 2**32) - 2**31, bounds, (rows, columns)


def _dropped_by_shape(
    k1: torch.Tensor,
    k2: torch.Tensor,
    ratio: float,
    pattern: str,
    window: int,
    keys: int,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """Keys covered by random shapes (`shape_centres`), bool `[B, H, N, M]`; non-patch tokens never are."""
    offsets, bound, (above, left, height, width), (rows, columns) = shape_centres(ratio, pattern, window, keys, grid)
    centres = (_words(k1, k2, height * width) < bound).unflatten(-1, (height, width))
    dropped = torch.zeros((), dtype=torch.bool, device=k1.device)
    for dy, dx in offsets:
        dropped = dropped | centres[..., above - dy : above - dy + rows, left - dx : left - dx + columns]
    return torch.nn.functional.pad(dropped.flatten(-2), (keys - rows * columns, 0))


def patch_grid(keys: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The patch grid (rows, columns) behind `keys` tokens, of which any surplus are leading non-patch tokens.

    Without `grid`, the patches are taken as the largest square that fits, which suits a class token.

    Raises:
        ValueError: The grid has more patches than there are keys.
    """
    if grid is None:
        side = math.isqrt(keys)
        return side, side
    if grid[0] * grid[1] > keys:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} patches does not fit into {keys} keys.")
    return grid


def check_window(window: int, grid: tuple[int, int]) -> None:
    """Raises ValueError unless a block side or cross arm of `window` patches fits the grid (rows, columns)."""
    if not 1 <= window <= min(grid):
        raise ValueError(
            f"`dropkey_window` must lie between 1 and {min(grid)}, the shorter side of the {grid[0]} x {grid[1]} patch "
            f"grid, got {window!r}."
        )


def dropped_scores(
    seed: torch.Tensor,
    shape: tuple[int, int, int, int],
    ratio: float,
    *,
    pattern: str = "score",
    window: int = 3,
    grid: tuple[int, int] | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which scores DropKey drops, True = dropped, before the rule that a row keeps a key (`protect_rows`).

    Args:
        seed: int32 `[2]` (`draw_seed`), on the device of the result.
        shape: `(B, H, N, M)`.
        ratio: Drop ratio in [0, 1).
        pattern: "score": every score on its own (the paper). "key": the same keys for all queries of a head.
            "token": the same keys for all queries and heads of an image, exactly round(ratio * M) of them. "block" and
            "cross": for each row of scores, the patches under square or cross-shaped windows (paper section 4, DropKey-Block and
            DropKey-Cross), never a non-patch token; `ratio` is the fraction of patches.
        window: Side of a block, or length of each of the four arms of a cross, in patches.
        grid: Patch rows and columns; keys in front of the `rows * columns` patches are non-patch tokens.
        real: bool, broadcastable to `[B, H, N, M]`, False for padding; only "token" needs it, to count real keys alone.

    Returns:
        bool `[B, H, N, M]`; "key" returns `[B, H, 1, M]` and "token" `[B, 1, 1, M]`.

    Raises:
        ValueError: Unknown pattern, or a window or grid that does not fit.
    """
    check_choice(pattern, PATTERNS, "dropkey_pattern")
    images, heads, queries, keys = shape
    if pattern == "token":
        order, kept = token_order(seed, images, keys, ratio, real)
        return torch.ones_like(kept).scatter(-1, order, ~kept)[:, None, None, :]
    k1, k2 = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    if pattern in ("score", "key"):
        return _dropped_by_byte(k1, k2, keys, ratio)
    return _dropped_by_shape(k1, k2, ratio, pattern, window, keys, grid)


def drop_bias(seed: torch.Tensor, shape: tuple[int, int, int, int], ratio: float, pattern: str) -> torch.Tensor:
    """`dropped_scores` of the patterns "score" and "key" as float32 to add to scores: -inf where dropped, else 0.

    Returns:
        `[B, H, N, M]`, or `[B, H, 1, M]` for "key".
    """
    images, heads, queries, keys = shape
    k1, k2 = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    if k1.device.type == "cpu" and not torch.compiler.is_compiling():
        # the words are the bit patterns of the two floats
        return _bytes_in_cache(k1, k2, keys, ratio, _signed(0xFF800000)).view(torch.float32)
    return torch.where(_dropped_by_byte(k1, k2, keys, ratio), float("-inf"), 0.0)


def kept_tokens(keys: int, ratio: float) -> int:
    """How many of `keys` keys the pattern "token" keeps: all but round(ratio * keys), and at least one."""
    return max(1, keys - round(ratio * keys))


def token_order(
    seed: torch.Tensor, images: int, keys: int, ratio: float, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pattern "token" as a random order of the keys of each image: kept ones, then dropped ones, then padding.

    Args:
        seed: int32 `[2]`.
        images: `B`.
        keys: `M`.
        ratio: Drop ratio in [0, 1).
        real: bool, broadcastable to `[B, H, N, M]`, the same for all queries, False for padding. An image with R real keys keeps
            `kept_tokens(R, ratio)` of them.

    Returns:
        Key indices int64 `[B, M]`, and bool `[B, M]`: is the key at this place of the order kept? The first
        `kept_tokens(M, ratio)` places hold all kept keys of every image.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    word = _words(*row_keys(seed, images, 1, 1), keys)[:, 0, 0].long()
    place = torch.arange(keys, device=word.device)
    if real is None:
        return word.argsort(dim=-1, stable=True), (place < kept_tokens(keys, ratio)).expand(images, keys)
    real = padding_of(real, "pattern 'token'")
    real = real.expand(images, keys)
    count = real.sum(-1, keepdim=True)
    count = (count - (ratio * count.double()).round().long()).clamp(min=1)
    return (word + (~real).long() * 2**32).argsort(dim=-1, stable=True), place < count


def padding_of(real: torch.Tensor, asker: str) -> torch.Tensor:
    """What `real_keys` returns as bool `[B|1, M]`, for an `asker` that can only leave a key out for all queries.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    same = (real == real[:, :1, :1]).all()
    message = (
        f"The {asker} leaves a key out for all queries and heads of an image: expected padding, got a mask of shape "
        f"{tuple(real.shape)} that differs by query or head. Use the pattern 'score' with attn_implementation 'sdpa'."
    )
    if torch.compiler.is_compiling() or same.is_cuda:
        # without a wait for the device, or a break of the graph
        torch._assert_async(same, message)
    elif not same:
        raise ValueError(message)
    return real[:, 0, 0]


def keep_tokens(
    key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draws a seed and returns the keys and values that the pattern "token" keeps, and what is left of the mask.

    Nothing of the dropped keys remains, so attention over what is left is plain attention, on any backend.

    Args:
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        attention_mask: As `real_keys`, the same for all queries.
        ratio: Drop ratio in [0, 1).

    Returns:
        `[B, H, K, D]` and `[B, H, K, Dv]` with K = `kept_tokens(M, ratio)`, and None, or the mask of the kept keys in
        the form it came in.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    images, keys = key.shape[0], key.shape[2]
    order, kept = token_order(draw_seed(key.device), images, keys, ratio, real_keys(attention_mask))
    count = kept_tokens(keys, ratio)
    # in the order of the sequence, which is kinder to memory; places past an image's own count are masked
    order, place = order[:, :count].sort(-1)
    kept = kept[:, :count].gather(-1, place)
    if attention_mask is not None and attention_mask.is_floating_point():
        chosen = attention_mask.expand(images, -1, -1, -1).take_along_dim(order[:, None, None], -1)
        attention_mask = chosen.masked_fill(~kept[:, None, None], float("-inf"))
    elif attention_mask is not None:
        attention_mask = kept if attention_mask.ndim == 2 else kept[:, None, None]
    index = order[:, None, :, None]
    return key.take_along_dim(index, 2), value.take_along_dim(index, 2), attention_mask


# --- rules that hold on every backend ---------------------------------------------------------------------------------


@overload
def real_keys(attention_mask: None) -> None: ...


@overload
def real_keys(attention_mask: torch.Tensor) -> torch.Tensor: ...


@overload
def real_keys(attention_mask: torch.Tensor | None) -> torch.Tensor | None: ...


def real_keys(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which keys a mask leaves visible, as bool that broadcasts to `[B, H, N, M]`, or None if all are.

    Takes every form that Transformers hands to an attention function: None, bool (True = attend) or additive float in
    four dimensions, a padding mask `[B, M]` of bool or integers (non-zero = attend), or an additive float `[N, M]`.
    Additive values at or below -1e4 are padding; larger ones are biases.

    Raises:
        ValueError: The mask has another number of dimensions.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim not in (2, 4):
        raise ValueError(
            f"An attention mask must have 2 or 4 dimensions, got shape {tuple(attention_mask.shape)}. "
            "Pass [B, M] for padding or [B, H, N, M]."
        )
    if attention_mask.is_floating_point():
        real = attention_mask > PADDING_THRESHOLD
        return real[None, None] if real.ndim == 2 else real
    real = attention_mask.bool()
    return real[:, None, None, :] if real.ndim == 2 else real


def rows_can_empty(pattern: str, keys: int, ratio: float) -> bool:
    """Whether a row of `keys` visible keys could lose them all, for any seed that will ever be drawn.

    Independent drops empty a row with probability ratio ** keys. Below 2 ** -100 no run will meet one.
    """
    return pattern not in ("score", "key") or ratio**keys > 2.0**-100


def protect_rows(dropped: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The rule that a row never loses all its real keys: a row that would, drops none.

    Undoing the drop of the whole row changes the distribution least: no other rule that avoids empty rows is nearer to
    independent draws in total variation. Keeping the query's own key instead would be another regulariser.

    Args:
        dropped: bool, broadcastable to `[B, H, N, M]`, True = dropped.
        real: bool, broadcastable to the same, False = padding (`real_keys`).
    """
    gone = dropped if real is None else dropped | ~real
    return dropped & ~gone.all(-1, keepdim=True)


# --- the reference ----------------------------------------------------------------------------------------------------


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropped: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention with DropKey, row by row as in the paper: the oracle that every backend is tested against.

    A dropped or padded key is left out of the sum, so nothing is masked, rescaled or approximated. Any dtype, any
    device, differentiable; slow by design.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        dropped: bool, broadcastable to `[B, H, N, M]`; `protect_rows` is applied here.
        attention_mask: As `real_keys`; additive values above -1e4 are added to the scores.
        scaling: Factor on the scores, default `D ** -0.5`.

    Returns:
        `[B, H, N, Dv]`. A row without a single real key is zero.
    """
    shape = (*query.shape[:3], key.shape[2])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    real = real_keys(attention_mask)
    kept = torch.ones(shape, dtype=torch.bool, device=query.device) if real is None else real.expand(shape)
    if dropped is not None:
        kept = kept & ~protect_rows(dropped.expand(shape), real)
    bias = attention_mask if attention_mask is not None and attention_mask.is_floating_point() else None
    images = []
    for image in range(shape[0]):
        heads = []
        for head in range(shape[1]):
            rows = []
            for row in range(shape[2]):
                chosen = kept[image, head, row]
                scores = key[image, head, chosen] @ query[image, head, row] * scaling
                if bias is not None:
                    scores = scores + bias.expand(shape)[image, head, row, chosen]
                weights = scores.exp() if not len(scores) else (scores - scores.max()).exp()
                weights = weights / weights.sum()
                rows.append(weights @ value[image, head, chosen])
            heads.append(torch.stack(rows))
        images.append(torch.stack(heads))
    return torch.stack(images)


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
