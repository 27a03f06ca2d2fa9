"""V-COCO's official scenarios beside its toolkit's numbers, and hand-made cases."""

import json
from typing import Any

import numpy as np
import pytest
from architecture_parity import FIXTURES
from hoi_pairs import found

from hf_dropkey.hoi.names import VCOCO_ROLE_VERBS, VCOCO_VERBS
from hf_dropkey.hoi.vcoco import (
    Action,
    ActionPredictions,
    ActionTruth,
    action_predictions,
    envelope_ap,
    read_actions,
    read_predictions,
    read_truths,
    vcoco_actions,
    vcoco_role_ap,
    vcoco_scores,
)


HOLD = [Action("hold", ("obj",))]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    file = FIXTURES / "hoi_eval_vcoco_scenarios.json"
    if not file.exists():
        pytest.skip(f"no fixture {file}")
    return json.loads(file.read_text())


@pytest.mark.parametrize("scenario", [1, 2])
def test_the_toolkits_numbers(document: dict[str, Any], scenario: int) -> None:
    actions = read_actions(document["verbs"])
    truths = read_truths(document["verbs"], document["coco"], document["image_ids"])
    predictions = read_predictions(document["detections"], actions, document["image_ids"])
    scores = vcoco_role_ap(predictions, truths, actions, scenario=scenario)
    assert list(scores) == document["roles"]
    expected = document["exact"][f"scenario_{scenario}"]
    assert list(scores.values()) == pytest.approx(expected["per_role"], abs=1e-9)
    means = vcoco_scores(predictions, truths, actions)
    assert means[f"AP_role_scenario_{scenario}"] == pytest.approx(expected["mean"], abs=1e-9)
    # what the official toolkit printed, with two decimals
    roles = [row for row in document["official_per_role_percent"] if "-" in row[0]]
    printed = roles[(scenario - 1) * 5 : scenario * 5]
    for name, percent, _ in printed:
        assert 100 * scores[name.replace("-", "_")] == pytest.approx(percent, abs=0.006)


def person(role: Any = None, label: int = 1) -> ActionTruth:
    boxes = np.full((1, 1, 1, 4), np.nan) if role is None else np.array(role, dtype=float).reshape(1, 1, 1, 4)
    return ActionTruth(np.array([[0.0, 0.0, 9.0, 9.0]]), np.array([[label]]), boxes)


def prediction(role: Any = None, score: float = 0.9, box: Any = (0, 0, 9, 9)) -> ActionPredictions:
    boxes = np.full((1, 1, 1, 4), np.nan) if role is None else np.array(role, dtype=float).reshape(1, 1, 1, 4)
    return ActionPredictions(np.array([box], dtype=float), np.array([[[score]]]), boxes)


@pytest.mark.parametrize(
    ("annotated", "predicted", "first", "second"),
    [
        (None, None, 1.0, 1.0),
        (None, (0, 0, 0, 0), 1.0, 1.0),
        (None, (20, 0, 29, 9), 0.0, 1.0),
        ((20, 0, 29, 9), (20, 0, 29, 9), 1.0, 1.0),
        ((20, 0, 29, 9), None, 0.0, 0.0),
    ],
)
def test_missing_roles(annotated: Any, predicted: Any, first: float, second: float) -> None:
    for scenario, expected in ((1, first), (2, second)):
        scores = vcoco_role_ap([prediction(predicted)], [person(annotated)], HOLD, scenario=scenario)
        assert scores == {"hold_obj": expected}


def test_persons_without_annotations_are_skipped() -> None:
    both = ActionTruth(
        np.array([[0.0, 0.0, 9.0, 9.0], [50.0, 0.0, 59.0, 9.0]]), np.array([[1], [-1]]), np.full((2, 1, 1, 4), np.nan)
    )
    on_the_other = prediction(score=0.95, box=(50, 0, 59, 9))
    one = prediction()
    together = ActionPredictions(
        np.concatenate([on_the_other.boxes, one.boxes]),
        np.concatenate([on_the_other.scores, one.scores]),
        np.concatenate([on_the_other.role_boxes, one.role_boxes]),
    )
    assert vcoco_role_ap([together], [both], HOLD, scenario=1) == {"hold_obj": 1.0}


def test_classes_without_predictions_persons_or_positives() -> None:
    nothing = ActionPredictions(np.zeros((0, 4)), np.zeros((0, 1, 1)), np.zeros((0, 1, 1, 4)))
    assert vcoco_role_ap([nothing], [person()], HOLD, scenario=1) == {"hold_obj": 0.0}
    assert np.isnan(vcoco_role_ap([prediction()], [person(label=0)], HOLD, scenario=1)["hold_obj"])
    empty = ActionTruth(np.zeros((0, 4)), np.zeros((0, 1), dtype=int), np.zeros((0, 1, 1, 4)))
    assert vcoco_role_ap([prediction(), prediction()], [person(), empty], HOLD, scenario=1) == {"hold_obj": 1.0}
    assert vcoco_scores([prediction()], [person(label=0)], HOLD) == {}


def test_area_under_the_envelope() -> None:
    assert envelope_ap([(0.9, True), (0.8, False), (0.7, True)], 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert envelope_ap([], 2) == 0.0


def test_pairs_of_a_model_as_predictions() -> None:
    actions = vcoco_actions()
    assert len(actions) == 26
    assert sum(len(action.roles) for action in actions) == 25
    assert len(VCOCO_ROLE_VERBS) == 24
    scores = np.linspace(0, 1, 29)[None]
    one = found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [3], scores)
    made = action_predictions(one, missing_label=80)
    cut = [action.name for action in actions].index("cut")
    assert actions[cut].roles == ("instr", "obj")
    wanted = [scores[0, VCOCO_VERBS.index(f"cut_{role}")] for role in ("instr", "obj")]
    assert made.scores[0, cut].tolist() == pytest.approx(wanted)
    assert made.role_boxes[0, cut, 0].tolist() == [20, 0, 29, 9]
    walk = [action.name for action in actions].index("walk")
    assert np.isnan(made.scores[0, walk]).all()


def test_a_missing_object_wins() -> None:
    one = found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [2], [[0.5, 0.5]])
    allowed = np.zeros((2, 2))
    made = action_predictions(one, missing_label=2, verbs=("cut_instr", "cut_obj"), allowed=allowed)
    assert np.isnan(made.role_boxes).all()
    # the column of ones that the missing object gets
    assert made.scores.tolist() == [[[0.5, 0.5]]]


def test_other_scenarios_are_refused() -> None:
    with pytest.raises(ValueError, match="scenarios 1 and 2, got 3"):
        vcoco_role_ap([], [], HOLD, scenario=3)
