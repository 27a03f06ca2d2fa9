"""Every metric that this project computes has one name, which cards, tables and sentences use."""

import numpy as np
from transformers import EvalPrediction

from hf_dropkey.classification.metrics import classification_metrics
from hf_dropkey.hub.metric_names import METRICS, full_name
from hf_dropkey.lab.evidence import OCCLUDED
from hf_dropkey.lab.grids import SELECTABLE


def test_every_metric_has_a_name() -> None:
    computed = classification_metrics(EvalPrediction(np.eye(6, dtype=np.float32), np.arange(6)))
    assert {*computed, *OCCLUDED.values(), *SELECTABLE} <= METRICS.keys()
    names = [name.full for name in METRICS.values()]
    assert len(set(names)) == len(names)


def test_ratios_are_chosen_by_metrics_with_a_better_direction() -> None:
    assert [METRICS[name].larger_is_better for name in SELECTABLE] == [True, False, False]


def test_names_are_shown_in_full_or_as_they_are() -> None:
    assert full_name("nll") == "negative log-likelihood (nats)"
    assert full_name("accuracy_at_occlusion_0.25") == "accuracy, 25 % of patches hidden"
    assert full_name("some_score") == "some_score"
    assert METRICS["nll"].title == "NLL, nats" and METRICS["accuracy"].title == "Accuracy"
