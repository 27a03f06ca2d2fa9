"""The numbers of attention against plain loops written from their definitions, and measured drops against the ratio."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dropping_models import nano, native, patched, state
from stock_architectures import ARCHITECTURES, build, pixels, quiet, tiny_vit
from transformers import dynamic_module_utils

from hf_dropkey.inspection.analysis import (
    accuracy_when_kept,
    attention_distance,
    attention_entropy,
    attention_map,
    attention_rollout,
    drop_schedule,
    measured_drops,
    rollout_map,
    uniform_distance,
    uniform_entropy,
)
from hf_dropkey.inspection.recording import LayerAttention, TokenLayout, record_attention
from hf_dropkey.patching.apply import dropkey_disabled


def layer_of(weights: torch.Tensor, grid: tuple[int, int], prefix: int) -> LayerAttention:
    return LayerAttention("some.attention", weights, TokenLayout(grid, prefix))


def random_layer(grid: tuple[int, int] = (2, 3), prefix: int = 2, heads: int = 3) -> LayerAttention:
    tokens = prefix + grid[0] * grid[1]
    return layer_of((2 * torch.randn(2, heads, tokens, tokens)).softmax(-1), grid, prefix)


def loop_entropy(weights: torch.Tensor) -> float:
    total = 0.0
    for row in weights.tolist():
        for weight in row:
            total -= weight * math.log(weight) if weight > 0 else 0.0
    return total / len(weights)


def loop_distance(weights: torch.Tensor, grid: tuple[int, int], prefix: int) -> float:
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    means = []
    for query, (row, column) in enumerate(places):
        on_patches = weights[prefix + query, prefix:].tolist()
        if sum(on_patches) > 0:
            far = sum(w * math.hypot(row - y, column - x) for w, (y, x) in zip(on_patches, places, strict=True))
            means.append(far / sum(on_patches))
    return sum(means) / len(means)


def loop_rollout(layers: Any, image: int) -> list[list[float]]:
    tokens = layers[0].weights.shape[-1]
    total = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    for layer in layers:
        mean = layer.weights[image].mean(0).tolist()
        step = [[0.5 * mean[i][j] + 0.5 * (i == j) for j in range(tokens)] for i in range(tokens)]
        step = [[value / sum(row) for value in row] for row in step]
        total = [[sum(step[i][k] * total[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    return total


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_with_registers", "siglip"])
@pytest.mark.parametrize("dropkey", [False, True])
def test_entropy_distance_and_rollout_are_those_of_plain_loops(name: str, dropkey: bool) -> None:
    model = build(name)
    quiet(model, 0.6, schedule="constant")
    layers = record_attention(model, ARCHITECTURES[name].inputs(), dropkey=dropkey).layers
    rollout = attention_rollout(layers)
    for image in range(2):
        for layer in layers:
            for head in range(4):
                weights = layer.weights[image, head]
                assert float(attention_entropy(layer)[image, head]) == pytest.approx(loop_entropy(weights), rel=1e-6)
                expected = loop_distance(weights, layer.layout.grid, layer.layout.prefix)
                assert float(attention_distance(layer)[image, head]) == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(
            rollout[image], torch.tensor(loop_rollout(layers, image)).double(), rtol=1e-5, atol=1e-7
        )
    torch.testing.assert_close(rollout.sum(-1), torch.ones(rollout.shape[:2]).double())


def test_a_grid_that_is_not_square_has_its_own_distances() -> None:
    layer = random_layer((2, 5), 1)
    expected = loop_distance(layer.weights[1, 2], (2, 5), 1)
    assert float(attention_distance(layer)[1, 2]) == pytest.approx(expected)
    assert expected != pytest.approx(loop_distance(layer.weights[1, 2], (5, 2), 1))


def test_uniform_attention_has_the_entropy_and_distance_of_uniform_attention() -> None:
    layer = layer_of(torch.full((1, 1, 13, 13), 1 / 13), (3, 4), 1)
    assert (
        float(attention_entropy(layer)) == pytest.approx(uniform_entropy(layer.layout)) == pytest.approx(math.log(13))
    )
    assert float(attention_distance(layer)) == pytest.approx(uniform_distance(layer.layout))
    itself = layer_of(torch.eye(13)[None, None], (3, 4), 1)
    assert float(attention_entropy(itself)) == 0 and float(attention_distance(itself)) == 0


def test_attention_to_the_class_token_is_no_distance() -> None:
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 0] = 1
    # one patch attends to its diagonal neighbour a little, the others to the class token only
    weights[0, 0, 1] = torch.tensor([0.9, 0, 0, 0, 0.1])
    assert float(attention_distance(layer_of(weights, (2, 2), 1))) == pytest.approx(2**0.5)
    weights[0, 0, 1] = weights[0, 0, 2]
    assert attention_distance(layer_of(weights, (2, 2), 1)).isnan().all()


def test_maps_are_the_rows_of_the_query() -> None:
    layer = random_layer()
    assert torch.equal(attention_map(layer), layer.weights[:, :, 0, 2:].reshape(2, 3, 2, 3))
    mean = sum(layer.weights[:, :, query, 2:] for query in range(2, 8)) / 6
    torch.testing.assert_close(attention_map(layer, "mean"), mean.reshape(2, 3, 2, 3))
    plain = random_layer(prefix=0)
    with pytest.raises(ValueError, match="no class token: its 6 tokens are all patches. Pass source='mean'"):
        attention_map(plain)
    with pytest.raises(ValueError, match="The rollout has no class token"):
        rollout_map([plain])
    assert rollout_map([plain], "mean").sum() == pytest.approx(2)
    with pytest.raises(ValueError, match="Unknown `source` 'cls'"):
        attention_map(layer, "cls")
    alone = layer_of(layer.weights[:, :, :1], (2, 3), 2)
    with pytest.raises(ValueError, match="the class token is the only query"):
        attention_map(alone, "mean")
    assert torch.equal(attention_map(alone), attention_map(layer))
    assert attention_distance(alone).isnan().all()


def test_a_class_token_that_joins_late_sees_what_the_patches_saw() -> None:
    record = record_attention(nano("volo"), pixels(64), dropkey=True)
    rollout = attention_rollout(record.on_last_grid)
    patches = torch.eye(16).double()
    for layer in record.layers[:-1]:
        patches = (layer.weights[0].double().mean(0) + torch.eye(16)) / 2 @ patches
    own, others = record.layers[-1].weights[0].double().mean(0)[0].split((1, 16))
    torch.testing.assert_close(rollout[0, 0, 1:], others / 2 @ patches)
    assert rollout[0, 0, 0] == pytest.approx(0.5 + float(own) / 2)
    torch.testing.assert_close(rollout[0, 1:, 1:], patches)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 17).double())


def test_layers_on_several_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one patch grid, got \[\(2, 3\), \(3, 2\)\].*record.on_last_grid"):
        attention_rollout([random_layer(), random_layer((3, 2))])
    with pytest.raises(ValueError, match="no layers"):
        attention_rollout([])


def assert_measured(model: Any, inputs: Any, passes: int = 8, fraction: float = 1.0) -> Any:
    """The mean of the measured fractions lies within four and a half standard errors of the ratio times `fraction`."""
    found = measured_drops(model, inputs, passes=passes)
    for layer in found:
        if layer.reason is None:
            fractions = torch.tensor(layer.fractions)
            error = max(float(fractions.std()), 0.5 / layer.scores) / passes**0.5
            assert len(fractions) == passes and abs(float(fractions.mean()) - fraction * layer.ratio) <= 4.5 * error, (
                layer
            )
    return found


# the class token is never part of a block or a cross
@pytest.mark.parametrize(("pattern", "fraction"), [("score", 1), ("key", 1), ("block", 16 / 17), ("cross", 16 / 17)])
@pytest.mark.parametrize("make", [lambda pattern: native(dropkey_pattern=pattern), patched])
def test_the_measured_drop_is_the_ratio(make: Any, pattern: str, fraction: float) -> None:
    model = make(pattern)
    found = assert_measured(model, pixels(batch=8), fraction=fraction)
    assert [layer.ratio for layer in found] == [0.5, 0.25, 0.0]
    assert {layer.scores for layer in found} == {8 * 4 * 17 * 17}
    assert [layer.ratio for layer in drop_schedule(model)] == [0.5, 0.25, 0.0]


def test_small_weights_are_not_taken_for_dropped_ones() -> None:
    model = patched()
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attention.q_proj.weight.mul_(20)
    weights = record_attention(model, pixels(batch=8)).layers[2].weights
    assert (weights < 1e-3).float().mean() > 0.1 and (weights > 0).all()
    assert set(assert_measured(model, pixels(batch=8))[2].fractions) == {0.0}


def test_the_pattern_token_drops_its_exact_count() -> None:
    found = measured_drops(patched("token"), pixels(), passes=3)
    # Python rounds halves to even: 8 of 17, 4 of 17
    assert [set(layer.fractions) for layer in found] == [{8 / 17}, {4 / 17}, {0.0}]


@pytest.mark.parametrize("family", ["volo", "ceit", "t2t_vit"])
def test_attentions_of_any_shape_are_measured(family: str) -> None:
    model = nano(family, dropkey_schedule="constant")
    found = assert_measured(model, pixels(64, batch=4))
    unmeasured = {layer.name for layer in found if layer.reason is not None}
    expected = {f"t2t_vit.embeddings.token_stages.{n}.attention" for n in range(2)} if family == "t2t_vit" else set()
    assert unmeasured == expected
    assert sum(layer.ratio > 0 for layer in found) > 3


def test_keys_outside_a_shifted_window_are_not_counted_as_dropped() -> None:
    model = build("swin")
    quiet(model, 0.3, schedule="constant")
    found = assert_measured(model, pixels(batch=8))
    assert found[1].scores < found[0].scores


def test_dropout_on_weights_is_not_counted() -> None:
    model = tiny_vit(attention_probs_dropout_prob=0.5)
    quiet(model, 0.2, schedule="constant", with_attention_dropout=True)
    assert_measured(model, pixels(batch=8))
    assert model.vit.layers[0].attention.attention_dropout == 0.5


@pytest.mark.parametrize("make", [native, patched, lambda: nano("ceit"), lambda: nano("volo")])
def test_measuring_leaves_the_model_and_the_generator_as_they_were(make: Any) -> None:
    model = make().train()
    model.set_attn_implementation("sdpa")
    inputs = pixels(model.config.image_size)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, generator = state(model), torch.random.get_rng_state()
    first = measured_drops(model, inputs, passes=2, seed=5)
    assert state(model) == before and torch.equal(torch.random.get_rng_state(), generator)
    # running statistics of batch norm too
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert measured_drops(model, inputs, passes=2, seed=5) == first
    assert measured_drops(model, inputs, passes=2, seed=6) != first


def test_a_checkpoints_own_code_is_measured_like_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    cls: Any = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_dropkey_vit.DropKeyViTForImageClassification", str(tmp_path / "model")
    )
    remote = cls.from_pretrained(tmp_path / "model")
    assert type(remote).__module__.startswith("transformers_modules.")
    assert measured_drops(remote, pixels()) == measured_drops(native(), pixels())
    for ours, theirs in zip(*(record_attention(model, pixels()).layers for model in (native(), remote)), strict=True):
        assert torch.equal(ours.weights, theirs.weights)


def test_what_is_switched_off_measures_as_nothing() -> None:
    model = native()
    with dropkey_disabled(model):
        assert {layer.fractions for layer in measured_drops(model, pixels(), passes=2)} == {(0.0, 0.0)}


def test_bad_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="has no DropKey. Call apply_dropkey"):
        measured_drops(tiny_vit(), pixels())
    with pytest.raises(ValueError, match="`passes` must be at least 2"):
        measured_drops(patched(), pixels(), passes=1)
    broken = patched()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="are all 0 or NaN. Check the model's weights"):
        measured_drops(broken, pixels())
    with pytest.raises(ValueError, match=r"Pass model.float\(\)"):
        measured_drops(patched().half(), pixels())
    with pytest.raises(ValueError, match="not finite"):
        measured_drops(patched(), {"pixel_values": torch.full((1, 3, 32, 32), float("inf"))})


def test_rejection_keeps_the_most_certain() -> None:
    uncertainty = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.0])
    right = torch.tensor([False, True, False, True, True])
    fractions, accuracies = accuracy_when_kept(uncertainty, right)
    assert fractions.tolist() == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert accuracies.tolist() == pytest.approx([1.0, 1.0, 0.75, 0.6])
    uncertainty, right = torch.rand(50), torch.rand(50) < 0.7
    for fraction, accuracy in zip(*accuracy_when_kept(uncertainty, right), strict=True):
        kept = sorted(range(50), key=lambda number: float(uncertainty[number]))[: round(float(fraction) * 50)]
        assert float(accuracy) == pytest.approx(sum(bool(right[number]) for number in kept) / len(kept))


@pytest.mark.parametrize(
    ("uncertainty", "right"),
    [(torch.zeros(0), torch.zeros(0)), (torch.zeros(2), torch.zeros(3)), (torch.zeros(2, 2), torch.zeros(2, 2))],
)
def test_lists_of_different_lengths_are_refused(uncertainty: torch.Tensor, right: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="of one length"):
        accuracy_when_kept(uncertainty, right.bool())


def test_an_unknown_uncertainty_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 uncertainties are NaN"):
        accuracy_when_kept(torch.tensor([0.0, float("nan")]), torch.tensor([True, True]))
