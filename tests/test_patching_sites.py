"""Which attentions of every architecture are reached, how they are named, and what is refused with which reason."""

from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import (
    ARCHITECTURES,
    DETR,
    REFUSED,
    TEXT,
    build,
    llama,
    markdown_table,
    measure,
    pixels,
    quiet,
    ratios,
    tiny_vit,
)
from torch import nn
from transformers.models.vit.modeling_vit import ViTAttention

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.models.configuration_dropkey_ceit import DropKeyCeitConfig
from hf_dropkey.models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from hf_dropkey.models.configuration_dropkey_volo import DropKeyVoloConfig
from hf_dropkey.models.modeling_dropkey_ceit import DropKeyCeitForImageClassification
from hf_dropkey.models.modeling_dropkey_t2t_vit import DropKeyT2TViTForImageClassification
from hf_dropkey.models.modeling_dropkey_volo import DropKeyVoloForImageClassification
from hf_dropkey.patching.apply import dropkey_modules, remove_dropkey
from hf_dropkey.patching.sites import (
    dispatch_code,
    find_attention,
    is_closed_attention,
    kind_of,
    refusal,
    side_of,
    stack_of,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_site_drops_its_ratio_and_the_report_is_complete(name: str) -> None:
    _, counts, report = measure(name)
    assert len(report.sites) == ARCHITECTURES[name].sites == len(counts)
    for reason, number in ARCHITECTURES[name].unreached.items():
        assert sum(reason in attention.reason for attention in report.unreached) == number
    assert len(report.unreached) == sum(ARCHITECTURES[name].unreached.values())
    for count in counts.values():
        assert count.scores > 500
        # 80 sites are tested with fixed seeds: 4.5 standard deviations are very unlikely in any of them
        assert count.deviation < 4.5
        assert count.on_hidden == 0


@pytest.mark.parametrize("name", ["clip", "siglip2", "swin", "detr", "conditional_detr", "rt_detr", "bert"])
def test_masks_hide_keys_from_these(name: str) -> None:
    _, counts, _ = measure(name, forwards=1)
    assert sum(count.hidden for count in counts.values()) > 100


def test_the_table_names_every_architecture() -> None:
    table = markdown_table([measure(name, forwards=1)[0] for name in ("vit", "siglip")])
    assert "| ViT | 3 encoder self | 0 | 0.3 | 0.3" in table
    assert "| SigLIP vision | 3 encoder self | 1 |" in table
    assert "Swinv2" in table


def test_depth_runs_over_the_sites_of_each_stack() -> None:
    report = quiet(build("detr"), 0.4, final_ratio=0.2)
    rows = [(site.name, site.depth, site.side, site.kind, site.ratio) for site in report.sites]
    assert rows == [
        ("model.encoder.layers.0.self_attn", 0, "encoder", "self", 0.4),
        ("model.encoder.layers.1.self_attn", 1, "encoder", "self", 0.2),
        ("model.decoder.layers.1.self_attn", 0, "decoder", "self", 0.4),
    ]
    reasons = {attention.name: attention.reason for attention in report.unreached}
    assert "queries start at zero" in reasons["model.decoder.layers.0.self_attn"]
    assert reasons["model.decoder.layers.1.encoder_attn"] == "cross-attention; pass cross_attention=True"
    towers = quiet(build("clip"), 0.4)
    assert [site.depth for site in towers.sites] == [0, 1, 2, 0, 1, 2]


def maskformer() -> Any:
    """A tiny MaskFormer, whose decoder is DETR's."""
    torch.manual_seed(0)
    backbone = hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = hf.DetrConfig(**DETR)
    return hf.MaskFormerForInstanceSegmentation(
        hf.MaskFormerConfig(
            backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
        )
    )


@pytest.mark.parametrize(
    ("make", "decoder"),
    [
        (lambda: build("detr"), "model.decoder"),
        (lambda: build("conditional_detr"), "model.decoder"),
        (maskformer, "model.transformer_module.decoder"),
    ],
    ids=["detr", "conditional_detr", "maskformer"],
)
def test_a_decoder_that_starts_from_zeros_ignores_its_first_self_attention(make: Any, decoder: str) -> None:
    """Which is why the first site of each is skipped, and only that one."""
    model, images = make().double().eval(), pixels(64)["pixel_values"].double()
    report = quiet(model, 0.3)
    assert [site.name for site in report.sites if site.side == "decoder"] == [f"{decoder}.layers.1.self_attn"]
    (reason,) = [part.reason for part in report.unreached if part.name == f"{decoder}.layers.0.self_attn"]
    assert "queries start at zero" in reason
    with torch.no_grad():
        plain = class_logits(model, images)
        for layer, changes in ((0, False), (1, True)):
            module = model.get_submodule(f"{decoder}.layers.{layer}.self_attn")
            keep = module.forward
            # all queries attend to the first one only
            module.forward = lambda hidden_states, keep=keep, **kwargs: keep(
                hidden_states,
                **{**kwargs, "attention_mask": torch.arange(12)[None, None, None].expand(2, 1, 12, 12) == 0},
            )
            difference = (class_logits(model, images) - plain).abs().max()
            del module.forward
            # the scores of MaskFormer's random weights change by 1e-6, in float64
            assert (difference > 1e-9) == changes


def class_logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The scores of the classes for each query."""
    output = model(pixel_values=images)
    return output.logits if "logits" in output else output.class_queries_logits


@pytest.mark.parametrize(
    ("config", "model", "off"),
    [
        (DropKeyViTConfig, DropKeyViTForImageClassification, {}),
        (DropKeyT2TViTConfig, DropKeyT2TViTForImageClassification, {}),
        (DropKeyT2TViTConfig, DropKeyT2TViTForImageClassification, {"dropkey_token_stage": True}),
        (DropKeyVoloConfig, DropKeyVoloForImageClassification, {"dropkey_outlook": False}),
        (DropKeyCeitConfig, DropKeyCeitForImageClassification, {"dropkey_class_attention": False}),
    ],
)
def test_the_schedule_of_this_packages_models_is_their_own(config: Any, model: Any, off: dict[str, bool]) -> None:
    settings = {"dropkey_ratio": 0.3, "dropkey_final_ratio": 0.1, "dropkey_schedule": "increasing", **off}
    with torch.device("meta"):
        built = model(config(**settings))
    before = ratios(built)
    report = quiet(built)
    assert ratios(built) == before
    assert [site.ratio for site in report.sites] == [ratio for ratio in before if ratio > 0]
    disabled = [attention for attention in report.unreached if "disabled" in attention.reason]
    assert len(disabled) == len(report.unreached) == before.count(0)


class Pooling(nn.Module):
    def forward(self, hidden_states: torch.Tensor, key_value_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Mixing(nn.Module):
    def forward(self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states


class FromEncoder(nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class FromContext(nn.Module):
    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return hidden_states


class CrossAttention(Mixing):
    pass


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("layers.0.attn", Pooling(), "cross"),
        ("layers.0.attn", Mixing(), "self"),
        ("layers.0.encoder_attn", Mixing(), "cross"),
        ("layers.0.crossattention.self", Mixing(), "cross"),
        ("encoder.attention.layers.0.self_attn", Mixing(), "self"),
        # only the last two parts of a name and the class count
        ("cross_attention_tower.layers.0.self_attn", Mixing(), "self"),
        ("layers.0.attn", FromEncoder(), "cross"),
        ("layers.0.attn", FromContext(), "cross"),
        ("layers.0.attn", CrossAttention(), "cross"),
    ],
)
def test_cross_attention_is_known_by_its_names_or_its_inputs(name: str, module: nn.Module, kind: str) -> None:
    assert kind_of(name, module) == kind


class Deferring(ViTAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Replacing(ViTAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None


def test_a_subclass_dispatches_where_it_calls_the_forward_that_does() -> None:
    config = tiny_vit().config
    assert refusal(Deferring(config)) is None and dispatch_code(Deferring(config)) == dispatch_code(
        ViTAttention(config)
    )
    assert dispatch_code(Replacing(config)) is None
    assert refusal(Replacing(config)) == (
        "Replacing computes its own softmax, not through Transformers' attention interface"
    )


class OwnAttention(nn.Module):
    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return nn.Softmax(-1)(scores)


class FunctionAttention(nn.Module):
    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1)


class FusedAttention(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(states, states, states)


class MultiHeadAttention(nn.Module):
    def forward(self, states: torch.Tensor) -> Any:
        return nn.functional.multi_head_attention_forward(states)  # only read


class HoldingAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.Softmax(-1)


class AttentionMlp(nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.relu()


class Scores(nn.Module):
    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1)


@pytest.mark.parametrize(
    ("module", "closed"),
    [
        (OwnAttention(), True),
        (FunctionAttention(), True),
        (FusedAttention(), True),
        (MultiHeadAttention(), True),
        (HoldingAttention(), True),
        (nn.MultiheadAttention(8, 2), True),
        # without a softmax, or by another name
        (AttentionMlp(), False),
        (Scores(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_attention_with_its_own_softmax_is_recognised(module: nn.Module, closed: bool) -> None:
    assert is_closed_attention(module) == closed


def test_attention_around_one_that_can_be_reached_is_open() -> None:
    outer = OwnAttention()
    outer.inner = ViTAttention(tiny_vit().config)
    assert not is_closed_attention(outer)


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("model.encoder.layers.0.self_attn", "model.encoder.layers"),
        ("model.encoder.layers.0.blocks.1.attention", "model.encoder.layers"),
        ("head.attention", "head"),
        ("attention", ""),
    ],
)
def test_a_stack_is_what_stands_before_the_first_number(name: str, stack: str) -> None:
    assert stack_of(name) == stack


@pytest.mark.parametrize(
    ("stack", "is_decoder", "side"),
    [
        ("model.decoder.layers", False, "decoder"),
        ("model.encoder.layers", True, "encoder"),
        # the last part that says so
        ("encoder.decoder.layers", False, "decoder"),
        ("decoder.encoder.layers", True, "encoder"),
        ("layers", True, "decoder"),
        ("layers", False, "encoder"),
    ],
)
def test_the_side_is_that_of_the_stack_or_of_the_configuration(stack: str, is_decoder: bool, side: str) -> None:
    assert side_of(stack, is_decoder) == side


@pytest.mark.parametrize(
    ("is_decoder", "is_causal", "side"),
    [(True, False, "decoder"), (False, True, "decoder"), (False, False, "encoder")],
)
def test_a_configuration_or_a_causal_module_says_which_side_a_stack_is(
    is_decoder: bool, is_causal: bool, side: str
) -> None:
    model = llama()
    model.config.is_decoder = is_decoder
    for layer in model.layers:
        layer.self_attn.is_causal = is_causal
    assert {site.side for site in find_attention(model)[0]} == {side}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_do_not_dispatch_are_refused(name: str) -> None:
    model = REFUSED[name]()
    with pytest.raises(ValueError, match=r"reaches no attention.*computes its own softmax"):
        quiet(model, 0.1)
    assert not list(dropkey_modules(model))


def test_attention_that_depends_on_the_name_of_its_backend_is_refused() -> None:
    gpt2 = hf.GPT2Model(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, attn_pdrop=0.0))
    with pytest.raises(ValueError, match="computes differently for different names"):
        quiet(gpt2, 0.1)


def test_attention_sinks_are_refused() -> None:
    config = hf.GptOssConfig(**TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="attention sinks"):
        quiet(hf.GptOssModel(config), 0.1, backend="eager")


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="is not a Transformers model"):
        quiet(nn.TransformerEncoderLayer(16, 2), 0.1)
    with pytest.raises(TypeError, match="Expected a Transformers model"):
        quiet("google/vit-base-patch16-224", 0.1)
    with pytest.raises(ValueError, match=r"several Transformers models \(0, 1\)"):
        quiet(nn.Sequential(tiny_vit(), tiny_vit()), 0.1)
    with pytest.raises(ValueError, match="no attention at all"):
        quiet(hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), 0.1)
    with pytest.raises(ValueError, match="nothing to remove"):
        remove_dropkey(tiny_vit())


def test_a_model_inside_a_module_of_ones_own() -> None:
    outer = nn.ModuleDict({"backbone": tiny_vit(), "head": nn.Linear(4, 4)})
    report = quiet(outer, 0.3)
    assert report.sites[0].name == "vit.layers.0.attention"
    remove_dropkey(outer)
