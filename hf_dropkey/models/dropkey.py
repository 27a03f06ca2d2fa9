"""The mathematics of DropKey: which attention scores are dropped, the ratio of each layer, and the operation itself.

DropKey (Li et al., "DropKey for Vision Transformer", CVPR 2023, arXiv 2208.02646) removes random scores from the
softmax of self-attention, in training only. In the paper's listing, with one independent draw for each score:

    scores = (query * D**-0.5) @ key.transpose(-2, -1)
    if training:
        scores = scores + bernoulli(full_like(scores, ratio)) * -1e12
    weights = scores.softmax(dim=-1)

`drop_keys` is that operation on given scores, and `DropKey` the module around it; `attention.py` has it inside fused
attention. Unlike the listing, a row never loses all its real keys, and half precision does not overflow.

Shapes here are `B` images, `H` heads, `N` queries, `M` keys, `D` head width. Words for masks, in all files:

    dropped         bool, True = DropKey drops this score
    real            bool, True = the attention mask lets this query see this key
    drop bias       float to add to scores: -inf where dropped, else 0
    additive mask   float to add to scores: the attention mask and the drop bias in one

The decision for one score is a pure function of (seed, image, head, query, key), in `patterns` and `counter_hash`, so
every backend drops the same scores for a seed.

This file travels with checkpoints: it imports torch and its neighbours only.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from .counter_hash import Ratio, RatioTensor, byte_thresholds
from .patterns import PATTERNS as PATTERNS
from .patterns import check_choice as check_choice
from .patterns import dropped_scores as dropped_scores
from .patterns import protect_rows, rows_can_empty, shape_bound
from .sample_masks import layer_number, seed_for


SCHEDULES = ("decreasing", "constant", "increasing")
# scores and additive mask values at or below this are padding, anything above is a bias (half precision's minimum is
# -65504)
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


def dropkey_is_active(module: DropKeySite) -> bool:
    """Whether this attention module drops keys now: in training, with a ratio above 0.

    An attribute `dropkey_mode` of "always" or "never" overrules training, for Monte-Carlo inference and for
    comparisons. A ratio of 0 in the configuration of the built model turns DropKey off in all its attentions.

    Raises:
        ValueError: The configuration has another ratio than the one that the model was built with.
    """
    mode = getattr(module, "dropkey_mode", "training")
    asked = _has_ratio(module) and (mode == "always" or (mode == "training" and module.training))
    return asked and not _turned_off(module)


def _turned_off(module: Any) -> bool:
    """Whether the configuration was set to a ratio of 0 after the model was built with another.

    Read at each call, because nothing tells a model that a field of its configuration has changed; compiled code guards
    the field and is compiled again. 0 is what every attention can follow alone. Another ratio is one of a schedule over
    all of them, so that it raises.
    """
    configured = getattr(module, "dropkey_configured", None)
    if not configured:
        return False
    config = getattr(module, "dropkey_owner_config", None)
    now = getattr(module.config if config is None else config, "dropkey_ratio", configured)
    if now == configured:
        return False
    if now == 0:
        return True
    raise ValueError(
        f"The configuration has dropkey_ratio {now!r}, and the model was built with {configured!r}: the ratios of its layers "
        "are made once. Call apply_dropkey(model), which takes the settings from the configuration, or build the model "
        "anew; 0 turns DropKey off at any time."
    )


def _has_ratio(module: DropKeySite) -> bool:
    # a compiler that reads the ratio itself takes it for a constant; see `DropKeyRatioMixin`
    if torch.compiler.is_compiling() and hasattr(module, "dropkey_ratio_tensor"):
        return module.dropkey_ratio_tensor is not None
    return module.dropkey_ratio > 0


def ratio_of(module: DropKeySite) -> Ratio:
    """The ratio of a module that drops keys, as data where compiled code reads it (`DropKeyRatioMixin`)."""
    if torch.compiler.is_compiling() and module.dropkey_pattern != "token":
        found: RatioTensor | None = getattr(module, "dropkey_ratio_tensor", None)
        if found is not None:
            return found
    return module.dropkey_ratio


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


# --- a ratio as data ---------------------------------------------------------------------------------------------------


class DropKeyRatioMixin:
    """For attention modules: keeps `dropkey_ratio` as data too, so that compiled code takes one graph for all ratios.

    A compiler takes a number that it finds on a module for a constant, and a model whose ratio changes with the layer or
    the step would be compiled again for each. The ratio stays a plain float for everybody else. Goes before `nn.Module`
    in the bases. The pattern "token" decides on shapes by the ratio, and is compiled for each.

    Attributes:
        dropkey_ratio_tensor: What compiled code reads in place of the ratio; None for the ratio 0.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dropkey_ratio":
            check_ratio(value)
        super().__setattr__(name, value)
        own = vars(self)
        if name in SITE_SETTINGS and own.keys() >= SITE_SETTINGS:
            own["dropkey_ratio_tensor"] = ratio_tensor(*(own[setting] for setting in sorted(SITE_SETTINGS)))


