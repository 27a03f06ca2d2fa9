"""Which scores each pattern drops, and the rule that a row keeps a key.

Shapes and words for masks are those of `dropkey`. A mask is a pure function of (seed, image, head, query, key).

This file travels with checkpoints: it imports torch and its neighbours only.
"""

import math
from typing import Any

import torch

from .counter_hash import Ratio, RatioTensor, drop_bias_by_byte, dropped_by_byte, row_keys, row_words


PATTERNS = ("score", "key", "token", "block", "cross")


def check_choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Raises ValueError, listing `allowed`, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"Unknown `{name}` {value!r}. Known values: {', '.join(map(repr, allowed))}.")


def _offsets(pattern: str, window: int) -> list[tuple[int, int]]:
    """The (row, column) offsets from a centre that a block or a cross covers."""
    if pattern == "block":
        return [(row, column) for row in range(window) for column in range(window)]
    arm = range(-window, window + 1)
    return [(0, column) for column in arm] + [(row, 0) for row in arm if row]


def shape_bound(ratio: float, pattern: str, window: int) -> int:
    """The signed 32-bit bound below which the word of a possible centre of a block or cross makes it one.

    Every patch is covered by exactly as many possible centres as the shape has cells, because centres may lie outside
    the grid. With c cells and centres drawn at the rate 1 - (1 - ratio)^(1/c), a patch is then dropped with
    probability `ratio` exactly, overlaps and borders included. (DropBlock's own correction ignores overlaps.)
    """
    rate = 1 - (1 - ratio) ** (1 / len(_offsets(pattern, window)))
    return math.floor(rate * 2**32) - 2**31


def shape_centres(
    pattern: str, window: int, keys: int, grid: tuple[int, int] | None
) -> tuple[list[tuple[int, int]], tuple[int, int, int, int], tuple[int, int]]:
    """Where centres of blocks or crosses lie: a patch is dropped if one of its possible centres is drawn.

    Returns:
        The offsets (row, column) from a centre to the patches it covers; the grid of centres as (rows above the patches,
        columns left of them, height, width), numbered row by row; and the patch grid.

    Raises:
        ValueError: The window or the grid does not fit.
    """
    rows, columns = patch_grid(keys, grid)
    check_window(window, (rows, columns))
    offsets = _offsets(pattern, window)
    (above, left), (up, back) = ([edge(offset[axis] for offset in offsets) for axis in (0, 1)] for edge in (max, min))
    return offsets, (above, left, rows + above - up, columns + left - back), (rows, columns)


def shape_bound_of(ratio: Ratio, pattern: str, window: int, device: torch.device) -> Any:
    """`shape_bound` of a ratio given as a number or as data: an integer, or int32 `[]` on `device`."""
    return ratio.thresholds[3].to(device) if isinstance(ratio, RatioTensor) else shape_bound(ratio, pattern, window)


def _dropped_by_shape(
    k1: torch.Tensor,
    k2: torch.Tensor,
    ratio: Ratio,
    pattern: str,
    window: int,
    keys: int,
    grid: tuple[int, int] | None,
) -> torch.Tensor:
    """Keys covered by random shapes (`shape_centres`), bool `[B, H, N, M]`; non-patch tokens never are."""
    offsets, (above, left, height, width), (rows, columns) = shape_centres(pattern, window, keys, grid)
    bound = shape_bound_of(ratio, pattern, window, k1.device)
    centres = (row_words(k1, k2, height * width) < bound).unflatten(-1, (height, width))
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
    ratio: Ratio,
    *,
    pattern: str = "score",
    window: int = 3,
    grid: tuple[int, int] | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which scores DropKey drops, True = dropped, before the rule that a row keeps a key (`protect_rows`).

    Args:
        seed: int32 `[2]` (`draw_seed`) or `[B, 2]` (`row_keys`), on the device of the result.
        shape: `(B, H, N, M)`.
        ratio: Drop ratio in [0, 1), a number; or as data (`ratio_tensor`), except for "token".
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
        if isinstance(ratio, RatioTensor):
            raise TypeError("The pattern 'token' counts keys by its ratio, which must be a number, got a tensor.")
        order, kept = token_order(seed, images, keys, ratio, real)
        return torch.ones_like(kept).scatter(-1, order, ~kept)[:, None, None, :]
    k1, k2 = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    if pattern in ("score", "key"):
        return dropped_by_byte(k1, k2, keys, ratio)
    return _dropped_by_shape(k1, k2, ratio, pattern, window, keys, grid)


