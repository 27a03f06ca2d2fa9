"""The families as backbones: maps that the base models compute, any image size, DropKey in training, other models' parts."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

import hf_dropkey
from hf_dropkey import (
    DropKeyCeitBackbone,
    DropKeyCeitConfig,
    DropKeyCeitModel,
    DropKeyT2TViTBackbone,
    DropKeyT2TViTConfig,
    DropKeyT2TViTModel,
    DropKeyViTBackbone,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyViTModel,
    DropKeyVoloBackbone,
    DropKeyVoloConfig,
    DropKeyVoloModel,
    layer_ratios,
)


SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "dropkey_ratio": 0.3}
CONFIGS: dict[str, Any] = {
    "vit": lambda **more: DropKeyViTConfig(**SHAPE, num_hidden_layers=3, intermediate_size=64, patch_size=8, **more),
    "t2t_vit": lambda **more: DropKeyT2TViTConfig(**SHAPE, num_hidden_layers=3, token_size=8, **more),
    "volo": lambda **more: DropKeyVoloConfig(
        **SHAPE, depths=[1, 2, 1], outlook_hidden_size=16, num_outlook_heads=2, stem_size=8, **more
    ),
    "ceit": lambda **more: DropKeyCeitConfig(**SHAPE, num_hidden_layers=3, stem_size=8, **more),
}
BACKBONES = {
    "vit": (DropKeyViTBackbone, DropKeyViTModel),
    "t2t_vit": (DropKeyT2TViTBackbone, DropKeyT2TViTModel),
    "volo": (DropKeyVoloBackbone, DropKeyVoloModel),
    "ceit": (DropKeyCeitBackbone, DropKeyCeitModel),
}
ALL_STAGES = [0, 1, 2, 3]
families = pytest.mark.parametrize("family", CONFIGS)


def backbone_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoBackbone.from_config(CONFIGS[family](**more)).eval()


def images(*size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).view(2, 3, *size)


@families
def test_the_last_map_is_what_the_base_model_computes(family: str) -> None:
    backbone_class, model_class = BACKBONES[family]
    backbone = backbone_of(family)
    assert type(backbone) is backbone_class
    model = model_class(CONFIGS[family]()).eval()
    missing, unexpected = model.load_state_dict(backbone.state_dict(), strict=False)
    assert not unexpected
    assert all("class" in name or "cls" in name or "pooler" in name or "layer" in name for name in missing)
    tokens = model(images(32, 32)).last_hidden_state[:, 1:]
    (last,) = backbone(images(32, 32)).feature_maps
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "strides", "channels"),
    [
        ("vit", [8, 8, 8, 8], [32, 32, 32, 32]),
        ("t2t_vit", [16, 16, 16, 16], [32, 32, 32, 32]),
        ("volo", [8, 8, 16, 16], [16, 16, 32, 32]),
        ("ceit", [16, 16, 16, 16], [32, 32, 32, 32]),
    ],
)
def test_strides_and_channels_of_every_stage(family: str, strides: list[int], channels: list[int]) -> None:
    backbone = backbone_of(family, out_indices=ALL_STAGES)
    assert backbone.out_features == ["stem", "stage1", "stage2", "stage3"] == backbone.stage_names
    assert backbone.channels == channels
    for height, width in ((32, 32), (64, 48)):
        maps = backbone(images(height, width)).feature_maps
        assert [tuple(one.shape[1:]) for one in maps] == [
            (count, height // stride, width // stride) for count, stride in zip(channels, strides, strict=True)
        ]


@families
def test_images_of_any_size_are_padded_with_zeros_at_the_right_and_at_the_bottom(family: str) -> None:
    backbone = backbone_of(family, out_indices=ALL_STAGES)
    small = images(33, 50)
    whole = torch.zeros(2, 3, 48, 64) if family != "vit" else torch.zeros(2, 3, 40, 56)
    whole[:, :, :33, :50] = small
    for one, other in zip(backbone(small).feature_maps, backbone(whole).feature_maps, strict=True):
        assert torch.equal(one, other)


@families
def test_requests_of_outputs(family: str) -> None:
    backbone = backbone_of(family, out_features=["stage1", "stage3"])
    plain = backbone(images(32, 32))
    assert plain.hidden_states is None and plain.attentions is None
    full = backbone(images(32, 32), output_hidden_states=True)
    assert len(full.hidden_states) == 1 + sum(backbone.config.stage_depths)
    assert isinstance(backbone(images(32, 32), return_dict=False), tuple)
    backbone.set_attn_implementation("eager")
    # VOLO has two layers in its second stage
    assert len(backbone(images(32, 32), output_attentions=True).attentions) == sum(backbone.config.stage_depths)


@families
def test_a_class_without_images_says_so(family: str) -> None:
    with pytest.raises(ValueError, match="pixel_values"):
        backbone_of(family)(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="pixel_values"):
        backbone_of(family)(torch.zeros(2, 1, 32, 32))


@families
def test_every_parameter_learns(family: str) -> None:
    """So that distributed training needs no search for unused parameters."""
    backbone = backbone_of(family, out_indices=ALL_STAGES).train()
    sum(one.square().sum() for one in backbone(images(32, 32)).feature_maps).backward()
    without = [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without


@families
def test_dropkey_acts_in_training_only(family: str) -> None:
    backbone = backbone_of(family)
    still = backbone(images(32, 32)).feature_maps[0]
    assert torch.equal(still, backbone(images(32, 32)).feature_maps[0])
    backbone.train()
    # batch norms and dropout apart, only DropKey is random
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()

    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        maps: torch.Tensor = backbone(images(32, 32)).feature_maps[0]
        return maps

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    with hf_dropkey.dropkey_disabled(backbone):
        torch.testing.assert_close(made(1), still, rtol=0, atol=1e-5)


def dropped_fractions(model: torch.nn.Module, backbone: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """The fraction of weights that are zero in each attention of a backbone, in a training step of a model around it."""
    seen: list[float] = []

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen.append(float((output[1] == 0).float().mean()))

    hooks = [module.register_forward_hook(look) for module in backbone.modules() if "dropkey_ratio" in vars(module)]
    model.train()(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["vit", "ceit"])
@pytest.mark.parametrize("host", ["detr", "upernet"])
def test_dropkey_drops_the_configured_fractions_inside_other_models(family: str, host: str) -> None:
    """Measured on the attention weights, within three standard deviations of each layer's ratio."""
    torch.manual_seed(0)
    config = CONFIGS[family](out_indices=[1, 2, 3])
    config.dropkey_final_ratio = 0.1
    model: Any
    if host == "detr":
        model = DetrForObjectDetection(small_detr(config))
        backbone = model.model.backbone.model
    else:
        model = UperNetForSemanticSegmentation(small_upernet(config))
        backbone = model.backbone
    backbone.set_attn_implementation("eager")
    size = 64 if family == "vit" else 128
    fractions = dropped_fractions(model, backbone, {"pixel_values": torch.randn(4, 3, size, size)})
    # 4 images, 4 heads, 8 x 8 patches and a class token
    count = 4 * 4 * 65**2
    expected = layer_ratios(3, 0.3, 0.1, "decreasing")
    for fraction, ratio in zip(fractions, expected, strict=True):
        assert abs(fraction - ratio) < 3 * (ratio * (1 - ratio) / count) ** 0.5 + 1e-4
    model.eval()
    assert max(dropped_fractions_in_eval(model, backbone, size)) == 0


