"""Metrics against scikit-learn, against loops, and against cases with a known answer."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from transformers import EvalPrediction

from hf_dropkey.classification.metrics import classification_metrics, evaluation_metrics, log_softmax


@pytest.fixture
def prediction() -> EvalPrediction:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 10, size=500)
    logits = draws.normal(size=(500, 10)) + 2 * np.eye(10)[labels]
    return EvalPrediction(predictions=logits.astype(np.float32), label_ids=labels)


def test_agrees_with_scikit_learn(prediction):
    logits, labels = prediction.predictions.astype(np.float64), prediction.label_ids
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    metrics = classification_metrics(prediction)
    assert metrics["accuracy"] == accuracy_score(labels, logits.argmax(-1))
    assert metrics["top5_accuracy"] == top_k_accuracy_score(labels, logits, k=5)
    assert metrics["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    assert 0.5 < metrics["accuracy"] < metrics["top5_accuracy"] < 1


def test_huge_logits_do_not_overflow():
    metrics = classification_metrics(EvalPrediction(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0])))
    assert metrics["nll"] == pytest.approx(5e3)
    assert metrics["ece"] == pytest.approx(0.5)


def test_five_classes_have_no_top_five():
    assert "top5_accuracy" not in classification_metrics(EvalPrediction(np.eye(5), np.arange(5)))


def test_logits_come_first_in_a_tuple(prediction):
    extra = EvalPrediction((prediction.predictions, np.zeros((500, 3))), prediction.label_ids)
    assert classification_metrics(extra) == classification_metrics(prediction)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_is_an_error(prediction, value):
    prediction.predictions[7, 3] = value
    with pytest.raises(ValueError, match="1 of 500 images are not finite: training diverged"):
        classification_metrics(prediction)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="evaluation split is empty"):
        classification_metrics(EvalPrediction(np.zeros((0, 3)), np.zeros(0, dtype=int)))


def test_the_evaluation_has_the_brier_score_too(prediction):
    found = evaluation_metrics(prediction)
    probabilities = np.exp(log_softmax(prediction.predictions))
    one_hot = np.eye(10)[prediction.label_ids]
    assert found.pop("brier") == pytest.approx(((probabilities - one_hot) ** 2).sum(axis=1).mean())
    assert found == classification_metrics(prediction)