SITE_SETTINGS = {"dropkey_pattern", "dropkey_ratio", "dropkey_window"}


@cache
def _with_ratio_data(cls: type) -> type:
    """`cls` with `DropKeyRatioMixin` in front of it, under its own name."""

    def reduce(self: Any, protocol: Any) -> Any:
        # pickles name classes, and this one has no name of its own
        return _new_with_ratio_data, (cls,), *super(made, self).__reduce_ex__(protocol)[2:]

    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: Any = type(
        cls.__name__, (DropKeyRatioMixin, cls), {**body, "__reduce_ex__": reduce, "dropkey_plain_class": cls}
    )
    return made


def _new_with_ratio_data(cls: type) -> Any:
    made: Any = _with_ratio_data(cls)
    return made.__new__(made)


def hold_ratio_data(module: Any) -> None:
    """Gives a module of another package, which has its settings, what `DropKeyRatioMixin` gives ours.

    Its class becomes a subclass of the same name, as PyTorch's parametrisations do; `release_ratio_data` undoes it.
    """
    if not hasattr(module, "dropkey_ratio_tensor"):
        cls: Any = type(module)
        module.__class__ = _with_ratio_data(cls)
        # once more, which now makes the data
        module.dropkey_ratio = module.dropkey_ratio


def release_ratio_data(module: Any) -> None:
    """Undoes `hold_ratio_data`; does nothing to another module."""
    plain_class = getattr(type(module), "dropkey_plain_class", None)
    if plain_class is not None:
        vars(module).pop("dropkey_ratio_tensor", None)
        module.__class__ = plain_class


def ratio_tensor(pattern: str, ratio: float, window: int) -> RatioTensor | None:
    """A ratio as data for the functions of this package that take a `Ratio`, or None for 0."""
    if ratio == 0:
        return None
    bound = shape_bound(ratio, pattern, window) if pattern in ("block", "cross") else 0
    # not on the default device, which is "meta" while a checkpoint is read
    thresholds = torch.tensor([*byte_thresholds(ratio), bound], dtype=torch.int32, device="cpu")
    longest = 1
    while rows_can_empty("score", longest, ratio) or longest < LONGEST_AT_RISK:
        longest *= 2
    return RatioTensor(thresholds, longest)


# ratios up to 0.58 share this power of two
LONGEST_AT_RISK = 128


# --- the operation ----------------------------------------------------------------------------------------------------


