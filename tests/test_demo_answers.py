"""Answers are those of the model alone, the same for everybody, and leave it as it was."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_demos import HEADS, LAYERS, RATIO, noise, save_classifier
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_dropkey import dropkey_active, dropkey_seed, layer_ratios
from hf_dropkey.classification.uncertainty import MeasuredUncertainty
from hf_dropkey.demo.answers import Answer, Classifier, Settings, by_uncertainty
from hf_dropkey.demo.sentences import rank_note
from hf_dropkey.models.dropkey import PATTERNS


pytestmark = pytest.mark.usefixtures("auto_image_processor")


@pytest.fixture(scope="module", params=[False, True], ids=["native", "stock"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return Classifier(save_classifier(tmp_path_factory.mktemp("models") / "saved", stock=request.param))


def alike(one: Answer, other: Answer) -> bool:
    same = np.array_equal(one.by_mask, other.by_mask) and np.array_equal(one.rollout, other.rollout)
    return same and all(np.array_equal(a.lost, b.lost) for a, b in zip(one.lost, other.lost, strict=True))


def test_the_masks_are_those_of_the_seed(model: Classifier) -> None:
    answer = model.answer(noise(), model.settings)
    assert model.has_dropkey and model.settings == Settings(RATIO, "score")
    inputs = ViTImageProcessorPil(size={"height": 12, "width": 12})([noise()], return_tensors="pt")["pixel_values"]
    with model._set(model.settings), torch.no_grad(), dropkey_active(model.model), dropkey_seed(model.model, 0):
        expected = model.model(inputs.repeat(20, 1, 1, 1)).logits.double().softmax(-1)
    assert np.allclose(answer.by_mask, expected.numpy(), atol=1e-6)
    assert np.allclose(answer.probabilities, expected.mean(0).numpy(), atol=1e-6)
    assert np.allclose(answer.std, expected.std(0).numpy(), atol=1e-6) and answer.std.max() > 0.001
    assert answer.mutual_information > 0 and answer.label == answer.names[answer.best]


def test_each_layer_loses_keys_by_its_ratio(model: Classifier) -> None:
    answers = [model.answer(noise(), Settings(0.5, "score", seed)) for seed in range(60)]
    ratios = layer_ratios(LAYERS, 0.5)
    for number, ratio in enumerate(ratios):
        layers = [answer.lost[number] for answer in answers]
        assert {layer.query for layer in layers} == {"class token"} and layers[0].keys == 37
        assert all(layer.ratio == pytest.approx(ratio) and layer.lost.shape == (6, 6) for layer in layers)
        fractions = [layer.count / layer.keys for layer in layers]
        assert np.mean(fractions) == pytest.approx(ratio, abs=3 * np.sqrt(0.25 / (60 * 37)) + 1e-9)
    assert HEADS == 2 and not any(answers[0].lost[-1].lost.any() for _ in answers)


def settings_of(model: Classifier) -> tuple[Any, ...]:
    """What an answer could leave behind in the model; `dropkey_block` is a note of the last pass, which nothing follows."""
    names = ("dropkey_ratio", "dropkey_pattern", "dropkey_window", "dropkey_mode", "training", "dropkey_base_ratio")
    states = [{name: vars(module).get(name) for name in names} for module in model.model.modules()]
    return (
        copy.deepcopy(vars(model._root.config)),
        states,
        {name: one.sum() for name, one in model.model.state_dict().items()},
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_has_an_answer(model: Classifier, pattern: str) -> None:
    answer = model.answer(noise(), Settings(0.3, pattern, 3))
    assert answer.rollout is not None and answer.rollout.sum() > 0 and len(answer.lost) == LAYERS
    assert answer.lost[0].count > 0 and len(answer.by_mask) == 20


def test_the_ratio_0_drops_nothing_and_has_no_spread(model: Classifier) -> None:
    answer = model.answer(noise(), Settings(0.0, "score"))
    assert len(answer.by_mask) == 1 and answer.mutual_information == 0 and not answer.std.any()
    assert not any(layer.count for layer in answer.lost)


def test_visitors_at_once_get_their_own_answers_and_the_model_stays(model: Classifier) -> None:
    """One lock for a model: settings are attributes of its modules, so answers come one after the other."""
    cases = [(noise(seed=seed), Settings(ratio, pattern, seed)) for seed, (ratio, pattern) in enumerate(
        [(0.1, "score"), (0.8, "key"), (0.0, "score"), (0.5, "token"), (0.4, "score"), (0.3, "block")]
    )]  # fmt: skip
    alone = [model.answer(*case) for case in cases]
    before = settings_of(model)
    generator = torch.random.get_rng_state()
    begin = threading.Barrier(len(cases))

    def visit(case: tuple[object, Settings]) -> list[Answer]:
        begin.wait(30)
        return [model.answer(*case) for _ in range(3)]

    with ThreadPoolExecutor(len(cases)) as visitors:
        found = list(visitors.map(visit, cases))
    for expected, answers in zip(alone, found, strict=True):
        assert all(alike(expected, answer) and answer.settings == expected.settings for answer in answers)
    assert not alike(alone[0], alone[4])
    assert settings_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_the_rank_is_of_the_models_own_settings(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = model.answer(noise(), model.settings)
    assert model.rank(answer) is None
    note = "was not measured: hf-dropkey evaluate --model_name_or_path saved --uncertainty"
    assert note in str(rank_note(model, answer))
    low, high = answer.mutual_information / 2, answer.mutual_information * 2
    measured = MeasuredUncertainty("test", 20, RATIO, "score", (low, low, low, high))
    monkeypatch.setattr(model, "measured", measured)
    assert model.rank(answer) == 0.75
    assert model.rank(replace(answer, settings=Settings(0.1, "score"))) is None
    assert rank_note(model, answer) is None
    other = replace(answer, settings=Settings(0.1, "score"))
    assert "at the model's own ratio 0.4 and pattern score only" in str(rank_note(model, other))
    for change in ({"ratio": 0.1}, {"samples": 10}):
        monkeypatch.setattr(model, "measured", replace(measured, **change))
        assert model.rank(answer) is None and "saved --uncertainty" in str(rank_note(model, answer))
    monkeypatch.setattr(model, "has_dropkey", False)
    assert rank_note(model, answer) is None


def test_a_model_without_dropkey_gets_a_usual_ratio(tmp_path: Path) -> None:
    found = Classifier(save_classifier(tmp_path / "plain", stock=True, dropkey=False))
    assert not found.has_dropkey and found.settings.ratio == 0.1
    assert found.answer(noise(), found.settings).mutual_information > 0


def test_attention_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=12, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    found = Classifier(tmp_path)
    found._root.config.patch_size = 5
    answer = found.answer(noise(), found.settings)
    assert answer.rollout is None and "not the patches of an image" in str(answer.unreadable)


@pytest.mark.parametrize(
    ("ratio", "pattern", "seed"), [(0.95, "score", 0), (-0.1, "score", 0), (0.1, "row", 0), (0.1, "key", -1)]
)
def test_settings_that_the_page_does_not_offer_are_refused(ratio: float, pattern: str, seed: int) -> None:
    with pytest.raises(ValueError, match="Choose one"):
        Settings(ratio, pattern, seed)


def test_answers_by_uncertainty(model: Classifier) -> None:
    answer = model.prediction(noise(), model.settings)
    answers = [replace(answer, mutual_information=value) for value in (0.1, 0.3, 0.2)]
    assert by_uncertainty(answers) == [1, 2, 0] and answer.rollout is None
