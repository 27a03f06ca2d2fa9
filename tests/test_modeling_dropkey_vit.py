"""DropKeyViT beside stock ViT: same numbers without drop, checkpoints in both directions, Transformers' features."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_dropkey import (
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
)


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "encoder_stride": 8,
    "num_labels": 5,
}
PAIRS = {
    "base": (ViTModel, DropKeyViTModel),
    "classification": (ViTForImageClassification, DropKeyViTForImageClassification),
    "masked": (ViTForMaskedImageModeling, DropKeyViTForMaskedImageModeling),
}
BACKENDS = ["eager", "sdpa"]


class MyBase(DropKeyViTModel):
    """A user's subclass of the base."""


class MyClassifier(DropKeyViTForImageClassification):
    """A user's subclass of a head, whose name tells Transformers nothing about the loss."""


def pixels(batch: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(5))


def stock(kind: str, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return PAIRS[kind][0](ViTConfig(**TINY, **kwargs)).eval()


def dropkey(kind: str, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return PAIRS[kind][1](DropKeyViTConfig(**{**TINY, "dropkey_ratio": 0.3, **kwargs})).eval()


def first_output(model: torch.nn.Module, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(inputs, return_dict=False, **kwargs)[0]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("backend", [*BACKENDS, "dropkey_triton"])
def test_eval_and_ratio_zero_are_bit_identical_to_stock(kind: str, backend: str) -> None:
    """The same seed gives the same initial weights too, gradients in training at ratio 0 included."""
    plain, ours, off = stock(kind), dropkey(kind), dropkey(kind, dropkey_ratio=0)
    for model in (plain, ours, off):
        model.set_attn_implementation("sdpa" if model is plain and backend == "dropkey_triton" else backend)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name
    assert torch.equal(first_output(plain, pixels()), first_output(ours, pixels()))
    for model in (plain, off):
        first_output(model.train(), pixels()).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), off.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("pattern", ["score", "key", "token", "block", "cross"])
def test_training_drops_by_seed_and_equally_on_every_backend(kind: str, pattern: str) -> None:
    model = dropkey(kind, dropkey_pattern=pattern, dropkey_window=2).train()
    plain = first_output(model.eval(), pixels())
    outputs: dict[tuple[str, int], list[torch.Tensor]] = {}
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        model.train()
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.setdefault((backend, seed), []).append(first_output(model, pixels()))
    for backend in BACKENDS:
        assert torch.equal(*outputs[backend, 1])
        assert not torch.allclose(outputs[backend, 1][0], outputs[backend, 2][0], atol=1e-5)
        assert not torch.allclose(outputs[backend, 1][0], plain, atol=1e-5)
    torch.testing.assert_close(outputs["eager", 1][0], outputs["sdpa", 1][0], rtol=0, atol=1e-5)


def test_each_layer_drops_its_share() -> None:
    model = dropkey("base", attn_implementation="eager", dropkey_final_ratio=0.1).train()
    torch.manual_seed(0)
    attentions = model(pixels(64), output_attentions=True).attentions
    for weights, ratio in zip(attentions, [0.3, 0.2, 0.1], strict=True):
        sigma = (ratio * (1 - ratio) / weights.numel()) ** 0.5
        assert abs((weights == 0).double().mean() - ratio) < 4 * sigma
    assert [layer.attention.dropkey_ratio for layer in model.layers] == pytest.approx([0.3, 0.2, 0.1])


def test_block_grid_follows_interpolated_images() -> None:
    """At 64 x 32 pixels the patch grid is 8 x 4: a block as wide as the grid drops whole pairs of patch rows."""
    model = dropkey("base", dropkey_pattern="block", dropkey_window=4, attn_implementation="eager").train()
    images = torch.randn(8, 3, 64, 32)
    weights = model(images, interpolate_pos_encoding=True, output_attentions=True).attentions[0]
    assert weights.shape[-1] == 33 and (weights[..., 0] > 0).all()
    grids = (weights[..., 1:] == 0).unflatten(-1, (8, 4))
    full_rows = grids.all(-1).float().mean()
    assert full_rows > 0.02, "independent drops would empty a patch row with probability 0.3 ** 4"


# --- features of Transformers -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_gives_bit_equal_gradients(use_reentrant: bool, backend: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = dropkey("classification", hidden_dropout_prob=0.1, attn_implementation=backend).train()
        if checkpointing:
            # the name that the whole range of supported releases knows
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(7)
        model(pixels().requires_grad_(), labels=torch.arange(4)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("backend", "pattern"), [("eager", "score"), ("sdpa", "token"), ("sdpa", "block")])
def test_compiles_without_graph_breaks(backend: str, pattern: str) -> None:
    torch._dynamo.reset()
    settings = {"attn_implementation": backend, "dropkey_pattern": pattern, "dropkey_window": 2}
    # the problem type is set by the first loss otherwise, which compiles everything twice
    model = dropkey(
        "classification", num_hidden_layers=2, problem_type="single_label_classification", **settings
    ).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(compiled(pixels(), labels=torch.arange(4)).loss)
    losses[0].backward()
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    torch.manual_seed(1)
    torch.testing.assert_close(model(pixels(), labels=torch.arange(4)).loss, losses[0])


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model = dropkey("classification").train()
    compiled = torch.compile(model, fullgraph=True)
    torch.manual_seed(1)
    first = compiled(pixels(), labels=torch.arange(4)).loss
    torch.manual_seed(1)
    assert torch.equal(first, compiled(pixels(), labels=torch.arange(4)).loss)
    model.eval()
    torch.testing.assert_close(compiled(pixels()).logits, model(pixels()).logits, rtol=1e-4, atol=1e-5)


def test_exports_in_eval() -> None:
    model = dropkey("classification")
    program = torch.export.export(model, (pixels(),), strict=False)
    torch.testing.assert_close(program.module()(pixels()).logits, model(pixels()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_trains(dtype: torch.dtype, backend: str) -> None:
    model = dropkey("classification", attn_implementation=backend, dropkey_ratio=0.9).to(dtype).train()
    model(pixels().to(dtype), labels=torch.arange(4)).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_autocast_draws_the_same_keys() -> None:
    model = dropkey("classification", attn_implementation="eager").train()
    torch.manual_seed(3)
    exact = model(pixels(), output_attentions=True).attentions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        low = model(pixels(), output_attentions=True).attentions
    for one, other in zip(exact, low, strict=True):
        assert torch.equal(one == 0, other == 0)


def test_records_hidden_states_and_attentions() -> None:
    model = dropkey("classification", attn_implementation="eager").train()
    output = model(pixels(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and output.hidden_states[0].shape == (4, 17, 32)
    assert [weights.shape for weights in output.attentions] == [(4, 4, 17, 17)] * 3


@pytest.mark.parametrize("pattern", ["score", "key", "token"])
def test_padding_mask_is_never_attended(pattern: str) -> None:
    model = dropkey("base", attn_implementation="eager", dropkey_ratio=0.9, dropkey_pattern=pattern).train()
    mask = torch.ones(4, 17, dtype=torch.long)
    mask[:, 3:] = 0
    torch.manual_seed(1)
    output = model(pixels(), attention_mask=mask, output_attentions=True)
    for weights in output.attentions:
        assert not weights[..., 3:].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4, 17))
    model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    torch.testing.assert_close(model(pixels(), attention_mask=mask)[0], output[0], rtol=0, atol=1e-5)


def test_masked_image_modeling_trains() -> None:
    model = dropkey("masked").train()
    output = model(pixels(), bool_masked_pos=torch.rand(4, 16) < 0.5)
    output.loss.backward()
    assert output.reconstruction.shape == (4, 3, 32, 32)
    assert model.vit.embeddings.mask_token.grad.abs().sum() > 0


def test_device_map_places_whole_layers(tmp_path: Path) -> None:
    dropkey("classification").save_pretrained(tmp_path)
    model = DropKeyViTForImageClassification.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(model(pixels()).logits, dropkey("classification")(pixels()).logits)
    assert "DropKeyViTLayer" in model._no_split_modules


def test_flash_attention_is_refused_in_training_only() -> None:
    """The name is set on the configuration, because the check that flash-attn is installed comes before any drop."""
    model = dropkey("classification").train()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot leave out single attention scores"):
        model(pixels())


# --- loss -------------------------------------------------------------------------------------------------------------


def test_subclass_gets_the_classification_loss() -> None:
    torch.manual_seed(0)
    model = MyClassifier(DropKeyViTConfig(**TINY))
    assert model.loss_type == "ForImageClassification"
    model.eval()
    labels = torch.arange(4)
    output = model(pixels(), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_accumulated_losses_equal_the_loss_of_the_whole_batch(problem: str) -> None:
    """As Trainer does it: every micro batch divides by the targets of the whole batch, and losses are summed."""
    torch.manual_seed(0)
    labels = {
        "single_label_classification": torch.arange(4),
        "multi_label_classification": (torch.rand(4, 5) < 0.5).float(),
        "regression": torch.randn(4, 5),
    }[problem]
    model = dropkey("classification", problem_type=problem)
    whole = model(pixels(), labels=labels).loss
    count = labels.ne(-100).sum()
    parts = [model(pixels()[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def write_layout(model: torch.nn.Module, folder: Path, layout: str) -> Path:
    """Saves a stock model in the layout before Transformers 5.9 ("old", still the default) or after ("new")."""
    model.save_pretrained(folder, save_original_format=layout == "old")
    names = set(load_file(folder / "model.safetensors"))
    marker = "encoder.layer.0.attention.attention.query" if layout == "old" else "layers.0.attention.q_proj"
    assert any(marker in name for name in names), "the folder is not in the layout the test is about"
    return folder


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("subclass", [False, True])
def test_stock_checkpoints_load_whole(tmp_path: Path, layout: str, kind: str, subclass: bool) -> None:
    plain = stock(kind)
    write_layout(plain, tmp_path, layout)
    ours = PAIRS[kind][1]
    if subclass:
        ours = {"base": MyBase, "classification": MyClassifier, "masked": type("MyMasked", (ours,), {})}[kind]
    model, report = ours.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(first_output(plain, pixels()), first_output(model, pixels()))


@pytest.mark.parametrize("layout", ["old", "new"])
def test_only_real_head_differences_are_reported(tmp_path: Path, layout: str) -> None:
    plain = stock("classification")
    write_layout(plain, tmp_path, layout)
    model, report = MyBase.from_pretrained(tmp_path, output_loading_info=True, add_pooling_layer=False)
    assert not report["missing_keys"]
    assert report["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(plain.vit(pixels())[0], model(pixels())[0])
    _, report = DropKeyViTForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"}
    base_folder = tmp_path / "base"
    write_layout(stock("base"), base_folder, layout)
    _, report = MyClassifier.from_pretrained(base_folder, output_loading_info=True, num_labels=5)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("original", [True, False])
def test_what_we_save_opens_in_stock_vit(tmp_path: Path, kind: str, original: bool) -> None:
    model = dropkey(kind)
    model.save_pretrained(tmp_path, save_original_format=original)
    plain, report = PAIRS[kind][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(first_output(plain, pixels()), first_output(model, pixels()))
    again = PAIRS[kind][1].from_pretrained(tmp_path)
    assert torch.equal(first_output(again, pixels()), first_output(model, pixels()))
    assert again.config.dropkey_ratio == 0.3


def test_settings_given_to_from_pretrained_take_effect(tmp_path: Path) -> None:
    stock("classification").save_pretrained(tmp_path)
    model = DropKeyViTForImageClassification.from_pretrained(
        tmp_path, dropkey_ratio=0.3, dropkey_schedule="constant", attn_implementation="eager"
    ).train()
    assert [layer.attention.dropkey_ratio for layer in model.vit.layers] == [0.3] * 3
    weights = model(pixels(64), output_attentions=True).attentions[-1]
    assert 0.29 < (weights == 0).double().mean() < 0.31
    with pytest.raises(StrictDataclassError, match=r"\[0, 1\), got 1.5"):
        DropKeyViTForImageClassification.from_pretrained(tmp_path, dropkey_ratio=1.5)
    with pytest.raises(ValueError, match="must not exceed"):
        DropKeyViTForImageClassification.from_pretrained(tmp_path, dropkey_ratio=0.1, dropkey_final_ratio=0.2)


def test_bare_load_state_dict_reads_both_layouts(tmp_path: Path) -> None:
    """What `Trainer` does to resume and to load its best checkpoint."""
    model = dropkey("classification")
    model.save_pretrained(tmp_path)
    other = DropKeyViTForImageClassification(DropKeyViTConfig(**TINY)).eval()
    weights = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in weights
    result = other.load_state_dict(weights, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model(pixels()).logits, other(pixels()).logits)
    other.load_state_dict(model.state_dict(), strict=True)
    weights.pop("vit.encoder.layer.0.attention.attention.query.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(weights, strict=True)


def test_auto_classes_find_the_installed_classes(tmp_path: Path) -> None:
    dropkey("classification").save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DropKeyViTConfig
    for auto, kind in [
        (AutoModel, "base"),
        (AutoModelForImageClassification, "classification"),
        (AutoModelForMaskedImageModeling, "masked"),
    ]:
        assert type(auto.from_pretrained(tmp_path)) is PAIRS[kind][1]


def test_missing_files_are_named(tmp_path: Path) -> None:
    dropkey("classification").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        DropKeyViTForImageClassification.from_pretrained(tmp_path)


def test_saving_twice_over_itself_and_deep_copies(tmp_path: Path) -> None:
    model = dropkey("classification")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(DropKeyViTForImageClassification.from_pretrained(tmp_path))
    assert torch.equal(model(pixels()).logits, again(pixels()).logits)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoBackbone",
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForMaskedImageModeling",
    }


def test_a_checkpoint_with_foreign_keys_is_reported(tmp_path: Path) -> None:
    dropkey("classification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["surprise"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = DropKeyViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {"surprise"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropkey_ratio": 1.0}, r"\[0, 1\), got 1.0"),
        ({"dropkey_ratio": -0.1}, r"\[0, 1\), got -0.1"),
        ({"dropkey_ratio": float("nan")}, r"\[0, 1\), got nan"),
        ({"dropkey_ratio": "0.1"}, "'0.1'"),
        ({"dropkey_final_ratio": 1.2}, r"\[0, 1\), got 1.2"),
        ({"dropkey_schedule": "cosine"}, "'decreasing', 'constant', 'increasing'"),
        ({"dropkey_pattern": "column"}, "'score', 'key', 'token', 'block', 'cross'"),
        ({"dropkey_window": 0}, "at least 1 patch, got 0"),
        ({"dropkey_pattern": "block", "dropkey_window": 5}, "between 1 and 4.*4 x 4 patch grid, got 5"),
        ({"attention_probs_dropout_prob": 0.1}, "DropKey replaces dropout on attention weights"),
        ({"dropkey_final_ratio": 0.2}, "must not exceed"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        DropKeyViTConfig(**TINY, **{"dropkey_ratio": 0.1, **settings})


def test_both_dropouts_are_possible_when_asked_for() -> None:
    config = DropKeyViTConfig(**TINY, attention_probs_dropout_prob=0.5, dropkey_with_attention_dropout=True)
    model = DropKeyViTModel(config).train()
    model.set_attn_implementation("eager")
    weights = model(pixels(32), output_attentions=True).attentions[-1]
    assert 0.45 < (weights == 0).double().mean() < 0.55, "the last layer has no DropKey, only dropout"
    assert DropKeyViTConfig(**TINY, attention_probs_dropout_prob=0.5, dropkey_ratio=0).dropkey_ratio == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1, 32, 32), r"\[batch, 3, 32, 32\], got \(4, 1, 32, 32\)"),
        ((3, 32, 32), r"\[batch, 3, 32, 32\], got \(3, 32, 32\)"),
        ((4, 3, 30, 32), "30 x 32 pixels do not match the model's 32 x 32.*interpolate_pos_encoding=True"),
    ],
)
def test_wrong_images_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropkey("classification")(torch.zeros(shape))


def test_missing_images_are_refused() -> None:
    with pytest.raises(ValueError, match="`pixel_values` must have the shape.*got None"):
        dropkey("classification")()


def test_another_architecture_is_refused_and_a_plain_vit_loads_without_a_warning(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(
        ValueError, match=r"has model_type 'dinov2' and DropKeyViTConfig reads dropkey_vit, vit.*apply_dropkey"
    ):
        DropKeyViTModel.from_pretrained(tmp_path / "dinov2")
    shape["intermediate_size"] = 16
    transformers.ViTForImageClassification(transformers.ViTConfig(**shape)).save_pretrained(tmp_path / "vit")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model = DropKeyViTForImageClassification.from_pretrained(tmp_path / "vit")
    finally:
        logger.removeHandler(handler)
    assert model.config.model_type == "dropkey_vit" and not [line for line in shown if "of type" in line]


def test_a_misspelt_field_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("hf_dropkey.models.configuration_dropkey")
    logger.addHandler(caplog.handler)
    try:
        DropKeyViTConfig(dropkey_ration=0.2)
        # what apply_dropkey remembers, and fields of Transformers that it keeps for users, are fine
        DropKeyViTConfig(dropkey_ratio=0.2, dropkey_include=["*"], dropkey_exclude=[], my_note="x")
    finally:
        logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert set(lines) == {
        "DropKeyViTConfig has no field dropkey_ration, which changes nothing; did you mean dropkey_ratio?"
    }
