"""The oracle: DropKey written once more, from its definition, with plain loops and Python integers.

Every backend is tested against it, so it borrows nothing from the code that it judges: neither the hash, nor how a mask
is read, nor the rule for rows. Slow by design. It stays at home, and travels with no checkpoint.

The definition, for B images, H heads, N queries and M keys; all words have 32 bits and all sums and products wrap:

*   mix(x, key) = lowbias32 (C. Wellons, https://nullprogram.com/blog/2018/07/31/) with `key` folded in before its second
    multiplication.
*   A row of scores has two words. They start as the two words of the seed, and three steps, with the image, the head and
    the query as index, each make (mix(k1 ^ (index * golden + a)), mix(k2 ^ (index * golden + b) ^ the new k1)).
*   Word w of a row is mix(k1 ^ w * golden, k2).
*   "score": key 256 g + 64 j + l takes byte j of word 64 g + l. It is dropped if the byte, read as signed, is below
    floor(256 ratio) - 128, or that plus one in a fraction of the blocks of 64 keys: where mix(3 k1 ^ k2 ^ block * golden),
    read as signed, is below 2^32 frac(256 ratio) - 2^31.
*   "key": the decisions of query 0 for all queries of the head.
*   "token": the keys of an image in the order of the signed words of image, head 0, query 0; the last round(ratio R) of
    the R real ones are dropped, but never all.
*   "block", "cross": word c belongs to centre c of the patch grid, widened so that each patch lies under equally many
    centres; a centre is drawn with the probability 1 - (1 - ratio)^(1 / cells), if its signed word is below 2^32 times
    that, minus 2^31; patches under a drawn centre are dropped.
*   A row whose real keys would all be dropped drops none (the patterns are drawn first, then this rule is applied).
*   Masks by sample: each image has a seed of its own and is image 0 of it. The two halves of the run's seed are the words
    that five steps start from, with the epoch, the low and the high half of the sample's id, the layer and, where there
    are windows, the window as index (without windows there are four).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch


WORD = 0xFFFFFFFF
GOLDEN, STEP_A, STEP_B = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def _mix(x: int, key: int = 0) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x ^= key
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _steps(seed: Sequence[int], *indices: int) -> tuple[int, int]:
    one, two = seed[0] & WORD, seed[1] & WORD
    for index in indices:
        one = _mix(one ^ (index * GOLDEN + STEP_A & WORD))
        two = _mix(two ^ (index * GOLDEN + STEP_B & WORD) ^ one)
    return one, two


def _row(seed: Sequence[int], image: int, head: int, query: int) -> tuple[int, int]:
    return _steps(seed, image, head, query)


def sample_seed(
    sample: int, *, layer: int, epoch: int = 0, seed: int = 0, window: int | None = None
) -> tuple[int, int]:
    """The seed of one sample in one attention under masks by sample, whose image 0 its mask is.

    Args:
        sample: Its id, of 64 bits, signed or not.
        layer: Number of the attention in its model.
        epoch: Number of the pass over the data.
        seed: Seed of the run, of 64 bits.
        window: Number of the window in the image, where the attention is over windows.
    """
    indices = [epoch, sample & WORD, sample >> 32 & WORD, layer, *([] if window is None else [window])]
    return _steps((seed & WORD, seed >> 32 & WORD), *indices)


def _word(row: tuple[int, int], index: int) -> int:
    return _mix(row[0] ^ (index * GOLDEN & WORD), row[1])


def _byte_is_below(row: tuple[int, int], key: int, ratio: float) -> bool:
    block = key // 64
    byte = _word(row, key // 256 * 64 + key % 64) >> 8 * (block % 4) & 0xFF
    signed_byte = byte - 256 if byte >= 128 else byte
    dither = _signed(_mix(3 * row[0] & WORD ^ row[1] ^ (block * GOLDEN & WORD)))
    whole = math.floor(256 * ratio)
    part = math.floor((256 * ratio - whole) * 2**32) - 2**31
    return signed_byte < whole - 128 + (1 if dither < part else 0)


def score_is_dropped(seed: Sequence[int], image: int, head: int, query: int, key: int, ratio: float) -> bool:
    """The pattern "score" for one score. ("key" takes query 0.)

    Args:
        seed: Two 32-bit words, signed or not.
        image, head, query, key: Indices from 0.
        ratio: Drop ratio in [0, 1).
    """
    return _byte_is_below(_row(seed, image, head, query), key, ratio)


def _cells(pattern: str, window: int) -> set[tuple[int, int]]:
    """Patches under a shape, relative to its centre: a square whose centre is its first corner, or a cross."""
    if pattern == "block":
        return {(down, right) for down in range(window) for right in range(window)}
    return {(0, step) for step in range(-window, window + 1)} | {(step, 0) for step in range(-window, window + 1)}


def _covered(
    row: tuple[int, int], keys: int, ratio: float, pattern: str, window: int, grid: tuple[int, int]
) -> list[bool]:
    cells = _cells(pattern, window)
    height, width = grid
    rate = 1 - (1 - ratio) ** (1 / len(cells))
    bound = math.floor(rate * 2**32) - 2**31
    tops = range(-max(down for down, _ in cells), height - min(down for down, _ in cells))
    lefts = range(-max(right for _, right in cells), width - min(right for _, right in cells))
    first_patch = keys - height * width
    dropped = [False] * keys
    for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        if _signed(_word(row, number)) >= bound:
            continue
        for down, right in cells:
            if 0 <= top + down < height and 0 <= left + right < width:
                dropped[first_patch + (top + down) * width + left + right] = True
    return dropped


def reference_mask(
    seed: Sequence[int] | Sequence[Sequence[int]],
    shape: tuple[int, int, int, int],
    ratio: float,
    *,
    pattern: str = "score",
    window: int = 3,
    grid: tuple[int, int] | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which scores DropKey drops, by the definition above, before the rule that a row keeps a key.

    Args:
        seed: Two 32-bit words; or such a pair for each image (`sample_seed`).
        shape: `(B, H, N, M)`.
        ratio: Drop ratio in [0, 1).
        pattern: "score", "key", "token", "block" or "cross".
        window: Side of a block, or length of each arm of a cross.
        grid: Patch rows and columns, default the largest square of the keys; keys in front are no patches.
        real: bool `[B, M]`, False for padding, which the pattern "token" does not count.

    Returns:
        bool `[B, H, N, M]`, True = dropped.
    """
    images, heads, queries, keys = shape
    side = math.isqrt(keys)
    dropped = torch.zeros(shape, dtype=torch.bool)
    for image in range(images):
        first: Any = seed[0]
        own: Any = seed if isinstance(first, int) else seed[image]
        place = image if isinstance(first, int) else 0
        if pattern == "token":
            words = [_signed(_word(_row(own, place, 0, 0), key)) for key in range(keys)]
            seen = [key for key in range(keys) if real is None or bool(real[image, key])]
            kept = sorted(seen, key=lambda key: (words[key], key))[: max(1, len(seen) - round(ratio * len(seen)))]
            dropped[image] = torch.tensor([key not in kept for key in range(keys)])
            continue
        for head in range(heads):
            for query in range(queries):
                row = _row(own, place, head, 0 if pattern == "key" else query)
                if pattern in ("block", "cross"):
                    found = _covered(row, keys, ratio, pattern, window, grid or (side, side))
                else:
                    found = [_byte_is_below(row, key, ratio) for key in range(keys)]
                dropped[image, head, query] = torch.tensor(found)
    return dropped


