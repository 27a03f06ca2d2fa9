"""How one attention module of a stock model comes to drop keys, and no other.

The way of a call: a stock attention module reads `self.config._attn_implementation`; its `config` is a
`DropKeyConfigView`, which answers "dropkey" while the module drops keys; Transformers' registry of attention functions has
`dropkey_interface` under that name; it brings masks and groups into one form and calls `dropkey_attention_forward` in
`models/attention.py` with the backend of the configuration behind the view, which is the configuration itself in every
other respect. So

* a module that drops nothing (inference, ratio 0) runs the untouched code of the model, whatever its backend;
* the model's configuration keeps its backend: masks arrive in that backend's form, saving writes nothing new, and
  `set_attn_implementation` moves the backend without losing DropKey;
* a model that shares the configuration, or the process, is not concerned.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from ..models.attention import dropkey_attention_forward
from ..models.dropkey import dropkey_is_active
from ..models.sample_masks import any_block, check_argument, enter_block, leave_block


DROPKEY_NAME = "dropkey"
# Swin's shifted windows hide keys by adding -100, which leaves them exp(-100) of their weight
EXCLUDED_BY_MASK = -50.0
# what an attention may ask for that changes the softmax itself
FOREIGN_FEATURES = ("softcap", "s_aux", "cache")
WINDOWED_PATTERNS = ("block", "cross")
BLOCK = "argument of a patched model"


class DropKeyConfigView:
    """The configuration of one attention module, which names DropKey as its backend while the module drops keys.

    Everything else is read from, and written to, the configuration itself.
    """

    def __init__(self, config: PreTrainedConfig, module: nn.Module):
        vars(self).update(dropkey_config=config, dropkey_module=module)

    @property
    def dropkey_backend(self) -> str:
        """The attention implementation of the model, which DropKey runs on."""
        return self.dropkey_config._attn_implementation or "eager"

    @property
    def _attn_implementation(self) -> str | None:
        active = dropkey_is_active(self.dropkey_module)
        return DROPKEY_NAME if active else self.dropkey_config._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        self.dropkey_config._attn_implementation = value

    def __getattr__(self, name: str) -> Any:
        # copying and pickling ask a bare object for special methods before it has a configuration
        if name.startswith("__") or name in ("dropkey_config", "dropkey_module"):
            raise AttributeError(name)
        return getattr(self.dropkey_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_attn_implementation":
            object.__setattr__(self, name, value)
        else:
            setattr(self.dropkey_config, name, value)


def dropkey_interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DropKey as an attention function of Transformers, called only while the module drops keys.

    Args:
        module: An attention module with a `DropKeyConfigView` and the attributes of `dropkey_attention_forward`.
        query: `[B, H, N, D]`.
        key: `[B, G, M, D]`, H a multiple of G (grouped queries).
        value: `[B, G, M, Dv]`.
        attention_mask: In the form of the model's backend.
        scaling: Factor on the scores, default `D ** -0.5`.
        dropout: Ratio of dropout on the attention weights.
        is_causal: As Transformers' sdpa function takes it.
        position_bias: Float biases on the scores, broadcastable to `[B, H, N, M]`; never read as padding.
        kwargs: What else a model passes on.

    Returns:
        The output `[B, N, H, Dv]`, and the weights after the drop `[B, H, N, M]` on `eager`, else None.

    Raises:
        ValueError: The attention asks for what DropKey is not defined for.
    """
    for name in FOREIGN_FEATURES:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} asks for `{name}`, which DropKey does not implement. Leave it out with "
                "apply_dropkey(..., exclude=...), or train without it."
            )
    backend = module.config.dropkey_backend
    groups = query.shape[1] // key.shape[1]
    # the pattern "token" leaves the rest to the plain function of the backend, which knows groups itself
    if groups > 1 and (module.dropkey_pattern != "token" or backend in ("eager", "flex_attention")):
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # learned queries come once for the whole batch, and every image draws its own keys
    query = query.expand(key.shape[0], -1, -1, -1)
    if attention_mask is None and backend not in ("eager", "flex_attention") and _is_causal(module, is_causal):
        attention_mask = causal_mask(query, key)
    if attention_mask is None or isinstance(attention_mask, torch.Tensor):
        attention_mask = combined_mask(attention_mask, position_bias, key.shape[2])
    elif position_bias is not None:
        raise ValueError(
            f"{type(module).__name__} adds position biases to a block mask, which DropKey does not combine. Use "
            "model.set_attn_implementation('sdpa')."
        )
    return dropkey_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        implementation=backend,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        grid=known_grid(module, key.shape[2]),
    )


def _is_causal(module: Any, is_causal: bool | None) -> bool:
    """Whether a missing mask means causal attention, by the rule of Transformers' sdpa function."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def causal_mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """bool `[1, 1, N, M]`: query i attends to keys 0 to i; None for a single query, which attends to all."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]


