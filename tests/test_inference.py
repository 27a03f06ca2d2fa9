"""Monte-Carlo inference against the definition of its numbers, and what it must leave alone."""

import math
from typing import Any

import pytest
import torch
import transformers as hf
from dropping_models import native
from stock_architectures import ARCHITECTURES, VIT, build, pixels
from torch import nn

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.inference import dropkey_seed, entropy, monte_carlo_predict
from hf_dropkey.patching.apply import apply_dropkey, dropkey_active


def model_of(kind: str, ratio: float = 0.5, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {**VIT, "num_labels": 5, **settings}
    if kind == "native":
        config |= {"dropkey_ratio": ratio, "dropkey_final_ratio": ratio, "dropkey_with_attention_dropout": True}
        model: Any = DropKeyViTForImageClassification(DropKeyViTConfig(**config))
    else:
        model = hf.ViTForImageClassification(hf.ViTConfig(**config))
        apply_dropkey(model, ratio, schedule="constant", with_attention_dropout=True, verbose=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim >= 2 else 1)
    return model.eval()


@pytest.mark.parametrize("kind", ["native", "patched"])
def test_the_numbers_are_those_of_their_definition(kind: str) -> None:
    model = model_of(kind)
    prediction = monte_carlo_predict(model, pixels(), samples=12, seed=7)
    torch.manual_seed(7)
    with torch.no_grad(), dropkey_active(model):
        probabilities = torch.stack([model(**pixels()).logits.softmax(-1) for _ in range(12)]).double()
    mean = probabilities.mean(0)
    torch.testing.assert_close(prediction.probabilities, mean.float())
    torch.testing.assert_close(prediction.std, probabilities.std(0).float())
    total = -(mean * mean.log()).sum(-1)
    torch.testing.assert_close(prediction.entropy, total.float())
    information = total + (probabilities * probabilities.log()).sum(-1).mean(0)
    torch.testing.assert_close(prediction.mutual_information, information.float())
    assert (prediction.std > 0).all() and (prediction.mutual_information > 0).all()
    assert (prediction.mutual_information < prediction.entropy).all()
    assert prediction.samples == 12 and prediction.probabilities.shape == (2, 5)
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(2))


