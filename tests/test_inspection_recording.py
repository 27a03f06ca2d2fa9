"""Recorded attention is the model's own, says which tokens it is over, and leaves the model as it was."""

from typing import Any

import pytest
import torch
import transformers as hf
from dropping_models import nano, native, patched, state
from stock_architectures import ARCHITECTURES, build, pixels, tiny_vit
from torch import nn

from hf_dropkey.inspection.recording import TokenLayout, UnreadableAttentionError, record_attention
from hf_dropkey.patching.apply import dropkey_active


@pytest.mark.parametrize("make", [native, patched])
@pytest.mark.parametrize("dropkey", [False, True])
def test_the_weights_are_those_that_transformers_gives(make: Any, dropkey: bool) -> None:
    model = make().train()
    record = record_attention(model, pixels(), dropkey=dropkey, seed=3)
    reference = make().eval()
    reference.set_attn_implementation("eager")
    torch.manual_seed(3)
    with torch.no_grad():
        if dropkey:
            with dropkey_active(reference):
                expected = reference(**pixels(), output_attentions=True).attentions
        else:
            expected = reference(**pixels(), output_attentions=True).attentions
    assert len(record.layers) == len(expected) == 3 and not record.skipped
    for layer, weights in zip(record.layers, expected, strict=True):
        assert torch.equal(layer.weights, weights)
        assert layer.is_square and layer.layout == TokenLayout((4, 4), 1)
    assert ((record.layers[0].weights == 0).float().mean() > 0.3) == dropkey


@pytest.mark.parametrize("pattern", ["score", "key", "token", "block", "cross"])
def test_every_pattern_is_recorded_over_all_keys(pattern: str) -> None:
    record = record_attention(patched(pattern), pixels(), dropkey=True)
    assert all(layer.weights.shape == (2, 4, 17, 17) for layer in record.layers)
    assert (record.layers[0].weights == 0).any()


@pytest.mark.parametrize("make", [native, patched, lambda: nano("volo"), lambda: nano("t2t_vit")])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_generator_are_left_as_they_were(make: Any, fails: bool) -> None:
    model = make()
    model.set_attn_implementation("sdpa")
    model.train()
    next(iter(model.children())).eval()
    before, generator = state(model), torch.random.get_rng_state()
    inputs = pixels(64) if hasattr(model.config, "grid_of") and model.config.image_size == 64 else pixels()
    if fails:
        with pytest.raises(ValueError, match="pixel_values|Images|image"):
            record_attention(model, {"pixel_values": inputs["pixel_values"][..., :-3, :]}, dropkey=True)
    else:
        record_attention(model, inputs, dropkey=True)
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit", 1), ("deit", 2), ("beit", 1), ("dinov2_with_registers", 5), ("dinov3_vit", 3), ("siglip", 0)],
)
def test_tokens_in_front_of_the_patches_are_counted(name: str, prefix: int) -> None:
    record = record_attention(build(name), ARCHITECTURES[name].inputs())
    assert {layer.layout for layer in record.layers} == {TokenLayout((4, 4), prefix)}


@pytest.mark.parametrize(("leading", "accepted"), [(2, True), (3, False), (7, False)])
def test_more_tokens_than_a_model_puts_in_front_are_no_patches(leading: int, accepted: bool) -> None:
    """YOLOS has its detection tokens behind the patches: with the class token, one more than their number."""
    config = hf.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=leading - 1,
    )
    model = hf.YolosModel(config)
    if accepted:
        layers = record_attention(model, pixels()).layers
        assert [layer.layout for layer in layers] == [TokenLayout((4, 4), leading)] * 2
        return
    with pytest.raises(
        UnreadableAttentionError, match=f"its {16 + leading} keys are not the patches of an image of 32 x 32"
    ):
        record_attention(model, pixels())


def test_a_grid_need_not_be_square() -> None:
    images = {"pixel_values": torch.randn(2, 3, 32, 48), "interpolate_pos_encoding": True}
    for model in (tiny_vit(), native()):
        assert {layer.layout for layer in record_attention(model, images).layers} == {TokenLayout((4, 6), 1)}
    wide = {"pixel_values": torch.randn(2, 3, 64, 96), "interpolate_pos_encoding": True}
    layouts = [layer.layout for layer in record_attention(nano("t2t_vit", token_stage="transformer"), wide).layers]
    assert layouts == [TokenLayout((16, 24), 0), TokenLayout((8, 12), 0)] + [TokenLayout((4, 6), 1)] * 4


def reasons(record: Any) -> dict[str, str]:
    return {attention.name: attention.reason for attention in record.skipped}


def test_what_is_no_attention_over_an_image_is_listed_with_the_reason() -> None:
    volo = record_attention(nano("volo"), pixels(64), dropkey=True)
    assert reasons(volo) == {
        f"volo.outlook_layers.{n}.attention": "attends within 16 windows of 9 positions each, not over the image"
        for n in range(2)
    }
    assert [layer.is_square for layer in volo.layers] == [True] * 3 + [False]
    assert volo.layers[-1].weights.shape == (2, 4, 1, 17) and volo.layers[-1].layout.prefix == 1
    ceit = record_attention(nano("ceit"), pixels(64))
    assert reasons(ceit) == {"ceit.class_layer.attention": "not square: 1 queries and 4 keys"}
    t2t = record_attention(nano("t2t_vit"), pixels(64))
    assert set(reasons(t2t).values()) == {"DropKeyT2TViTPerformer computes no attention weights"}
    assert len(t2t.skipped) == 2 and len(t2t.layers) == 4
    siglip = record_attention(build("siglip"), pixels())
    assert "torch.nn.MultiheadAttention" in reasons(siglip)["head"]
    pyramid = record_attention(build("segformer"), pixels(64))
    assert [layer.layout.grid for layer in pyramid.on_last_grid] == [(2, 2)] and len(pyramid.layers) == 2
    # the object queries of a decoder are not patches, also where their number is a square
    detector = hf.DetrConfig(**{**build("detr").config.to_dict(), "num_queries": 16})
    found = record_attention(hf.DetrForObjectDetection(detector), pixels(64))
    assert all(".encoder." in layer.name for layer in found.layers) and len(found.layers) == 2


def test_a_model_without_attention_over_images_is_an_error_that_names_the_next_step() -> None:
    with pytest.raises(UnreadableAttentionError, match="within 16 windows of 16 positions.*`measured_drops`"):
        record_attention(build("swin"), pixels())


def test_bad_images_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="has no DropKey.*Call apply_dropkey"):
        record_attention(tiny_vit(), pixels(), dropkey=True)
    for wrong in (None, torch.zeros(0, 3, 32, 32), torch.zeros(2, 4, 3, 32, 32)):
        with pytest.raises(ValueError, match="at least one.*image processor"):
            record_attention(tiny_vit(), {"pixel_values": wrong})
    holes = pixels()["pixel_values"].clone()
    holes[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"images \[1\] are not finite"):
        record_attention(tiny_vit(), {"pixel_values": holes})
    broken = tiny_vit()
    with torch.no_grad():
        broken.vit.layers[1].attention.q_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"weights of vit\.layers\.1\.attention are not finite"):
        record_attention(broken, pixels())
    with pytest.raises(TypeError, match="not a Transformers model"):
        record_attention(nn.Linear(2, 2), pixels())
