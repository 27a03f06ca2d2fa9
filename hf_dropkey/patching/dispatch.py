"""How one attention module of a stock model comes to drop keys, and no other.

Transformers' attention modules choose their function by `self.config._attn_implementation` at every call. A module that
drops keys holds a view of its configuration, which names DropKey while the module drops keys and is the configuration
itself in every other respect. So

* a module that drops nothing (inference, ratio 0) runs the untouched code of the model, whatever its backend;
* the model's configuration keeps its backend: masks arrive in that backend's form, saving writes nothing new, and
  `set_attn_implementation` moves the backend without losing DropKey;
* a model that shares the configuration, or the process, is not concerned.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from ..models.attention import dropkey_attention_forward
from ..models.dropkey import dropkey_is_active


DROPKEY_NAME = "dropkey"
# Swin's shifted windows hide keys by adding -100, which leaves them exp(-100) of their weight
EXCLUDED_BY_MASK = -50.0
# what an attention may ask for that changes the softmax itself
FOREIGN_FEATURES = ("softcap", "s_aux", "cache")


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


def known_grid(module: Any, keys: int) -> tuple[int, int] | None:
    """The patch grid behind the keys of a module, which the patterns "block" and "cross" need; else None.

    Known are the patches of square windows (Swin), and of images of the configured size behind at most a class token, a
    distillation token and the registers.

    Raises:
        ValueError: The keys are no such grid.
    """
    if module.dropkey_pattern not in ("block", "cross"):
        return None
    config = module.config
    if hasattr(config, "window_size") and round(keys**0.5) ** 2 == keys:
        return round(keys**0.5), round(keys**0.5)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is not None and patch is not None:
        (height, width), (rows, columns) = _pair(size), _pair(patch)
        grid = height // rows, width // columns
        if 0 <= keys - grid[0] * grid[1] <= 2 + (getattr(config, "num_register_tokens", 0) or 0):
            return grid
    raise ValueError(
        f"The pattern {module.dropkey_pattern!r} needs to know the patch grid, but the {keys} keys of "
        f"{type(module).__name__} are not one of windows or of an image of the configured size ({size}) in patches "
        f"({patch}). Use the pattern 'score', 'key' or 'token'."
    )


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


# functions are stateless, so a second import of this file may replace them
AttentionInterface.register(DROPKEY_NAME, dropkey_interface)
