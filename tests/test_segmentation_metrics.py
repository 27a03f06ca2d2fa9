"""Pixel counts, mean IoU and pixel accuracy, against scikit-learn and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from transformers import EvalPrediction

from hf_dropkey.segmentation.metrics import SegmentationMetrics, SegmentationScores, pixel_counts


def test_scores_are_those_of_scikit_learn() -> None:
    """Over several masks of different sizes at once, ignored pixels apart."""
    generator = np.random.default_rng(0)
    counts, all_true, all_predicted = [], [], []
    for height, width in ((7, 9), (20, 3), (11, 11)):
        truth = generator.integers(0, 4, (height, width))
        predicted = np.where(generator.random((height, width)) < 0.6, truth, generator.integers(0, 4, truth.shape))
        truth[generator.random(truth.shape) < 0.2] = 255
        counts.append(pixel_counts(predicted, truth, 4, 255))
        all_true.append(truth[truth != 255])
        all_predicted.append(predicted[truth != 255])
    found = SegmentationMetrics()(EvalPrediction(np.stack(counts), np.arange(3)))
    true, guess = np.concatenate(all_true), np.concatenate(all_predicted)
    assert found["mean_iou"] == pytest.approx(jaccard_score(true, guess, average="macro"), abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(true, guess), abs=1e-12)
    matrix = confusion_matrix(true, guess, labels=range(4))
    total = np.sum(counts, axis=0)
    assert np.array_equal(total, [matrix.diagonal(), matrix.sum(0), matrix.sum(1)])


def test_classes_that_are_nowhere_do_not_count() -> None:
    """By hand: class 0 has 1 of 2 pixels, class 1 has 1 of 2, class 2 is neither annotated nor predicted."""
    counts = pixel_counts(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]), 3, 255)
    scores = SegmentationScores.of(counts)
    assert scores.iou[:2].tolist() == [0.5, 0.5] and math.isnan(scores.iou[2])
    assert scores.mean_iou == 0.5 and scores.pixel_accuracy == pytest.approx(2 / 3)
    assert scores.table(["a", "bb", "c"]) == "a   0.5000\nbb  0.5000\nc   neither annotated nor predicted"


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    scores = SegmentationScores.of(pixel_counts(np.array([[0, 1]]), np.array([[0, 0]]), 2, 255))
    assert scores.iou.tolist() == [0.5, 0.0]


def test_without_any_labelled_pixel_there_is_no_score() -> None:
    scores = SegmentationScores.of(pixel_counts(np.zeros((2, 2), int), np.full((2, 2), 255), 2, 255))
    assert math.isnan(scores.mean_iou) and math.isnan(scores.pixel_accuracy)