def dropped_fractions_in_eval(model: Any, backbone: Any, size: int) -> list[float]:
    outputs = backbone(torch.randn(4, 3, size, size), output_attentions=True)
    return [float((weights == 0).float().mean()) for weights in outputs.attentions]


def small_detr(backbone: Any) -> DetrConfig:
    return DetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )


def small_upernet(backbone: Any) -> UperNetConfig:
    return UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False)


@pytest.mark.parametrize("family", ["volo", "ceit"])
def test_the_schedule_runs_over_the_sites_of_the_backbone(family: str) -> None:
    """The last of them has the final ratio, although the classifier has another site behind it."""
    ratios = [module.dropkey_ratio for module in backbone_of(family).modules() if "dropkey_ratio" in vars(module)]
    assert ratios == layer_ratios(len(ratios), 0.3, 0.0, "decreasing")
    assert len(ratios) == sum(backbone_of(family).config.stage_depths)


def test_weights_of_a_classifier_and_of_plain_vit_load(tmp_path: Any) -> None:
    config = CONFIGS["vit"]()
    torch.manual_seed(3)
    classifier = DropKeyViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "ours")
    plain = ViTModel(ViTConfig(**{key: value for key, value in config.to_dict().items() if key in vars(ViTConfig())}))
    plain.eval().save_pretrained(tmp_path / "plain")
    for folder, model in (("ours", classifier.vit), ("plain", plain)):
        backbone = DropKeyViTBackbone.from_pretrained(tmp_path / folder, out_features=["stage3"])
        tokens = model(images(32, 32)).last_hidden_state[:, 1:]
        (last,) = backbone(images(32, 32)).feature_maps
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-6)


@families
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    backbone = backbone_of(family, out_indices=ALL_STAGES)
    backbone.gradient_checkpointing_enable()
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()

    def gradients() -> list[torch.Tensor]:
        backbone.zero_grad()
        torch.manual_seed(1)
        sum(one.square().sum() for one in backbone(images(32, 32)).feature_maps).backward()
        return [weight.grad.clone() for weight in backbone.parameters() if weight.grad is not None]

    kept = gradients()
    backbone.gradient_checkpointing_disable()
    torch.testing.assert_close(kept, gradients(), rtol=1e-4, atol=1e-4)
