"""What a patched attention computes: in eval and training, with every kind of mask, on every backend, under every tool."""

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import (
    ARCHITECTURES,
    TEXT,
    build,
    count_drops,
    llama,
    loss_of,
    pixels,
    quiet,
    recorded_weights,
    state_of,
    tiny_vit,
    tokens,
)
from torch import nn

from hf_dropkey.patching import dispatch
from hf_dropkey.patching.apply import dropkey, dropkey_active, dropkey_disabled, remove_dropkey
from hf_dropkey.patching.dispatch import (
    DropKeyConfigView,
    SeenPixels,
    causal_mask,
    combined_mask,
    dropkey_interface,
    known_grid,
    leading_tokens,
)


# in training these draw random numbers of their own: dropout, random masks, noisy queries, random scales of positions
RANDOM_WITHOUT_DROPKEY = {
    "beit",
    "bert",
    "conditional_detr",
    "d_fine",
    "deformable_detr",
    "detr",
    "dinov3_vit",
    "rt_detr",
    "segformer",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eval_is_bit_equal_before_with_and_after(name: str) -> None:
    model, inputs = build(name).eval(), ARCHITECTURES[name].inputs()
    before, state = loss_of(model, inputs, 0), state_of(model)
    quiet(model, 0.5, cross_attention=True)
    assert torch.equal(loss_of(model, inputs, 0), before)
    assert state_of(model) != state
    remove_dropkey(model)
    assert torch.equal(loss_of(model, inputs, 0), before)
    assert state_of(model) == state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_varies_with_the_seed_repeats_with_it_and_has_finite_gradients(name: str) -> None:
    model, inputs = build(name).train(), ARCHITECTURES[name].inputs()
    plain = loss_of(model, inputs, 0)
    quiet(model, 0.5, final_ratio=0.2, cross_attention=True)
    loss = loss_of(model, inputs, 0)
    assert torch.equal(loss_of(model, inputs, 0), loss)
    assert not torch.equal(loss, plain)
    if name not in RANDOM_WITHOUT_DROPKEY:
        assert not torch.equal(loss_of(model, inputs, 1), loss)
        with dropkey_disabled(model):
            assert torch.equal(loss_of(model, inputs, 1), plain)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "name", sorted(set(ARCHITECTURES) - {"d_fine", "deformable_detr", "conditional_detr", "segformer"})
)
def test_backends_drop_the_same_scores_for_a_seed(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    losses = {}
    for backend in ("eager", "sdpa"):
        model = build(name).train()
        quiet(model, 0.4, final_ratio=0.2, cross_attention=True, backend=backend)
        losses[backend] = loss_of(model, inputs, 3)
    torch.testing.assert_close(losses["eager"], losses["sdpa"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_where_nothing_is_drawn_the_numbers_are_those_of_the_model(name: str, backend: str) -> None:
    # a ratio above 0 runs DropKey's attention with all masks, biases and scales; this one never draws a key
    model, inputs = build(name).eval(), ARCHITECTURES[name].inputs()
    quiet(model, 1e-12, cross_attention=True, backend=backend)
    with dropkey_disabled(model):
        expected = loss_of(model, inputs, 0)
    with dropkey_active(model):
        found = loss_of(model, inputs, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- what an attention may ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_grouped_queries_and_causal_masks(padded: bool) -> None:
    inputs = {"input_ids": tokens()["input_ids"], "use_cache": False}
    if padded:
        inputs["attention_mask"] = tokens()["attention_mask"]
    model = llama()
    report = quiet(model, 0.4, schedule="constant", backend="eager")
    assert {site.side for site in report.sites} == {"decoder"}
    counts = count_drops(model, inputs, 40)
    for count in counts.values():
        assert count.deviation < 4.5
        assert count.on_hidden == 0
        assert count.hidden >= 40 * 2 * 4 * 45
    eager = loss_of(model, inputs, 5)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(loss_of(model, inputs, 5), eager)
    with torch.no_grad(), dropkey_active(model):
        # the last token changes nothing before it
        ids = inputs["input_ids"].clone()
        ids[:, -1] = 5
        torch.manual_seed(0)
        first = model(**inputs).last_hidden_state[0, :-1]
        torch.manual_seed(0)
        second = model(**{**inputs, "input_ids": ids}).last_hidden_state[0, :-1]
    torch.testing.assert_close(first, second)


@pytest.mark.skipif(
    "get_interface" not in inspect.getsource(hf.models.t5.modeling_t5),
    reason=f"T5 of Transformers {hf.__version__} computes its own softmax, not through the attention interface",
)
def test_position_biases_are_no_padding() -> None:
    config = hf.T5Config(
        vocab_size=99, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, num_decoder_layers=2, dropout_rate=0.0
    )
    torch.manual_seed(0)
    model = hf.T5Model(config).train()
    with torch.no_grad():
        # a bias of -80 is no padding: the key is as good as any once the others are gone
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(3).sub_(80)
    inputs = {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :5]}
    report = quiet(model, 0.4, schedule="constant", cross_attention=True, backend="eager")
    assert [(site.side, site.kind) for site in report.sites] == [("encoder", "self")] * 2 + [
        ("decoder", "self"),
        ("decoder", "cross"),
    ] * 2
    for count in count_drops(model, inputs, 20).values():
        assert count.deviation < 4.5
        assert count.on_hidden == 0
    report = quiet(model, 1e-12, cross_attention=True)
    assert len(report.sites) == 6
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        active = sum_of_hidden(model, inputs)
        with dropkey_disabled(model):
            torch.testing.assert_close(active, sum_of_hidden(model, inputs))
    quiet(model, 0.4, cross_attention=True)
    model.set_attn_implementation("eager")
    eager = sum_of_hidden(model, inputs)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(sum_of_hidden(model, inputs), eager)


def sum_of_hidden(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(7)
    return model(**inputs).last_hidden_state


def test_scores_are_scaled_by_the_head_width_unless_told() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5, backend="eager")
    module = model.vit.layers[0].attention
    query, key, value = torch.randn(3, 2, 4, 17, 8)
    weights = []
    for scaling in (None, 8**-0.5, 1.0):
        torch.manual_seed(0)
        weights.append(dropkey_interface(module, query, key, value, None, scaling=scaling)[1])
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize(("queries", "keys"), [(1, 4), (2, 2), (3, 3), (2, 4)])
def test_a_causal_mask_hides_later_keys(queries: int, keys: int) -> None:
    """A single query, as in decoding with a cache, attends to all keys."""
    query, key = torch.zeros(1, 1, queries, 2), torch.zeros(1, 1, keys, 2)
    mask = causal_mask(query, key)
    if queries == 1:
        assert mask is None
        return
    assert mask.tolist() == [[[[key <= query for key in range(keys)] for query in range(queries)]]]


def test_masks_and_position_biases_become_one() -> None:
    """Hidden keys get the lowest float of the mask or the bias; everything else stays as it is."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.tensor([[1.0, -80.0, 3.0]]).expand(1, 1, 2, 3)
    assert combined_mask(None, None, 3) is None
    assert combined_mask(None, bias, 3) is bias
    padding = torch.tensor([[1, 1, 0]])
    assert combined_mask(padding, None, 3) is padding
    hidden = [[[[1.0, -80.0, lowest]] * 2], [[[1.0, lowest, lowest]] * 2]]
    two = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for visible in (two, two.bool(), two.bool()[:, None, None]):
        assert combined_mask(visible, bias, 3).tolist() == hidden
    # a float mask may be longer than the keys, and hides what is at -50 or below
    additive = torch.tensor([[[[0.5, -49.0, -50.0, -100.0, 0.0]]]])
    assert combined_mask(additive, None, 4).tolist() == [[[[0.5, -49.0, lowest, lowest]]]]
    assert combined_mask(additive[..., 1:], bias, 3).tolist() == [[[[-48.0, lowest, lowest]] * 2]]
    half = combined_mask(additive.half(), None, 3)
    assert half.dtype == torch.float16 and half[0, 0, 0, 2] == torch.finfo(torch.float16).min


def test_a_view_reads_and_writes_the_configuration_itself() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5)
    module = model.vit.layers[0].attention
    view = module.config
    assert isinstance(view, DropKeyConfigView) and view.dropkey_config is model.config
    assert (
        view._attn_implementation == "dropkey" and view.dropkey_backend == model.config._attn_implementation == "sdpa"
    )
    module.eval()
    assert view._attn_implementation == "sdpa"
    view._attn_implementation = "eager"
    view.some_setting = 3
    assert model.config._attn_implementation == "eager" and model.config.some_setting == view.some_setting == 3
    del model.config.some_setting
    model.config._attn_implementation_internal = None
    assert view.dropkey_backend == "eager"
    with pytest.raises(AttributeError, match="no_such_setting"):
        _ = view.no_such_setting


def test_an_attention_that_caps_its_scores_is_refused_in_training() -> None:
    config = hf.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=20.0)
    model = hf.Gemma2Model(config).train()
    quiet(model, 0.3, backend="eager")
    with pytest.raises(ValueError, match="asks for `softcap`"):
        model(tokens()["input_ids"], use_cache=False)
    model.eval()(tokens()["input_ids"], use_cache=False)


def test_a_single_key_is_never_dropped() -> None:
    model = hf.SegformerModel(
        hf.SegformerConfig(
            depths=[1],
            num_encoder_blocks=1,
            hidden_sizes=[8],
            num_attention_heads=[2],
            sr_ratios=[8],
            drop_path_rate=0.0,
        )
    ).train()
    quiet(model, 0.9, backend="eager")
    with recorded_weights(model) as weights:
        model(**pixels(32))
    (weight,) = weights.values()
    assert weight.shape[-1] == 1
    assert (weight == 1).all()


@pytest.mark.parametrize("pattern", ["key", "token", "block", "cross"])
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "swin"])
def test_patterns_drop_their_ratio(name: str, pattern: str) -> None:
    model, inputs = build(name).train(), ARCHITECTURES[name].inputs()
    quiet(model, 0.25, schedule="constant", pattern=pattern, window=2, backend="eager")
    if name == "swin" and pattern == "token":
        with pytest.raises(ValueError, match=r"'token'.*for all queries and heads"):
            model(**inputs)
        return
    dropped: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), recorded_weights(model) as weights:
        for seed in range(60):
            loss_of(model, inputs, seed)
            for site, weight in weights.items():
                patches = weight[..., -16:]
                dropped.setdefault(site, []).append((patches == 0).float().mean())
                if pattern in ("block", "cross") and weight.shape[-1] > 16:
                    assert (weight[..., :-16] > 0).all()
    if name != "swin":
        for site, fractions in dropped.items():
            assert torch.stack(fractions).mean().item() == pytest.approx(0.25, abs=0.03), site


@pytest.mark.parametrize("name", ["yolos", "videomae", "detr"])
def test_a_window_pattern_without_a_known_grid_is_refused(name: str) -> None:
    model = build(name).train()
    quiet(model, 0.3, pattern="block")
    with pytest.raises(ValueError, match="needs to know the patch grid"):
        model(**ARCHITECTURES[name].inputs())


# --- backends ---------------------------------------------------------------------------------------------------------


def test_a_change_of_backend_keeps_dropkey() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5)
    expected = loss_of(model, pixels(), 0)
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        torch.testing.assert_close(loss_of(model, pixels(), 0), expected)
        assert not torch.equal(loss_of(model, pixels(), 1), expected)


def test_a_backend_that_cannot_drop_scores_raises_in_training_and_runs_in_eval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def flash(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        calls.append(module)
        return query.transpose(1, 2), None

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "flash_attention_2", flash)
    model = tiny_vit().train()
    quiet(model, 0.5)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot leave out single attention scores"):
        model(**pixels())
    model.eval()(**pixels())
    assert len(calls) == 3
    remove_dropkey(model)
    with pytest.raises(ValueError, match="Pass backend="):
        quiet(model, 0.5)
    quiet(model, 0.5, backend="sdpa")
    loss_of(model.train(), pixels(), 0)


@pytest.mark.slow
def test_flex_attention_drops_the_same_scores() -> None:
    # on a CPU it has no backward, so in inference
    model = tiny_vit().eval()
    outputs = {}
    for backend in ("sdpa", "flex_attention"):
        report = quiet(model, 0.5, backend=backend)
        assert {site.backend for site in report.sites} == {backend}
        torch.manual_seed(0)
        with torch.no_grad(), dropkey_active(model):
            outputs[backend] = model(**pixels()).logits
    torch.testing.assert_close(outputs["flex_attention"], outputs["sdpa"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = model(**pixels()).logits
    assert not torch.allclose(outputs["sdpa"], plain, atol=1e-2)


def test_whole_tokens_are_dropped_on_any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def flash(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        keys.append(key.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "flash_attention_2", flash)
    model = tiny_vit().train()
    model.config._attn_implementation = "flash_attention_2"
    quiet(model, 0.5, schedule="constant", pattern="token")
    model(**pixels())
    assert keys == [9] * 3, "17 keys less round(0.5 * 17)"
    # grouped queries, whose keys the plain function repeats
    outputs = []
    for backend in ("eager", "sdpa"):
        grouped = llama(is_causal=False, attn_implementation=backend)
        quiet(grouped, 0.5, pattern="token")
        outputs.append(sum_of_hidden(grouped, {"input_ids": tokens()["input_ids"], "use_cache": False}))
    torch.testing.assert_close(*outputs)
    causal = llama(attn_implementation="sdpa")
    quiet(causal, 0.5, pattern="token")
    with pytest.raises(ValueError, match=r"'token'.*for all queries and heads"):
        causal(tokens()["input_ids"], use_cache=False)


# --- the tools of training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin", "detr"])
def test_activation_checkpointing_is_bit_equal(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    gradients = []
    for checkpointing in (False, True):
        model = build(name).train()
        if not model.supports_gradient_checkpointing:
            pytest.fail(f"{name} has no activation checkpointing")
        quiet(model, 0.5, cross_attention=True)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, inputs, 0).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
def test_a_compiled_model_drops_the_same_keys(backend: str) -> None:
    torch._dynamo.reset()
    model = tiny_vit(num_hidden_layers=1).train()
    quiet(model, 0.5, backend=backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = loss_of(model, pixels(), 0)
    loss = loss_of(compiled, pixels(), 0)
    torch.testing.assert_close(loss, expected)
    assert not torch.equal(loss_of(compiled, pixels(), 1), loss)
    loss.backward()
    model.eval()
    torch.testing.assert_close(loss_of(compiled, pixels(), 0), loss_of(model, pixels(), 0))
    # settings may change under a compiled model, and apply to it as to the model
    quiet(compiled, 0.2, backend=backend)
    model.train()
    torch.testing.assert_close(loss_of(compiled, pixels(), 0), loss_of(model, pixels(), 0))


@pytest.mark.parametrize(("registers", "most"), [(None, 2), (0, 2), (4, 6)])
def test_what_may_stand_in_front_of_the_patches(registers: int | None, most: int) -> None:
    """A class token, a distillation token and the registers; the pattern's grid and recorded attention follow the rule."""
    config = hf.ViTConfig(image_size=32, patch_size=8)
    if registers is not None:
        config.num_register_tokens = registers
    for leading in range(most + 3):
        expected = leading if leading <= most else None
        assert leading_tokens(config, 16 + leading, (4, 4)) == expected
    assert leading_tokens(config, 15, (4, 4)) is None


def test_a_compiled_stock_model_takes_one_graph_for_all_layers_and_steps() -> None:
    """Each layer compiled by itself, with ratios that differ by layer and change by step."""
    torch._dynamo.reset()
    model, graphs = tiny_vit(num_hidden_layers=4).train(), []
    quiet(model, 0.4, final_ratio=0.1, backend="sdpa")

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    layers = [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    for step in range(1, 4):
        for depth, layer in enumerate(layers):
            layer.attention.dropkey_ratio = 0.05 * step + 0.02 * depth
        loss_of(model, pixels(), 0).backward()
    assert len(layers) == 4 and len(graphs) == 1


def test_patched_modules_copy_pickle_and_go_back_to_their_class() -> None:
    model = tiny_vit(num_hidden_layers=1)
    attention = next(module for module in model.modules() if type(module).__name__ == "ViTAttention")
    plain_class = type(attention)
    quiet(model, 0.3)
    assert type(attention) is not plain_class and isinstance(attention, plain_class)
    assert (type(attention).__name__, type(attention).__module__) == (plain_class.__name__, plain_class.__module__)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(other.train(), pixels(), 1), loss_of(model.train(), pixels(), 1))
        found = next(module for module in other.modules() if type(module).__name__ == "ViTAttention")
        assert type(found) is type(attention) and found is not attention
        remove_dropkey(other)
        assert type(found) is plain_class and not [name for name in vars(found) if "dropkey" in name]
    remove_dropkey(model)
    assert type(attention) is plain_class and not [name for name in vars(attention) if "dropkey" in name]


@pytest.mark.parametrize("name", ["vit", "swin", "detr", "bert"])
def test_bfloat16(name: str) -> None:
    model = build(name).to(torch.bfloat16).train()
    # the losses of detection are not implemented in bfloat16 on a CPU
    inputs = {name: value for name, value in ARCHITECTURES[name].inputs().items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    quiet(model, 0.5, cross_attention=True)
    loss = loss_of(model, inputs, 0)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(loss_of(model, inputs, 0), loss)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, {**pixels(), "labels": torch.tensor([0, 1])}, 0)
    loss.backward()
    assert loss.isfinite()


def test_training_on_boxes_learns() -> None:
    model = build("detr").train()
    quiet(model, 0.3, cross_attention=True)
    inputs = ARCHITECTURES["detr"].inputs()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(25):
        loss = loss_of(model, inputs, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- the patch grid of "block" and "cross" ------------------------------------------------------------------------------

GRIDS = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, {"interpolate_pos_encoding": True}),
    "dinov2": (hf.Dinov2ForImageClassification, hf.Dinov2Config, {}),
    "dinov2_with_registers": (hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersConfig, {}),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, {}),
}
SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int] | None]:
    """The grids that the attentions of a model take."""
    found: list[tuple[int, int] | None] = []
    known = dispatch.known_grid

    def spy(module: Any, keys: int) -> tuple[int, int] | None:
        found.append(known(module, keys))
        return found[-1]

    monkeypatch.setattr(dispatch, "known_grid", spy)
    return found


