"""What drop path and patch dropout have in common: the rate in the configuration, gradients with activation checkpointing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_dropkey import (
    apply_drop_path,
    apply_dropkey,
    apply_patch_dropout,
    remove_drop_path,
    remove_patch_dropout,
)
from hf_dropkey.patching.drop_path import DROP_PATH
from hf_dropkey.patching.hooked import HookedRegulariser
from hf_dropkey.patching.patch_dropout import PATCH_DROPOUT
from hf_dropkey.training.callbacks import DropKeyGuardCallback


IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
KINDS = [
    pytest.param(DROP_PATH, apply_drop_path, remove_drop_path, id="drop path"),
    pytest.param(PATCH_DROPOUT, apply_patch_dropout, remove_patch_dropout, id="patch dropout"),
]


def vit() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTModel(ViTConfig(**shape, **dropout, image_size=32, patch_size=8))


def trained(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    found: torch.Tensor = model.train()(pixel_values=IMAGES).last_hidden_state
    return found


@pytest.mark.parametrize(("kind", "apply", "remove"), KINDS)
def test_the_configuration_remembers_the_rate(
    kind: HookedRegulariser, apply: Callable[..., Any], remove: Callable[..., None], tmp_path: Path
) -> None:
    model = vit()
    apply(model, 0.5)
    model.save_pretrained(tmp_path)
    again: Any = ViTModel.from_pretrained(tmp_path)
    assert kind.forgotten(again) == 0.5 and kind.warn_if_forgotten(again)
    # all 16 patches and the class token, and no branch left out
    whole = trained(again)
    assert whole.shape[1] == 17 and torch.equal(whole, again.eval()(pixel_values=IMAGES).last_hidden_state)
    arguments: Any = SimpleNamespace()
    DropKeyGuardCallback(reapply=True).on_train_begin(arguments, arguments, arguments, model=again)
    assert kind.forgotten(again) is None and torch.equal(trained(again), trained(model))
    assert kind.forgotten(vit()) is None and not kind.warn_if_forgotten(nn.Linear(2, 2))
    apply(again, 0.25)
    remove(again)
    # as it was before the call of this process
    assert getattr(again.config, kind.field) == 0.5


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "apply", "remove"), KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: HookedRegulariser, apply: Callable[..., Any], remove: Callable[..., None], ratio: float
) -> None:
    model = vit()
    if ratio:
        apply_dropkey(model, ratio)
    apply(model, 0.5)
    gradients = []
    for change in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        change()
        model.zero_grad()
        trained(model).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(("kind", "apply", "remove"), KINDS)
def test_a_rate_outside_its_range_is_told_in_its_own_words(kind: HookedRegulariser, apply: Any, remove: Any) -> None:
    with pytest.raises(ValueError, match=r"got 1.5. 0 leaves nothing out; pass for example apply_") as error:
        apply(vit(), 1.5)
    assert kind.function in str(error.value) and "DropKey" not in str(error.value)