def drop_keys(
    scores: torch.Tensor,
    ratio: float,
    training: bool = True,
    *,
    pattern: str = "score",
    window: int = 3,
    grid: tuple[int, int] | None = None,
    layer: int | None = None,
) -> torch.Tensor:
    """DropKey on attention scores, between the attention mask and the softmax.

    Args:
        scores: `[B, H, N, M]`, or `[B, N, M]` of a single head, of any float dtype, on any device. What is at or below
            -1e4 counts as hidden by an attention mask, so add that first.
        ratio: Drop ratio in [0, 1).
        training: Whether to drop anything; pass the module's `self.training`.
        pattern: What is dropped together: "score" (the paper), "key", "token", "block" or "cross"; see
            `dropped_scores`.
        window: Side of a block, or length of each arm of a cross, in patches.
        grid: Patch rows and columns behind the keys, for "block" and "cross"; default the largest square that fits.
        layer: Number of this attention in its model; needed within `sample_ids` only.

    Returns:
        Scores of the same shape and dtype: -inf where dropped, else unchanged. `scores` itself where nothing is dropped.
        Nothing is rescaled, since the softmax normalises over what is left. A row that would lose every key that is not
        hidden loses none.

    Raises:
        TypeError: `ratio` is not a number, or the scores are not floats.
        ValueError: A ratio outside [0, 1), another number of dimensions, an unknown pattern, or a window or grid that
            does not fit.
    """
    check_ratio(ratio, "ratio")
    check_choice(pattern, PATTERNS, "pattern")
    _check_scores(scores)
    if not training or ratio == 0:
        return scores
    site = SimpleNamespace(dropkey_layer=layer_number(layer))
    return _drop_keys(site, scores, ratio, pattern, window, grid)


def _check_scores(scores: torch.Tensor) -> None:
    if not scores.is_floating_point():
        raise TypeError(
            f"Attention scores must be floats, got {scores.dtype}. Drop keys before any rounding to integers."
        )
    if scores.ndim not in (3, 4):
        raise ValueError(
            f"Attention scores must be [B, H, N, M] or [B, N, M], got shape {tuple(scores.shape)}. Give each head its own "
            "place in the second dimension."
        )


def _drop_keys(
    site: Any, scores: torch.Tensor, ratio: Ratio, pattern: str, window: int, grid: tuple[int, int] | None
) -> torch.Tensor:
    """`drop_keys` while it drops; `site` is what `seed_for` takes."""
    if 0 in scores.shape:
        return scores
    by_head = scores if scores.ndim == 4 else scores[:, None]
    images, heads, queries, keys = by_head.shape
    real = by_head.detach() > PADDING_THRESHOLD
    # "token" counts the keys of an image: those that any of its queries sees
    counted = real.any(2, keepdim=True).any(1, keepdim=True) if pattern == "token" else real
    dropped = dropped_scores(
        seed_for(site, images, scores.device),
        (images, heads, queries, keys),
        ratio,
        pattern=pattern,
        window=window,
        grid=grid,
        real=counted,
    )
    return by_head.masked_fill(protect_rows(dropped, real), float("-inf")).view(scores.shape)


class DropKey(DropKeyRatioMixin, nn.Module):
    """`drop_keys` as a module, in the place where an attention would have its dropout, but before the softmax.

    Its settings are the attributes `dropkey_ratio`, `dropkey_pattern` and `dropkey_window`, which may be changed at any
    time, so the callbacks and context managers of this package find it in any model.

    Args:
        ratio: Drop ratio in [0, 1).
        pattern: What is dropped together: "score" (the paper), "key", "token", "block" or "cross".
        window: Side of a block, or length of each arm of a cross, in patches.

    Example:

        self.dropkey = DropKey(0.1)
        ...
        weights = self.dropkey(query @ key.mT * scale).softmax(-1)

    Raises:
        TypeError, ValueError: An argument is outside the range above.
    """

    def __init__(self, ratio: float = 0.1, pattern: str = "score", window: int = 3):
        super().__init__()
        check_choice(pattern, PATTERNS, "pattern")
        self.dropkey_pattern, self.dropkey_window = pattern, window
        self.dropkey_ratio = ratio

    def forward(self, scores: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Scores `[B, H, N, M]` or `[B, N, M]` to the same, -inf where dropped; `grid` as in `drop_keys`."""
        _check_scores(scores)
        if not dropkey_is_active(self):
            return scores
        return _drop_keys(self, scores, ratio_of(self), self.dropkey_pattern, self.dropkey_window, grid)

    def extra_repr(self) -> str:
        """The settings, as shown when a model is printed."""
        return f"ratio={self.dropkey_ratio}, pattern={self.dropkey_pattern!r}, window={self.dropkey_window}"