def _visible(attention_mask: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a mask lets every query see, bool `[B, H, N, M]`, and what it adds to the scores, of the same shape."""
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool), None
    mask = attention_mask
    if mask.is_floating_point():
        if mask.ndim == 2:
            mask = mask.view(1, 1, *mask.shape)
        # lower values are how libraries write "hidden": the lowest float16 is -65504
        return (mask.detach() > -10000.0).expand(shape), mask.expand(shape)
    if mask.ndim == 2:
        mask = mask.view(mask.shape[0], 1, 1, mask.shape[1])
    return (mask != 0).expand(shape), None


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropped: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention with DropKey, row by row as in the paper.

    A dropped or hidden key is left out of the sum, so nothing is masked, rescaled or approximated. Any float dtype, any
    device, differentiable.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        dropped: bool, broadcastable to `[B, H, N, M]`; the rule that a row keeps a key is applied here.
        attention_mask: None; bool (True = attend) or additive float that broadcasts to `[B, H, N, M]`, `[B, M]` of bool
            or integers, or additive float `[N, M]`. Additive values up to -1e4 hide a key, larger ones are added to the
            scores.
        scaling: Factor on the scores, default `D ** -0.5`.

    Returns:
        `[B, H, N, Dv]`. A row that may see no key is zero.
    """
    images, heads, queries, width = query.shape
    shape = (images, heads, queries, key.shape[2])
    scaling = width**-0.5 if scaling is None else scaling
    visible, bias = _visible(attention_mask, shape)
    gone = torch.zeros(shape, dtype=torch.bool) if dropped is None else dropped.expand(shape)
    output = []
    for image in range(images):
        for head in range(heads):
            for row in range(queries):
                place = image, head, row
                seen = [number for number in range(shape[3]) if bool(visible[place][number])]
                # a row that would lose all its keys drops none
                left = [number for number in seen if not bool(gone[place][number])] or seen
                if not left:
                    output.append(value.new_zeros(value.shape[-1]))
                    continue
                scores = key[image, head, left] @ query[place] * scaling
                if bias is not None:
                    scores = scores + bias[place][left]
                powers = (scores - scores.detach().max()).exp()
                output.append(powers / powers.sum() @ value[image, head, left])
    return torch.stack(output).view(images, heads, queries, -1)