def test_a_seed_repeats_and_leaves_the_callers_generator_alone() -> None:
    model = model_of("patched")
    state = torch.random.get_rng_state()
    first = monte_carlo_predict(model, pixels(), samples=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(monte_carlo_predict(model, pixels(), samples=4, seed=1).probabilities, first.probabilities)
    assert not torch.equal(monte_carlo_predict(model, pixels(), samples=4, seed=2).probabilities, first.probabilities)
    drawn = monte_carlo_predict(model, pixels(), samples=4)
    assert not torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(state)
    assert torch.equal(monte_carlo_predict(model, pixels(), samples=4).probabilities, drawn.probabilities)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("patched", hidden_dropout_prob=0.9, attention_probs_dropout_prob=0.9)
    model.train()
    model.vit.embeddings.eval()
    modes = [module.training for module in model.modules()]
    prediction = monte_carlo_predict(model, pixels(), samples=3, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert not [module for module in model.modules() if hasattr(module, "dropkey_mode")]
    # dropout is off: only DropKey is random
    reference = monte_carlo_predict(model_of("patched"), pixels(), samples=3, seed=0)
    assert torch.equal(prediction.probabilities, reference.probabilities)
    assert not prediction.probabilities.requires_grad


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("patched").train()
    with pytest.raises(AttributeError):
        monte_carlo_predict(model, {"pixel_values": "no image"}, samples=3, seed=0)
    assert model.training and not [module for module in model.modules() if hasattr(module, "dropkey_mode")]


@pytest.mark.parametrize("per_pass", [2, 5, 30])
def test_several_masks_in_one_pass_estimate_the_same(per_pass: int) -> None:
    model = model_of("patched", ratio=0.3)
    batches = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(len(output.logits)), with_kwargs=True
    )
    many = monte_carlo_predict(
        model, {**pixels(), "labels": torch.tensor([0, 1])}, samples=30, seed=3, samples_per_pass=per_pass
    )
    assert many.samples == 30 and batches == [2 * per_pass] * (30 // per_pass)
    one = monte_carlo_predict(model, pixels(), samples=300, seed=4)
    error = (one.std**2 / 30).sqrt()
    # masks differ between copies, or the spread would be smaller and the mean further away
    assert ((many.probabilities - one.probabilities).abs() < 5 * error + 1e-3).all()
    assert (many.std > one.std / 2).all() and (many.std < one.std * 2).all()


def test_a_remainder_of_masks_is_drawn_too() -> None:
    assert monte_carlo_predict(model_of("native"), pixels(), samples=5, samples_per_pass=3).samples == 5


def test_segmentation_has_its_classes_in_another_dimension() -> None:
    model = build("segformer")
    apply_dropkey(model, 0.5, verbose=False)
    prediction = monte_carlo_predict(model, ARCHITECTURES["segformer"].inputs(), samples=3, seed=0, class_dim=1)
    assert prediction.probabilities.shape[:2] == (2, 2)
    assert prediction.entropy.shape == prediction.probabilities.shape[:1] + prediction.probabilities.shape[2:]
    assert (prediction.entropy <= math.log(2) + 1e-6).all()


def test_masks_that_agree_have_no_mutual_information() -> None:
    prediction = monte_carlo_predict(model_of("patched", ratio=1e-12), pixels(), samples=3, seed=0)
    assert (prediction.std < 1e-9).all()
    assert (prediction.mutual_information < 1e-9).all() and (prediction.mutual_information >= 0).all()


def test_entropy_of_certainty_is_zero() -> None:
    assert entropy(torch.tensor([1.0, 0.0])) == 0
    assert entropy(torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "at least 2"),
        ({"samples_per_pass": 0}, "at least 1"),
    ],
)
def test_bad_numbers_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monte_carlo_predict(model_of("patched"), pixels(), **settings)


def test_bad_models_are_refused() -> None:
    with pytest.raises(ValueError, match="drops no keys"):
        monte_carlo_predict(hf.ViTForImageClassification(hf.ViTConfig(**VIT)), pixels())
    with pytest.raises(ValueError, match="drops no keys"):
        monte_carlo_predict(model_of("native", ratio=0.0), pixels())
    with pytest.raises(ValueError, match="multi_label_classification"):
        monte_carlo_predict(model_of("patched", problem_type="multi_label_classification"), pixels())
    with pytest.raises(ValueError, match="Set `class_dim`"):
        monte_carlo_predict(model_of("patched", num_labels=1), pixels())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_seed_without_a_generator(backend: str) -> None:
    model = native(attn_implementation=backend).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), dropkey_active(model):
        with dropkey_seed(model, 5):
            state = torch.get_rng_state()
            first = model(images).logits
            assert torch.equal(model(images).logits, first) and torch.equal(torch.get_rng_state(), state)
        with dropkey_seed(model, torch.tensor([5, 0], dtype=torch.int32)):
            assert torch.equal(model(images).logits, first)
        with dropkey_seed(model, 5 + 2**32):
            assert not torch.allclose(model(images).logits, first)
        assert not torch.equal(model(images).logits, model(images).logits)
    with dropkey_seed(model, 5):
        assert torch.equal(model(images).logits, model(images).logits)


def test_a_seed_is_checked() -> None:
    model = native()
    for seed in (True, 0.5, torch.tensor([1, 2]), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="A seed must be"), dropkey_seed(model, seed):
            pass
    with pytest.raises(ValueError, match="has no DropKey"), dropkey_seed(torch.nn.Linear(1, 1), 1):
        pass


def test_compiled_code_takes_no_fixed_seed() -> None:
    compiled = torch.compile(native().train(), backend="eager")
    with pytest.raises(RuntimeError, match="takes no fixed seed"), dropkey_seed(compiled, 1):
        compiled(torch.randn(2, 3, 32, 32))
