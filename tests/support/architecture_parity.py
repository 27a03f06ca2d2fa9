"""Parity with the official models of T2T-ViT, VOLO and CeiT: their fixtures, and a way to force given drops.

Imports torch, pytest and the package.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_dropkey.models import attention, attention_mask, cpu_attention


REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY.parent / "shared" / "fixtures"


@cache
def load_script(name: str) -> ModuleType:
    """The job `scripts/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixture:
    """Weights, inputs and outputs of an official model; `about` is its description."""

    def __init__(self, name: str):
        path = FIXTURES / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"the parity fixture {name} is not in {FIXTURES}")
        self.tensors = load_file(path)
        self.about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors under `prefix`, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def pixels(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The images `[B, C, height, width]`."""
        return self.tensors["input/pixel_values"].to(dtype)

    @property
    def labels(self) -> torch.Tensor:
        """The labels `[B]`."""
        return self.tensors["input/labels"]


def load_official(model: nn.Module, fixture: Fixture, family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model` in eval mode with the fixture's weights, converted as `scripts/convert_checkpoint.py` does."""
    rename = load_script("convert_checkpoint").FAMILIES[family].rename
    weights = {rename(name): value for name, value in fixture.below("weights/").items()}
    model.load_state_dict(weights, strict=True)
    return model.to(dtype).eval()


@contextmanager
def forced_drops(model: nn.Module, masks: dict[str, torch.Tensor]) -> Iterator[None]:
    """Makes exactly the attentions named in `masks` drop exactly these scores, in this order of execution.

    Everything else about the model stays in eval mode: dropout, stochastic depth, batch statistics.

    Args:
        model: The model.
        masks: Name of an attention module -> bool `[B, H, N, M]`, True = dropped.
    """
    waiting = list(masks.items())

    def given_scores(seed: torch.Tensor, shape: tuple[int, ...], ratio: float, **_: Any) -> torch.Tensor:
        name, mask = waiting.pop(0)
        assert tuple(mask.shape) == shape, f"{name} asks for a mask of shape {shape}, got {tuple(mask.shape)}"
        return mask

    for name, module in model.named_modules():
        if hasattr(module, "dropkey_ratio"):
            module.training, module.dropkey_ratio = name in masks, 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_mask, "dropped_scores", given_scores)
        # without masks scores are drawn by a shortcut, which must ask for the given ones too
        for module in (attention, attention_mask):
            patch.setattr(module, "is_drop_alone", lambda *_: False)
        patch.setattr(cpu_attention, "_state_of_rows", lambda *_: None)
        yield
    model.eval()
    assert not waiting, f"these attentions never dropped: {[name for name, _ in waiting]}"


def recorded_outputs(model: nn.Module, names: list[str], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the modules `names` return for `pixels`, first elements of tuples, and the logits."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for name in names
    ]
    with torch.no_grad():
        found["logits"] = model(pixels).logits
    for hook in hooks:
        hook.remove()
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Largest absolute difference of two tensors of equally many elements, at most `bound`."""
    difference = (found.reshape(expected.shape).double() - expected.double()).abs().max().item()
    assert difference <= bound, f"largest difference {difference:.3g} exceeds {bound:.3g}"


def assert_gradient_norms(model: nn.Module, fixture: Fixture, family: str) -> None:
    """The loss and the L2 norm of every parameter's gradient against the official model's, in float64."""
    loss = model(fixture.pixels(), labels=fixture.labels).loss
    assert abs(loss.item() - fixture.about["loss_f64"]) < 1e-10
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    rename = load_script("convert_checkpoint").FAMILIES[family].rename
    compared = 0
    for official, expected in fixture.about["grad_l2_f64"].items():
        gradient = gradients.get(rename(official))
        if expected is None:
            assert gradient is None, f"{official} should have no gradient"
        else:
            found = 0.0 if gradient is None else gradient.norm().item()
            assert abs(found - expected) <= 1e-9 * max(1.0, expected), f"{official}: {found} instead of {expected}"
            compared += 1
    assert compared == len(gradients)
