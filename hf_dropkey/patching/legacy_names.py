"""Conversion of weights in an old layout for a direct `load_state_dict`.

`save_pretrained` writes many models in the layout of older releases, and `from_pretrained` converts it. `Trainer`
reads its checkpoints with a direct `load_state_dict(strict=False)` instead (Transformers 5.23), which leaves every
renamed layer unchanged and only warns.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


def convert_legacy_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """A `load_state_dict` pre-hook of a whole model: converts weights in an old layout in place."""
    own = model.state_dict().keys()
    foreign = state_dict.keys() - own
    if prefix or not foreign or own <= state_dict.keys():
        return
    floating = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
    cls: Any = type(model)
    loaded, info = cls.from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict=dict(state_dict),
        # the configuration's dtype may be narrower than that of the weights in training
        dtype=floating[0] if floating else None,
        output_loading_info=True,
    )
    found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in info["missing_keys"]}
    if found.keys() <= state_dict.keys():
        return
    for name in foreign - set(info["unexpected_keys"]):
        del state_dict[name]
    state_dict.update(found)
