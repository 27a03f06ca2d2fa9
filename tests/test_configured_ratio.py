"""A ratio of 0 in the configuration of a built model takes effect, and any other ratio is an error that says what to do."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from stock_models import CLIP, VIT

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, apply_dropkey, remove_dropkey
from hf_dropkey.inspection.analysis import measured_drops


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def native() -> Any:
    return DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.5)).train()


def patched() -> Any:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT)).train()
    apply_dropkey(model, 0.5)
    return model


def nested() -> Any:
    """The settings are in the configuration around that of the attentions."""
    model = hf.CLIPForImageClassification(hf.CLIPConfig(**CLIP)).train()
    apply_dropkey(model, 0.5)
    return model


KINDS = pytest.mark.parametrize("make", [native, patched, nested], ids=["native", "patched", "nested"])


def logits(model: Any, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    found: torch.Tensor = model(pixel_values=IMAGES).logits
    return found


@KINDS
def test_zero_turns_it_off_and_the_old_ratio_on_again(make: Any) -> None:
    model = make()
    assert not torch.equal(logits(model, 1), logits(model, 2))
    model.config.dropkey_ratio = 0
    assert torch.equal(logits(model, 1), logits(model, 2))
    assert torch.equal(logits(model, 1), logits(model.eval(), 1))
    drops = [drop for drop in measured_drops(model, {"pixel_values": IMAGES}, passes=2) if drop.fractions]
    assert all(max(drop.fractions) == 0 for drop in drops)
    model.train().config.dropkey_ratio = 0.5
    assert not torch.equal(logits(model, 1), logits(model, 2))


@KINDS
def test_another_ratio_is_an_error_in_training_until_it_is_applied(make: Any) -> None:
    model = make()
    model.config.dropkey_ratio = 0.25
    with pytest.raises(ValueError, match=r"has dropkey_ratio 0.25, and the model was built with 0.5.*apply_dropkey"):
        logits(model, 1)
    assert torch.equal(logits(model.eval(), 1), logits(model, 2))
    assert max(site.ratio for site in apply_dropkey(model).sites) == 0.25
    assert not torch.equal(logits(model.train(), 1), logits(model, 2))


@KINDS
def test_copies_and_removal_go_their_own_way(make: Any) -> None:
    model = make()
    other = copy.deepcopy(model)
    other.config.dropkey_ratio = 0
    assert torch.equal(logits(other, 1), logits(other, 2)) and not torch.equal(logits(model, 1), logits(model, 2))
    if make is native:
        return
    remove_dropkey(model)
    assert not any("dropkey_configured" in vars(part) for part in model.modules())
    assert torch.equal(logits(model, 1), logits(model, 2))


def test_compiled_code_follows_too() -> None:
    model = native()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert not torch.equal(logits(compiled, 1), logits(compiled, 2))
    model.config.dropkey_ratio = 0
    assert torch.equal(logits(compiled, 1), logits(compiled, 2))
