"""The mathematics of DropKey: which attention scores are dropped, the ratio of each layer, and the reference attention.

DropKey (Li et al., "DropKey for Vision Transformer", CVPR 2023, arXiv 2208.02646) removes random scores from the
softmax of self-attention, in training only. Shapes here are `B` images, `H` heads, `N` queries, `M` keys, `D` head width.

The decision for one score is a pure function of (seed, image, head, query, key), in `counter_hash`, so every backend drops the
same scores for a seed.

This file travels with checkpoints: it imports torch and its neighbours only.
"""

import math
from typing import Protocol, overload

import torch

from .counter_hash import draw_seed, drop_bias_by_byte, dropped_by_byte, row_keys, row_words


PATTERNS = ("score", "key", "token", "block", "cross")
SCHEDULES = ("decreasing", "constant", "increasing")

# additive mask values at or below this are padding, anything above is a bias (half precision's minimum is -65504)
PADDING_THRESHOLD = -1e4


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
        return dropped_by_byte(k1, k2, keys, ratio)
    return _dropped_by_shape(k1, k2, ratio, pattern, window, keys, grid)


def drop_bias(seed: torch.Tensor, shape: tuple[int, int, int, int], ratio: float, pattern: str) -> torch.Tensor:
    """`dropped_scores` of the patterns "score" and "key" as float32 to add to scores: -inf where dropped, else 0.

    Returns:
        `[B, H, N, M]`, or `[B, H, 1, M]` for "key".
    """
    images, heads, queries, keys = shape
    k1, k2 = row_keys(seed, images, heads, 1 if pattern == "key" else queries)
    return drop_bias_by_byte(k1, k2, keys, ratio)


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
    word = row_words(*row_keys(seed, images, 1, 1), keys)[:, 0, 0].long()
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
    rows = (order + keys * torch.arange(images, device=order.device)[:, None]).flatten()

    def chosen_rows(tensor: torch.Tensor) -> torch.Tensor:
        # one row of memory holds all heads of a token, as models lay them out
        table = tensor.transpose(1, 2).reshape(images * keys, -1)
        return table.index_select(0, rows).view(images, count, tensor.shape[1], -1).transpose(1, 2)

    return chosen_rows(key), chosen_rows(value), attention_mask


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


def protect_bias_rows(bias: torch.Tensor, pattern: str, ratio: float) -> torch.Tensor:
    """`protect_rows` for what `drop_bias` returned, which is written over, where no key is padding."""
    if rows_can_empty(pattern, bias.shape[-1], ratio):
        bias.masked_fill_(bias.amax(-1, keepdim=True) < 0, 0.0)
    return bias


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
