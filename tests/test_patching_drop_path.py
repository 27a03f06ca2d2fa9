"""Drop path on stock models: what their own drop path does, the measured rate, undo, memory, and what is refused."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import ARCHITECTURES
from stock_models import SWIN, VIT
from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper

from hf_dropkey import (
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropPathReport,
    apply_drop_path,
    apply_dropkey,
    monte_carlo_predict,
    remove_drop_path,
    remove_dropkey,
)
from hf_dropkey.patching.drop_path import drop_path


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**changes: Any) -> Any:
    return hf.ViTModel(hf.ViTConfig(**{**VIT, **changes}))


def trained(model: Any, seed: int = 0, images: torch.Tensor = IMAGES) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.train()(pixel_values=images).last_hidden_state


def evaluated(model: Any, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return model.eval()(pixel_values=images).last_hidden_state


def test_rate_zero_and_eval_mode_are_bit_identical() -> None:
    model = vit()
    before = evaluated(model)
    apply_drop_path(model, 0.0)
    assert torch.equal(trained(model), before)
    apply_drop_path(model, 0.5)
    assert torch.equal(evaluated(model), before) and not torch.equal(trained(model), before)


@pytest.mark.parametrize("kind", ["dinov2", "beit"])
def test_it_is_the_drop_path_that_models_have_themselves(kind: str) -> None:
    config_class, model_class = {"dinov2": (hf.Dinov2Config, hf.Dinov2Model), "beit": (hf.BeitConfig, hf.BeitModel)}[
        kind
    ]
    own = model_class(config_class(**{**VIT, **NO_DROPOUT, "drop_path_rate": 0.5}))
    if kind == "beit":
        # its branches start almost at 0
        for part in own.modules():
            if hasattr(part, "lambda_1"):
                nn.init.ones_(part.lambda_1)
                nn.init.ones_(part.lambda_2)
    else:
        # it has one rate for all layers
        for layer, rate in zip(own.encoder.layer, (0.0, 0.25, 0.5), strict=True):
            layer.drop_path.drop_prob = rate
    added = model_class(config_class(**{**VIT, **NO_DROPOUT}))
    added.load_state_dict(own.state_dict())
    report = apply_drop_path(added, 0.5)
    assert [branch.rate for branch in report.branches] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert (trained(own, 1) - trained(own)).abs().max() > 1e-3
    for seed in range(3):
        assert torch.allclose(trained(added, seed), trained(own, seed), atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "swin", "detr", "bert"])
def test_each_branch_is_dropped_at_its_rate(name: str) -> None:
    shape = {**VIT, **NO_DROPOUT}
    models = {
        "vit": lambda: vit(),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**shape)),
        "beit": lambda: hf.BeitModel(hf.BeitConfig(**shape)),
        "swin": lambda: hf.SwinModel(hf.SwinConfig(**{**SWIN, "drop_path_rate": 0.0})),
        "detr": ARCHITECTURES["detr"].build,
        "bert": ARCHITECTURES["bert"].build,
    }
    model = models[name]()
    inputs = {"pixel_values": IMAGES} if name not in ("detr", "bert") else ARCHITECTURES[name].inputs()
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            # DETR's first decoder attention is 0 without
            nn.init.normal_(value)
    report = apply_drop_path(model, 0.6)
    seen: dict[str, list[torch.Tensor]] = {branch.name: [] for branch in report.branches}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            seen[name].append(tensor.detach().flatten(1).abs().sum(dim=1) == 0)

        return hook

    # behind the hooks that drop
    for place in seen:
        model.get_submodule(place).register_forward_hook(keep(place))
    torch.manual_seed(0)
    calls = 100
    for _ in range(calls):
        model.train()(**inputs)
    samples = len(next(iter(inputs.values())))
    for branch in report.branches:
        dropped = torch.stack([one.view(samples, -1) for one in seen[branch.name]]).float()
        # all windows of an image, or none
        assert torch.equal(dropped, dropped[..., :1].expand_as(dropped))
        deviation = (branch.rate * (1 - branch.rate) / (calls * samples)) ** 0.5
        assert abs(dropped.mean() - branch.rate) <= 3.5 * deviation, branch
    assert max(branch.rate for branch in report.branches) == pytest.approx(0.6)


def test_a_dropped_sample_keeps_its_residual_and_others_are_scaled() -> None:
    values = torch.ones(6, 2, 3)
    torch.manual_seed(1)
    found = drop_path(values, 0.4, 3)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(found[0::2], found[1::2])
    assert drop_path(torch.ones(20_000, 1), 0.3, 20_000).mean() == pytest.approx(1.0, abs=0.02)
    with pytest.raises(ValueError, match="7 rows for 3 samples"):
        drop_path(torch.ones(7, 1), 0.4, 3)


def test_every_architecture_that_dropkey_reaches_is_reached_or_says_why() -> None:
    for name, architecture in ARCHITECTURES.items():
        model = architecture.build()
        for part in model.modules():
            if isinstance(part, hf.PreTrainedModel) and getattr(part.config, "drop_path_rate", 0):
                part.config.drop_path_rate = 0.0
        report = apply_drop_path(model, 0.2)
        assert len(report.branches) >= 2, name
        torch.manual_seed(0)
        model.train()(**architecture.inputs())


def test_the_call_is_undone_and_replaced() -> None:
    model = vit()
    first = apply_drop_path(model, 0.5)
    assert not first.replaced and len(first.branches) == 6 and not first.unreached
    second = apply_drop_path(model, 0.2)
    assert second.replaced and max(branch.rate for branch in second.branches) == 0.2
    assert "drop path on ViTModel: 6 residual branches are dropped (replaces the rate" in str(second)
    assert sum(len(part._forward_hooks) for part in model.modules()) == 6
    remove_drop_path(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert "dropkey_drop_path_rate" not in vars(model.config)
    assert torch.equal(trained(model), evaluated(model))
    with pytest.raises(ValueError, match="apply_drop_path was not called on this ViTModel"):
        remove_drop_path(model)


def test_it_is_independent_of_dropkey() -> None:
    model = vit()
    both = copy.deepcopy(model)
    apply_dropkey(both, 0.5)
    apply_drop_path(both, 0.5)
    remove_dropkey(both)
    alone = copy.deepcopy(model)
    apply_drop_path(alone, 0.5)
    assert torch.equal(trained(both), trained(alone))
    apply_dropkey(both, 0.5)
    remove_drop_path(both)
    apply_dropkey(model, 0.5)
    assert torch.equal(trained(both), trained(model))


def test_a_copy_has_its_own() -> None:
    model = vit()
    apply_drop_path(model, 0.5)
    other = copy.deepcopy(model)
    assert torch.equal(trained(other), trained(model))
    remove_drop_path(other)
    assert torch.equal(trained(other), evaluated(other)) and not torch.equal(trained(model), evaluated(model))


def test_models_of_this_package_take_it_where_they_have_none_of_their_own(tmp_path: Path) -> None:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.3))
    report = apply_drop_path(model, 0.2)
    assert isinstance(report, DropPathReport) and len(report.branches) == 6
    # drop path is off in Monte-Carlo inference, which keeps the model in eval mode
    prediction = monte_carlo_predict(model, {"pixel_values": IMAGES}, samples=4, seed=0)
    remove_drop_path(model)
    assert torch.equal(monte_carlo_predict(model, {"pixel_values": IMAGES}, samples=4, seed=0).std, prediction.std)
    ceit = DropKeyCeitForImageClassification(
        DropKeyCeitConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, drop_path_rate=0.1
        )
    )
    with pytest.raises(
        ValueError, match=r"`drop_path_rate` 0.1, drop path of its own. Load the model with drop_path_rate=0.0"
    ):
        apply_drop_path(ceit, 0.2)


def test_a_single_layer_has_the_whole_rate() -> None:
    assert {branch.rate for branch in apply_drop_path(vit(num_hidden_layers=1), 0.3).branches} == {0.3}


@pytest.mark.parametrize(
    ("make", "rate", "told"),
    [
        (vit, None, "No rate: pass for example apply_drop_path(model, 0.1)"),
        (vit, 1.0, "`rate` must lie in [0, 1), got 1.0"),
        (vit, -0.1, "got -0.1"),
        (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), 0.1, "SwinModel has `drop_path_rate` 0.1, drop path of its own"),
        (
            lambda: hf.ResNetModel(
                hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
            ),
            0.1,
            "reaches no residual branch of ResNetModel. Seen: no layers with attention",
        ),
    ],
)
def test_what_is_not_allowed_leaves_the_model_alone(make: Any, rate: Any, told: str) -> None:
    model = make()
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the text below
        apply_drop_path(model, rate)
    assert told in str(raised.value)
    assert not any(part._forward_hooks for part in model.modules())


def test_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is not a Transformers model"):
        apply_drop_path(nn.Linear(2, 2), 0.1)


class TimmAttention(nn.Module):
    """As timm's `Attention`: one projection, PyTorch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(8), TimmAttention(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path1(self.attn(self.norm1(x)))


class TimmModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.num_features = nn.Sequential(TimmBlock(), TimmBlock()), 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x.flatten(2).transpose(1, 2)).mean(dim=1)


def test_a_timm_model_has_drop_path_and_no_dropkey(monkeypatch: pytest.MonkeyPatch) -> None:
    # timm needs torchvision, which does not install beside a CPU build of torch; the wrapper is Transformers' own
    stand_in = SimpleNamespace(create_model=lambda *args, **kwargs: TimmModel())
    monkeypatch.setattr(modeling_timm_wrapper, "timm", stand_in, raising=False)
    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", lambda *args: None)
    model = modeling_timm_wrapper.TimmWrapperModel(hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: a model of timm inside Transformers.*such as ViTModel"):
        apply_dropkey(model, 0.1)
    report = apply_drop_path(model, 0.5)
    assert [branch.name for branch in report.branches] == ["timm_model.blocks.0.attn", "timm_model.blocks.1.attn"]
    images = torch.randn(64, 8, 2, 2)
    before = model.eval().timm_model(images)
    assert (model.train().timm_model(images) != before).any()
