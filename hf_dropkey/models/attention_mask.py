"""From an attention mask in any form, and the settings of a module, to what its scores get.

Shapes and words for masks are those of `dropkey`. This file travels with checkpoints: it imports torch and its
neighbours only.
"""

from typing import NamedTuple, overload

import torch

from .counter_hash import Ratio
from .dropkey import PADDING_THRESHOLD, DropKeySite, ratio_of
from .patterns import (
    drop_bias,
    dropped_scores,
    kept_tokens,
    protect_bias_rows,
    protect_rows,
    rows_can_empty,
    token_order,
)


class Settings(NamedTuple):
    """Arguments of `dropped_scores` beside the seed and the shape."""

    ratio: Ratio
    pattern: str
    window: int
    grid: tuple[int, int] | None


def settings_of(module: DropKeySite, grid: tuple[int, int] | None) -> Settings:
    """The DropKey settings of an attention module, as they are now."""
    return Settings(ratio_of(module), module.dropkey_pattern, module.dropkey_window, grid)


# --- what an attention mask says --------------------------------------------------------------------------------------


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


def blind_rows(real: torch.Tensor) -> torch.Tensor:
    """The queries that may see no key at all, bool `[B|1, H|1, N|1, 1]`; their output is 0 on every backend."""
    return ~real.any(-1, keepdim=True)


def additive(attention_mask: torch.Tensor) -> torch.Tensor:
    """A mask of any form that `real_keys` takes as one to add to the scores: padding is -inf, biases stay."""
    real = real_keys(attention_mask)
    bias = attention_mask if attention_mask.is_floating_point() else torch.zeros((), device=real.device)
    return torch.where(real, bias, float("-inf"))


# --- with the drop ----------------------------------------------------------------------------------------------------


def protected_drops(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    """`dropped_scores` for `seed`, with the rule that a row keeps a real key.

    Returns:
        bool, broadcastable to `[B, H, N, M]`, True = dropped.
    """
    ratio, pattern, window, grid = settings
    real = real_keys(attention_mask)
    shape = (*query.shape[:3], key.shape[2])
    dropped = dropped_scores(seed, shape, ratio, pattern=pattern, window=window, grid=grid, real=real)
    if real is None and not rows_can_empty(pattern, shape[3], ratio):
        return dropped
    return protect_rows(dropped, real)


def is_drop_alone(attention_mask: torch.Tensor | None, settings: Settings) -> bool:
    """Whether the additive mask is nothing but independent drops, which have a shortcut (`drop_bias`)."""
    return attention_mask is None and settings.pattern in ("score", "key")


def additive_mask(
    seed: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Settings,
) -> torch.Tensor:
    """What to add to the scores so that dropped and padded keys leave the softmax, in the dtype of `query`.

    Returns:
        Broadcastable to `[B, H, N, M]`; the row of a query that may see no key is -inf throughout.
    """
    if is_drop_alone(attention_mask, settings):
        bias = drop_bias(seed, (*query.shape[:3], key.shape[2]), settings.ratio, settings.pattern, query.dtype)
        return protect_bias_rows(bias, settings.pattern, settings.ratio)
    gone = protected_drops(seed, query, key, attention_mask, settings)
    if attention_mask is not None:
        gone = gone | ~real_keys(attention_mask)
    if attention_mask is not None and attention_mask.is_floating_point():
        return attention_mask.to(query.dtype).masked_fill(gone, float("-inf"))
    zero, infinity = (torch.tensor(number, dtype=query.dtype, device=query.device) for number in (0, float("-inf")))
    return torch.where(gone, infinity, zero)


# --- the pattern "token" by gathering ---------------------------------------------------------------------------------


class KeptTokens(NamedTuple):
    """What the pattern "token" leaves of an attention's inputs."""

    # [B, H, K, D]
    key: torch.Tensor
    # [B, H, K, Dv]
    value: torch.Tensor
    # of the kept keys, in the form it came in, and in the dtype of the keys if additive; or None
    attention_mask: torch.Tensor | None
    # bool [B, 1, 1, 1]: images without a single real key, whose output is to be zeroed; or None
    blind: torch.Tensor | None


def keep_tokens(
    seed: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, ratio: float
) -> KeptTokens:
    """What the pattern "token" keeps for a seed.

    Nothing of the dropped keys remains, so attention over what is left is plain attention, on any backend.

    Args:
        seed: As `row_keys`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        attention_mask: As `real_keys`, hiding the same keys from all queries.
        ratio: Drop ratio in [0, 1).

    Returns:
        K = `kept_tokens(M, ratio)` keys of each image. An image without a real key shows one nevertheless, because some
        backends make NaN of a row without any; zero its output.

    Raises:
        ValueError: The mask hides different keys from different queries or heads.
    """
    images, keys = key.shape[0], key.shape[2]
    real = real_keys(attention_mask)
    order, kept = token_order(seed, images, keys, ratio, real, attention_mask)
    count = kept_tokens(keys, ratio)
    # in the order of the sequence, which is kinder to memory; places past an image's own count are masked
    order, place = order[:, :count].sort(-1)
    kept = kept[:, :count].gather(-1, place)
    blind = None
    if attention_mask is not None and real is not None:
        blind = ~real[:, 0, 0].any(-1).expand(images)[:, None]
        mask_of_kept = kept if attention_mask.ndim == 2 else kept[:, None, None]
        if attention_mask.is_floating_point():
            rows = attention_mask[None, None] if attention_mask.ndim == 2 else attention_mask
            chosen = rows.to(key.dtype).expand(images, -1, -1, -1).take_along_dim(order[:, None, None], -1)
            mask_of_kept = torch.where(kept[:, None, None], chosen, float("-inf"))
            mask_of_kept = mask_of_kept.masked_fill(blind[:, None, None], 0.0)
        attention_mask, blind = mask_of_kept, blind[:, None, None]
    rows_of_memory = (order + keys * torch.arange(images, device=order.device)[:, None]).flatten()

    def chosen_rows(tensor: torch.Tensor) -> torch.Tensor:
        # one row of memory holds all heads of a token, as models lay them out
        table = tensor.transpose(1, 2).reshape(images * keys, -1)
        return table.index_select(0, rows_of_memory).view(images, count, tensor.shape[1], -1).transpose(1, 2)

    return KeptTokens(chosen_rows(key), chosen_rows(value), attention_mask, blind)