def drop_bias(
    seed: torch.Tensor,
    shape: tuple[int, int, int, int],
    ratio: Ratio,
    pattern: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`dropped_scores` of the patterns "score" and "key" as floats to add to scores: -inf where dropped, else 0.

    Returns:
        `[B, H, N, M]`, or `[B, H, 1, M]` for "key".
    """
    images, heads, queries, keys = shape
    k1, k2 = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    return drop_bias_by_byte(k1, k2, keys, ratio, dtype)


def kept_tokens(keys: int, ratio: float) -> int:
    """How many of `keys` keys the pattern "token" keeps: all but round(ratio * keys), and at least one."""
    return max(1, keys - round(ratio * keys))


def token_order(
    seed: torch.Tensor,
    images: int,
    keys: int,
    ratio: float,
    real: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pattern "token" as a random order of the keys of each image: kept ones, then dropped ones, then padding.

    Args:
        seed: int32 `[2]` or `[B, 2]`.
        images: `B`.
        keys: `M`.
        ratio: Drop ratio in [0, 1).
        real: bool, broadcastable to `[B, H, N, M]`, the same for all queries, False for padding. An image with R real keys keeps
            `kept_tokens(R, ratio)` of them, and one that has none keeps one of its padding.
        attention_mask: What `real` was read from; see `padding_of`.

    Returns:
        Key indices int64 `[B, M]`, and bool `[B, M]`: is the key at this place of the order kept? The first
        `kept_tokens(M, ratio)` places hold all kept keys of every image.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    word = row_words(*row_keys(seed, images, 1, 1), keys)[:, 0, 0].long()
    place = torch.arange(keys, device=word.device)
    if real is None:
        return word.argsort(dim=-1, stable=True), (place < kept_tokens(keys, ratio)).expand(images, keys)
    real = padding_of(real, "pattern 'token'", attention_mask)
    real = real.expand(images, keys)
    count = real.sum(-1, keepdim=True)
    count = (count - (ratio * count.double()).round().long()).clamp(min=1)
    return (word + (~real).long() * 2**32).argsort(dim=-1, stable=True), place < count


def padding_of(real: torch.Tensor, asker: str, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """What `real_keys` returns as bool `[B|1, M]`, for an `asker` that can only hide a key from all queries.

    The host reads the mask to check it, and on a GPU waits for it. A mask object serves all layers of a forward pass, so
    it is checked once: `attention_mask`, which `real` was read from, remembers it. Compiled code checks on the device.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    if real.shape[1] == real.shape[2] == 1 or _was_checked(attention_mask):
        return real[:, 0, 0]
    same = (real == real[:, :1, :1]).all()
    message = (
        f"The {asker} leaves a key out for all queries and heads of an image: expected padding, got a mask of shape "
        f"{tuple(real.shape)} that differs by query or head. Use the pattern 'score' with attn_implementation 'sdpa'."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(same, message)
    elif not same:
        raise ValueError(message)
    elif attention_mask is not None and not attention_mask.is_inference():
        attention_mask._dropkey_checked = attention_mask._version  # type: ignore[attr-defined]  # a note of our own
    return real[:, 0, 0]


def _was_checked(attention_mask: torch.Tensor | None) -> bool:
    """Whether a mask was found to be padding before, and not written to since."""
    if attention_mask is None or torch.compiler.is_compiling() or attention_mask.is_inference():
        return False
    return getattr(attention_mask, "_dropkey_checked", None) == attention_mask._version


# --- the rule that a row keeps a key ----------------------------------------------------------------------------------


def rows_can_empty(pattern: str, keys: int, ratio: Ratio) -> bool:
    """Whether a row of `keys` visible keys could lose them all, for any seed that will ever be drawn.

    Independent drops empty a row with probability ratio ** keys. Below 2 ** -100 no run will meet one.
    """
    if pattern not in ("score", "key"):
        return True
    return keys <= ratio.longest_at_risk if isinstance(ratio, RatioTensor) else ratio**keys > 2.0**-100


def protect_rows(dropped: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The rule that a row never loses all its real keys: a row that would, drops none.

    Undoing the drop of the whole row changes the distribution least: no other rule that avoids empty rows is nearer to
    independent draws in total variation. Keeping the query's own key instead would be another regulariser.

    Args:
        dropped: bool, broadcastable to `[B, H, N, M]`, True = dropped.
        real: bool, broadcastable to the same, False = padding (`attention_mask.real_keys`).
    """
    gone = dropped if real is None else dropped | ~real
    return dropped & ~gone.all(-1, keepdim=True)


def protect_bias_rows(bias: torch.Tensor, pattern: str, ratio: Ratio) -> torch.Tensor:
    """`protect_rows` for what `drop_bias` returned, where no key is padding."""
    if not rows_can_empty(pattern, bias.shape[-1], ratio):
        return bias
    return bias.masked_fill(bias.amax(-1, keepdim=True) < 0, 0.0)
