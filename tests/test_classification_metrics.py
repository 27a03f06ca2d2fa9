"""Metrics against scikit-learn, against loops, and against cases with a known answer."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from transformers import EvalPrediction

from hf_dropkey.classification.metrics import classification_metrics, expected_calibration_error, top_k_accuracy


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


def test_calibration_error_agrees_with_loops(prediction):
    logits, labels = prediction.predictions.astype(np.float64), prediction.label_ids
    expected = 0.0
    for number in range(15):
        confidences, hits = [], []
        for row, label in zip(logits, labels, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            if number / 15 < probabilities.max() <= (number + 1) / 15:
                confidences.append(probabilities.max())
                hits.append(probabilities.argmax() == label)
        if hits:
            expected += abs(np.mean(hits) - np.mean(confidences)) * len(hits) / len(labels)
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("right_of_ten", "error"), [(9, 0.0), (5, 0.4), (10, 0.1)])
def test_calibration_error_of_a_constant_confidence_of_nine_tenths(right_of_ten, error):
    logits = np.log(np.tile([0.9, 0.1], (10, 1)))
    labels = np.array([0] * right_of_ten + [1] * (10 - right_of_ten))
    assert expected_calibration_error(logits, labels) == pytest.approx(error, abs=1e-9)


def test_a_model_that_cannot_decide_is_not_right():
    logits, labels = np.zeros((4, 6)), np.zeros(4, dtype=int)
    assert top_k_accuracy(logits, labels, k=1) == 0
    assert top_k_accuracy(logits, labels, k=5) == 0
    assert top_k_accuracy(logits, labels, k=6) == 1


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


@pytest.mark.parametrize("k", [0, 11])
def test_k_must_be_possible(prediction, k):
    with pytest.raises(ValueError, match=rf"k={k} is outside 1\.\.10"):
        top_k_accuracy(prediction.predictions, prediction.label_ids, k=k)