def grid_model(name: str, **more: Any) -> Any:
    cls, config, _ = GRIDS[name]
    return cls(config(**SMALL_VIT, **more)).train()


@pytest.mark.parametrize("size", [(64, 64), (32, 128), (128, 32), (104, 40), (56, 72), (72, 56), (48, 80), (61, 83)])
@pytest.mark.parametrize("name", GRIDS)
def test_the_patch_grid_is_that_of_the_images(name: str, size: tuple[int, int], grids: Any) -> None:
    model, arguments = grid_model(name), GRIDS[name][2]
    quiet(model, 0.3, pattern="block")
    model(pixel_values=torch.randn(1, 3, *size), **arguments)
    assert grids == [(size[0] // 8, size[1] // 8)]
    # the first argument by place
    model(torch.randn(2, 3, size[1], size[0]), **arguments)
    assert grids[-1] == (size[1] // 8, size[0] // 8)


def test_the_patch_grid_of_a_vision_tower_and_of_wrapped_models(grids: Any) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**shape, "vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8})
    model = hf.CLIPModel(config).train()
    quiet(model, 0.3, pattern="cross", window=1, exclude="text_model*")
    words = torch.tensor([[1, 5, 2]])
    model(input_ids=words, pixel_values=torch.randn(1, 3, 16, 64), interpolate_pos_encoding=True)
    assert grids == [(2, 8)]
    wrapped = torch.nn.ModuleList([model])
    wrapped[0].get_image_features(torch.randn(1, 3, 32, 32))
    assert grids[-1] == (4, 4)


@pytest.mark.parametrize("pattern", ["block", "cross"])
@pytest.mark.parametrize(("patch", "grid"), [(8, (4, 8)), ([8, 16], (4, 4)), ((16, 8), (2, 8))])
@pytest.mark.parametrize("training", [True, False])
def test_a_grid_is_that_of_the_images_of_the_mode(pattern: str, patch: Any, grid: Any, training: bool) -> None:
    """With a patch size of one number or of two; the images of the other mode do not count."""
    seen, other = SeenPixels(), (160, 160)
    seen.trained, seen.evaluated = ((32, 64), other) if training else (other, (32, 64))
    module = SimpleNamespace(
        dropkey_pattern=pattern, training=training, dropkey_pixels=seen, config=SimpleNamespace(patch_size=patch)
    )
    keys = grid[0] * grid[1]
    assert known_grid(module, keys + 1) == known_grid(module, keys) == grid
    with pytest.raises(ValueError, match=rf"the {keys + 3} keys .* \(\(32, 64\) pixels\)"):
        known_grid(module, keys + 3)
    module.dropkey_pattern = "score"
    assert known_grid(module, keys + 3) is None


@pytest.mark.parametrize(
    ("keys", "grid"), [(16, (4, 4)), (9, (3, 3)), (1, (1, 1)), (25, None), (12, None), (15, None)]
)
def test_windows_are_square_and_at_most_the_configured_size(keys: int, grid: tuple[int, int] | None) -> None:
    seen = SeenPixels()
    seen.trained = 32, 32
    config = SimpleNamespace(patch_size=2, window_size=4)
    module = SimpleNamespace(dropkey_pattern="block", training=True, dropkey_pixels=seen, config=config)
    if grid is not None:
        assert known_grid(module, keys) == grid
        seen.trained = None
    with pytest.raises(ValueError, match="needs to know the patch grid"):
        known_grid(module, keys)


def test_a_copy_sees_its_own_images(grids: Any) -> None:
    model = grid_model("dinov2")
    quiet(model, 0.3, pattern="block")
    other = copy.deepcopy(model)
    model(torch.randn(1, 3, 32, 128))
    other(torch.randn(1, 3, 128, 32))
    assert grids == [(4, 16), (16, 4)]


def test_the_hooks_are_there_while_a_pattern_needs_them() -> None:
    model = grid_model("vit")

    def counts() -> int:
        return sum(len(part._forward_pre_hooks) for part in model.modules())

    quiet(model, 0.3)
    # that of the argument `sample_ids`
    assert counts() == 1
    with dropkey(model, 0.3, pattern="block", verbose=False):
        assert counts() == 3
        quiet(model, 0.3, pattern="cross")
        assert counts() == 3
    assert counts() == 1
    quiet(model, 0.3, pattern="block")
    remove_dropkey(model)
    assert counts() == 0 and not any("dropkey_pixels" in vars(part) for part in model.modules())


def test_compiled_models_take_the_grid_of_their_images(grids: Any) -> None:
    model = grid_model("dinov2")
    quiet(model, 0.3, pattern="block", backend="sdpa")
    for size in ((32, 128), (128, 32)):
        torch.manual_seed(0)
        expected = model(pixel_values=torch.ones(1, 3, *size)).logits
        torch.manual_seed(0)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(pixel_values=torch.ones(1, 3, *size)).logits, expected)


def test_gradient_checkpointing_computes_with_the_grid_of_the_step() -> None:
    model = grid_model("dinov2")
    quiet(model, 0.3, pattern="block", backend="sdpa")
    gradients = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.train)()
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(pixel_values=torch.ones(1, 3, 32, 128)).logits.sum()
        # an evaluation between the two passes
        with torch.no_grad():
            model.eval()(pixel_values=torch.ones(1, 3, 128, 32))
        model.train()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)
    with pytest.raises(
        ValueError, match=r"images of \(128, 32\) pixels .* after \(32, 128\) under gradient checkpointing"
    ):
        model(pixel_values=torch.ones(1, 3, 128, 32))


def test_without_pixel_values_there_is_no_grid() -> None:
    model = grid_model("dinov2")
    quiet(model, 0.3, pattern="block")
    with pytest.raises(ValueError, match=r"needs to know the patch grid, .* \(None pixels\)"):
        model.dinov2.encoder(torch.randn(1, 65, 48))
