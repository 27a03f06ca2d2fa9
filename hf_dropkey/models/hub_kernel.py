"""DropKey as an attention kernel of the Hub: `attn_implementation="owner/kernel"` for any model of Transformers.

A kernel gets what every attention function of Transformers gets, the ratio of the model's own attention dropout among it.
Here that number is the drop ratio of DropKey, pattern "score", the same in all layers. Where it is 0, as in eval mode, the
result is that of `sdpa`, to the bit.

This file is the entry of the folder that `scripts/build_kernel.py` makes, and travels with its neighbours: it imports
torch, transformers and its neighbours only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from .attention import default_backend_of, dropkey_attention_forward
from .attention_mask import additive


# Transformers recognises an attention function of its interface by this name beside `flash_attn_forward`
supports_flash_attn = True
# what changes scores in ways that DropKey's backends do not know
REFUSED = ("softcap", "s_aux", "cache")


@dataclass
class _Site:
    """The settings of one call, as an attention module of ours has them."""

    dropkey_ratio: float
    dropkey_pattern: str = "score"
    dropkey_window: int = 3


def _whole_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: bool,
    position_bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """The mask of a call with what `sdpa` passes beside it: the causal rule where there is no mask, and a bias."""
    mask = attention_mask
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if position_bias is None:
        return mask
    return position_bias if mask is None else position_bias + additive(mask).to(position_bias.dtype)


def flash_attn_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it, with DropKey where the model would apply dropout to attention weights.

    Args:
        module: The attention module; in eval mode nothing is dropped.
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`, or fewer heads where `module.num_key_value_groups` queries share one.
        value: `[B, H, M, Dv]`, as the keys.
        attention_mask: As `sdpa` takes it.
        dropout: The drop ratio in [0, 1): the model's own ratio of attention dropout.
        scaling: Factor on the scores, default `D ** -0.5`.
        is_causal: Default: the module's attribute, else True, as in `sdpa`.
        position_bias: What to add to the scores, or None.
        **more: What `sdpa` ignores, too.

    Returns:
        The output `[B, N, H, Dv]`, and None, as there are no weights.

    Raises:
        ValueError: The model asks for something that DropKey does not know.
    """
    if dropout == 0 or not module.training:
        # an older release of Transformers does not know the argument
        bias: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, 0.0, scaling, is_causal, **bias, **more
        )
        return output, None
    refused = [name for name in REFUSED if more.get(name) is not None]
    if refused:
        raise ValueError(
            f"DropKey does not work with {', '.join(refused)}, which {type(module).__name__} passes to its attention. Set "
            "its ratio of attention dropout to 0, or choose attn_implementation='eager'."
        )
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    site: Any = _Site(float(dropout))
    mask = _whole_mask(query, key, attention_mask, causal, position_bias)
    output, _ = dropkey_attention_forward(
        site,
        query,
        key,
        value,
        mask,
        implementation=default_backend_of(query, key, value, mask, site.dropkey_pattern),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return output, None
