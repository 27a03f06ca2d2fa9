"""Patch dropout on stock models: which tokens stay, that nothing else changes, undo, memory, and what is refused."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import ARCHITECTURES
from stock_models import SWIN, VIT
from torch import nn

from hf_dropkey import (
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyFeaturesConfig,
    DropKeyFeaturesForImageClassification,
    DropKeyViTBackbone,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    PatchDropoutReport,
    apply_drop_path,
    apply_dropkey,
    apply_patch_dropout,
    monte_carlo_predict,
    remove_dropkey,
    remove_patch_dropout,
)
from hf_dropkey.patching.patch_dropout import kept_patches, patch_dropout


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOWER: dict[str, Any] = {**{name: value for name, value in VIT.items() if name != "attention_probs_dropout_prob"}}
PATCHES = 16


def vit(**changes: Any) -> Any:
    return hf.ViTModel(hf.ViTConfig(**{**VIT, **changes}))


def trained(model: Any, seed: int = 0, images: torch.Tensor = IMAGES) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.train()(pixel_values=images).last_hidden_state


def evaluated(model: Any, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return model.eval()(pixel_values=images).last_hidden_state


# makes a model, and the number of tokens in front of its patches
MODELS: dict[str, tuple[Any, int]] = {
    "vit": (vit, 1),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)), 2),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT)), 1),
    "registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3)),
        4,
    ),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)), 0),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER)), 1),
    "metaclip": (lambda: hf.MetaClip2VisionModel(hf.MetaClip2VisionConfig(**TOWER)), 1),
    "chinese_clip": (lambda: hf.ChineseCLIPVisionModel(hf.ChineseCLIPVisionConfig(**TOWER)), 1),
    "altclip": (lambda: hf.AltCLIPVisionModel(hf.AltCLIPVisionConfig(**TOWER)), 1),
    "blip": (lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**TOWER)), 1),
    "msn": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VIT)), 1),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**VIT)), 0),
    "pixio": (lambda: hf.PixioModel(hf.PixioConfig(**VIT, n_cls_tokens=2)), 2),
    "dropkey_vit": (lambda: DropKeyViTForImageClassification(DropKeyViTConfig(**VIT)).vit, 1),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_random_part_of_the_patches_stays_and_all_other_tokens(kind: str) -> None:
    make, prefix = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    before = evaluated(model)
    report = apply_patch_dropout(model, 0.25)
    (tokens,) = report.tokens
    assert (tokens.patches, tokens.kept, tokens.prefix) == (PATCHES, 12, prefix) and not report.unreached
    assert torch.equal(evaluated(model), before)
    embeddings = model.get_submodule(tokens.name)
    whole = embeddings.eval()(IMAGES)
    assert whole.shape[1] == prefix + PATCHES
    torch.manual_seed(0)
    part = embeddings.train()(IMAGES)
    assert part.shape[1] == prefix + 12 and torch.equal(part[:, :prefix], whole[:, :prefix])
    places = [
        [next(place for place in range(PATCHES) if torch.equal(token, image[place])) for token in kept]
        for image, kept in zip(whole[:, prefix:], part[:, prefix:], strict=True)
    ]
    assert all(row == sorted(set(row)) for row in places) and len(set(map(tuple, places))) > 1
    assert trained(model).shape[1] == prefix + 12


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_behind_the_embeddings_knows_the_places_of_patches(kind: str) -> None:
    """What each token becomes is the same in any order of the patches, so a part of them is as good a sequence."""
    make, prefix = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    for name, weight in model.named_parameters():
        # tables that start at zero would hide what they do
        if not weight.any():
            nn.init.normal_(weight, std=0.5)
        assert weight.numel() == 0 or weight.any(), name
    (tokens,) = apply_patch_dropout(model, 0.0).tokens
    before = evaluated(model)
    order = torch.cat((torch.arange(prefix), prefix + torch.randperm(PATCHES)))
    handle = model.get_submodule(tokens.name).register_forward_hook(lambda module, args, output: output[:, order])
    assert torch.allclose(evaluated(model), before[:, order], atol=1e-4)
    handle.remove()


def test_rate_zero_and_eval_mode_are_bit_identical() -> None:
    model = vit()
    before = evaluated(model)
    apply_patch_dropout(model, 0.0)
    assert torch.equal(trained(model), before)
    apply_patch_dropout(model, 0.5)
    assert torch.equal(evaluated(model), before) and not torch.equal(trained(model), trained(model, 1))
    assert torch.equal(trained(model), trained(model))


@pytest.mark.parametrize(
    ("patches", "rate", "kept"), [(16, 0.5, 8), (100, 0.9, 10), (10, 0.9, 1), (3, 0.99, 1), (196, 0.25, 147)]
)
def test_how_many_stay(patches: int, rate: float, kept: int) -> None:
    assert kept_patches(patches, rate) == kept
    assert patch_dropout(torch.randn(2, 3 + patches, 4), rate, 3).shape == (2, 3 + kept, 4)


def test_each_patch_stays_as_often() -> None:
    torch.manual_seed(0)
    places = torch.arange(12.0).expand(4000, 12)[..., None]
    found = patch_dropout(places, 0.25, 2)[:, 2:, 0].long()
    # the two in front are never among them, which 8 of the 10 others are
    counts = found.flatten().bincount(minlength=12) / 4000
    assert not counts[:2].any()
    assert torch.allclose(counts[2:], torch.full((10,), 0.8), atol=3 * (0.8 * 0.2 / 4000) ** 0.5 + 0.01)


def test_gradients_go_through_the_tokens_that_stay() -> None:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT))
    apply_patch_dropout(model, 0.75)
    images = IMAGES.clone().requires_grad_()
    torch.manual_seed(3)
    model.train()(pixel_values=images, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert images.grad is not None
    by_patch = images.grad.unflatten(2, (4, 8)).unflatten(4, (4, 8)).abs().sum(dim=(1, 3, 5)).flatten(1)
    assert ((by_patch > 0).sum(dim=1) == 4).all()
    torch.manual_seed(3)
    kept = patch_dropout(torch.arange(17.0).expand(4, 17)[..., None], 0.75, 1)[:, 1:, 0].long() - 1
    assert all((by_patch[row, kept[row]] > 0).all() for row in range(4))


def test_undo_replacing_and_the_report() -> None:
    model = vit()
    before = evaluated(model)
    first = apply_patch_dropout(model, 0.5)
    assert not first.replaced and "a fraction 0.5 of the patches is left out" in str(first)
    second = apply_patch_dropout(model, 0.25, verbose=True)
    assert second.replaced and "(replaces the rate" in str(second) and "embeddings" in str(second)
    assert sum(len(part._forward_hooks) for part in model.modules()) == 1
    remove_patch_dropout(model)
    assert not any(part._forward_hooks for part in model.modules())
    assert "dropkey_patch_dropout_rate" not in vars(model.config)
    assert torch.equal(trained(model), before)
    with pytest.raises(ValueError, match="apply_patch_dropout was not called on this ViTModel"):
        remove_patch_dropout(model)


def test_it_is_independent_of_dropkey_and_drop_path() -> None:
    model = vit()
    both = copy.deepcopy(model)
    apply_dropkey(both, 0.5)
    apply_patch_dropout(both, 0.5)
    assert trained(both).shape[1] == 9 and not torch.equal(trained(both), trained(both, 1))
    remove_dropkey(both)
    alone = copy.deepcopy(model)
    apply_patch_dropout(alone, 0.5)
    assert torch.equal(trained(both), trained(alone))
    apply_dropkey(both, 0.5)
    remove_patch_dropout(both)
    apply_dropkey(model, 0.5)
    assert torch.equal(trained(both), trained(model))
    apply_patch_dropout(both, 0.5)
    apply_drop_path(both, 0.5)
    assert trained(both).isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", ["score", "key", "token"])
def test_dropkey_masks_the_tokens_that_stay(pattern: str, backend: str) -> None:
    model = hf.ViTForImageClassification._from_config(hf.ViTConfig(**VIT), attn_implementation=backend)
    apply_dropkey(model, 0.5, pattern=pattern)
    apply_patch_dropout(model, 0.5)
    torch.manual_seed(0)
    loss = model.train()(pixel_values=IMAGES, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in model.parameters())


def test_a_copy_has_its_own() -> None:
    model = vit()
    apply_patch_dropout(model, 0.5)
    other = copy.deepcopy(model)
    assert torch.equal(trained(other), trained(model))
    remove_patch_dropout(other)
    assert trained(other).shape[1] == 17 and trained(model).shape[1] == 9


def test_a_compiled_model_thins_its_tokens() -> None:
    model = vit()
    apply_patch_dropout(model, 0.5)
    compiled: Any = torch.compile(model, backend="eager")
    torch.manual_seed(0)
    assert torch.allclose(compiled.train()(pixel_values=IMAGES).last_hidden_state, trained(model), atol=1e-6)


def test_models_of_this_package_take_it() -> None:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.3))
    report = apply_patch_dropout(model, 0.5)
    assert isinstance(report, PatchDropoutReport) and report.tokens[0].name == "vit.embeddings"
    torch.manual_seed(0)
    model.train()(pixel_values=IMAGES, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    # it is off in Monte-Carlo inference, which keeps the model in eval mode
    prediction = monte_carlo_predict(model, {"pixel_values": IMAGES}, samples=4, seed=0)
    remove_patch_dropout(model)
    assert torch.equal(monte_carlo_predict(model, {"pixel_values": IMAGES}, samples=4, seed=0).std, prediction.std)
    features = DropKeyFeaturesForImageClassification(
        DropKeyFeaturesConfig(features_config=hf.Dinov2Config(**VIT), num_labels=2)
    )
    assert apply_patch_dropout(features, 0.5).tokens[0].name == "features.embeddings"
    assert features.train()(pixel_values=IMAGES).logits.shape == (4, 2)


def test_a_model_with_two_towers_thins_that_of_images() -> None:
    model = ARCHITECTURES["clip"].build()
    report = apply_patch_dropout(model, 0.5)
    assert [one.name for one in report.tokens] == ["vision_model.embeddings"]
    inputs = ARCHITECTURES["clip"].inputs()
    model.train()(**inputs, return_loss=True).loss.backward()


def ceit() -> Any:
    return DropKeyCeitForImageClassification(
        DropKeyCeitConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    )


REFUSED = {
    "no rate": (vit, None, "No rate: pass for example apply_patch_dropout(model, 0.5)"),
    "rate 1": (vit, 1.0, "`rate` must lie in [0, 1), got 1.0"),
    "rate below 0": (vit, -0.1, "got -0.1"),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), 0.5, "its attention is in windows of the grid"),
    "beit": (ARCHITECTURES["beit"].build, 0.5, "its attention has a bias between places of the grid"),
    "dinov3": (ARCHITECTURES["dinov3_vit"].build, 0.5, "its rotary positions are computed for all patches"),
    "mae": (ARCHITECTURES["vit_mae"].build, 0.5, "it hides random patches of every image by itself"),
    "siglip2": (ARCHITECTURES["siglip2"].build, 0.5, "padding of several sizes"),
    "yolos": (ARCHITECTURES["yolos"].build, 0.5, "detection tokens stand behind its patches"),
    "segformer": (
        lambda: hf.SegformerModel(hf.SegformerConfig(depths=[1], num_encoder_blocks=1)),
        0.5,
        "is not possible in SegformerModel",
    ),
    "ceit": (ceit, 0.5, "it convolves or unfolds tokens on the grid of patches"),
    "masked": (
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**VIT, encoder_stride=8)),
        0.5,
        "ViTForMaskedImageModeling puts the tokens back into the grid",
    ),
    "backbone": (
        lambda: DropKeyViTBackbone(DropKeyViTConfig(**VIT)),
        0.5,
        "DropKeyViTBackbone puts the tokens back into the grid",
    ),
    "images in a text": (
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**TOWER),
                text_config=hf.LlamaConfig(
                    vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
                ),
                image_token_index=98,
            )
        ),
        0.5,
        "needs a patch for each image token of its text",
    ),
    "text": (ARCHITECTURES["bert"].build, 0.5, "BertEmbeddings is not among the embeddings"),
    "resnet": (
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")),
        0.5,
        "is not possible in ResNetModel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_allowed_leaves_the_model_alone(case: str) -> None:
    make, rate, told = REFUSED[case]
    model = make()
    # some models have hooks of their own
    before = [dict(part._forward_hooks) for part in model.modules()]
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the text below
        apply_patch_dropout(model, rate)
    assert told in str(raised.value)
    assert [dict(part._forward_hooks) for part in model.modules()] == before


@pytest.mark.parametrize("pattern", ["block", "cross"])
def test_shapes_on_the_grid_are_refused_together_with_it(pattern: str) -> None:
    model = vit()
    apply_dropkey(model, 0.3, pattern=pattern)
    with pytest.raises(ValueError, match=f"DropKey's pattern '{pattern}' at .* masks shapes on the whole grid"):
        apply_patch_dropout(model, 0.5)
    apply_dropkey(model, 0.3, pattern="score")
    apply_patch_dropout(model, 0.5)


def test_another_module_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is not a Transformers model"):
        apply_patch_dropout(nn.Linear(2, 2), 0.1)