def combined_mask(
    attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None, keys: int
) -> torch.Tensor | None:
    """One mask from a mask and position biases, in which every hidden key has the lowest float."""
    if attention_mask is not None and attention_mask.is_floating_point():
        lowest = torch.finfo(attention_mask.dtype).min
        # a mask may be longer than the keys, for a cache that is not full
        attention_mask = attention_mask[..., :keys]
        attention_mask = attention_mask.masked_fill(attention_mask <= EXCLUDED_BY_MASK, lowest)
    if position_bias is None:
        return attention_mask
    lowest = torch.finfo(position_bias.dtype).min
    if attention_mask is None:
        return position_bias
    if attention_mask.is_floating_point():
        return (position_bias + attention_mask).clamp(min=lowest)
    visible = attention_mask.bool()
    return torch.where(visible[:, None, None] if visible.ndim == 2 else visible, position_bias, lowest)


class SeenPixels:
    """Size of the images that a model was last called with: a forward pre-hook of models that take them first.

    The patterns "block" and "cross" take the patch grid from it. The number of keys does not tell: 196 patches are 14 x 14
    of a square image, and also 7 x 28.

    Attributes:
        trained: Height and width of the last images in training mode, None before any; kept apart because gradient
            checkpointing computes layers again in the backward pass.
        evaluated: The same in eval mode.
    """

    def __init__(self) -> None:
        self.trained: tuple[int, int] | None = None
        self.evaluated: tuple[int, int] | None = None

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the size off `pixel_values` `[B, C, H, W]`.

        Raises:
            ValueError: The size changes between training steps under gradient checkpointing, where the backward pass of
                one step may compute layers again after the forward pass of the next.
        """
        pixels: Any = args[0] if args else kwargs.get("pixel_values")
        is_image = isinstance(pixels, torch.Tensor) and pixels.ndim == 4
        size = (pixels.shape[-2], pixels.shape[-1]) if is_image else None
        if not model.training:
            self.evaluated = size
            return
        if self.trained not in (None, size) and checkpoints_layers(model):
            raise ValueError(
                f"images of {size} pixels (height, width) after {self.trained} under gradient checkpointing: the patterns "
                "'block' and 'cross' need one size there. Train without checkpointing, at one size, or with the pattern "
                "'score', 'key' or 'token'."
            )
        self.trained = size

    def size(self, *, training: bool) -> tuple[int, int] | None:
        """Height and width for an attention in training mode or not; the model around it may be in eval mode."""
        return self.trained if training and self.trained is not None else self.evaluated


def take_sample_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of stock models: opens a block for the argument `sample_ids`, which the model never sees."""
    ids = kwargs.pop("sample_ids", None)
    if ids is None:
        return None
    check_argument(model)
    enter_block(ids, of=BLOCK)
    return args, kwargs


def leave_sample_ids(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook that closes the block, also after an error."""
    # mostly there is none, which compiled code is told by a guard
    if any_block():
        leave_block(of=BLOCK)


def has_windows(module: Any) -> bool:
    """Whether the batch of an attention is the windows of the first image, then those of the next (Swin, ViTDet, SAM)."""
    window = getattr(module.config, "window_size", None)
    return isinstance(window, int) and window > 0


def takes_pixels(model: nn.Module) -> bool:
    """Whether the first argument of a model is `pixel_values`."""
    return list(inspect.signature(type(model).forward).parameters)[1:2] == ["pixel_values"]


def checkpoints_layers(model: nn.Module) -> bool:
    """Whether layers of a model are computed again in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def known_grid(module: Any, keys: int) -> tuple[int, int] | None:
    """The patch grid behind the keys of a module, which the patterns "block" and "cross" need; else None.

    Known are the patches of square windows (Swin), and those of the images that the model was called with, behind at most
    a class token, a distillation token and the registers.

    Raises:
        ValueError: The keys are no such grid.
    """
    if module.dropkey_pattern not in WINDOWED_PATTERNS:
        return None
    config, seen = module.config, vars(module).get("dropkey_pixels")
    size = None if seen is None else seen.size(training=module.training)
    window, patch = getattr(config, "window_size", None), _pair(getattr(config, "patch_size", None))
    side = round(keys**0.5)
    if size is not None and isinstance(window, int) and side <= window and side**2 == keys:
        return side, side
    if size is not None and patch is not None:
        grid = size[0] // patch[0], size[1] // patch[1]
        if leading_tokens(config, keys, grid) is not None:
            return grid
    raise ValueError(
        f"The pattern {module.dropkey_pattern!r} needs to know the patch grid, but the {keys} keys of "
        f"{type(module).__name__} are not one of windows or of the images that the model was called with ({size} pixels) in "
        f"patches of {patch}. Use the pattern 'score', 'key' or 'token'."
    )


def leading_tokens(config: Any, keys: int, grid: tuple[int, int]) -> int | None:
    """How many of `keys` tokens stand in front of the patches of a grid (rows, columns); None if it is not behind them.

    A model puts at most a class token, a distillation token and its registers there.
    """
    leading = keys - grid[0] * grid[1]
    return leading if 0 <= leading <= 2 + (getattr(config, "num_register_tokens", 0) or 0) else None


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width from a number or a pair; None where it is neither."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


# functions are stateless, so a second import of this file may replace them
AttentionInterface.register(DROPKEY_NAME, dropkey_interface)
