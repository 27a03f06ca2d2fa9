"""Scores of human-object interaction detection beside the official code's, and hand-made cases."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from architecture_parity import FIXTURES, Fixture
from hoi_pairs import found, truth

from hf_dropkey.hoi.metrics import (
    FoundPairs,
    TruePairs,
    eleven_point_ap,
    hico_scores,
    overlaps,
    qpic_vcoco_scores,
    rare_classes,
)
from hf_dropkey.hoi.names import VCOCO_VERBS


BOUND = 1e-9


def fixture_images(fixture: Fixture) -> tuple[list[FoundPairs], list[TruePairs]]:
    """Predictions and annotations of a fixture's images."""
    arrays = {name: value.numpy() for name, value in fixture.tensors.items()}
    predictions, truths = [], []
    while f"gt/{len(truths)}.boxes" in arrays:
        image = len(truths)
        given = {name.split(".")[1]: arrays[name] for name in arrays if name.startswith(f"pred/{image}.")}
        persons, things = given["sub_ids"], given["obj_ids"]
        assert (given["labels"][persons] == 0).all()
        predictions.append(
            FoundPairs(given["boxes"][persons], given["boxes"][things], given["labels"][things], given["verb_scores"])
        )
        truths.append(TruePairs(*(arrays[f"gt/{image}.{name}"] for name in ("boxes", "labels", "hois"))))
    return predictions, truths


def test_hico_det_as_the_official_code() -> None:
    fixture = Fixture("hoi_eval_hico")
    predictions, truths = fixture_images(fixture)
    rare = {(thing, verb) for _, thing, verb in fixture.about["rare_triplets"]}
    allowed = fixture.tensors["correct_mat"].numpy()
    found_scores = hico_scores(predictions, truths, allowed=allowed, rare=rare).metrics()
    expected = fixture.about["result"]
    names = {
        "mAP": "mAP",
        "mAP rare": "mAP_rare",
        "mAP non-rare": "mAP_non_rare",
        "mean max recall": "mean_max_recall",
    }
    for official, name in names.items():
        assert abs(found_scores[name] - expected[official]) < BOUND, name


def test_v_coco_as_qpic_approximates_it() -> None:
    fixture = Fixture("hoi_eval_vcoco")
    predictions, truths = fixture_images(fixture)
    allowed = fixture.tensors["correct_mat"].numpy()
    scores = qpic_vcoco_scores(predictions, truths, VCOCO_VERBS, allowed=allowed)
    expected = fixture.about["result"]
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(scores[name] - value) < BOUND, name


# --- known object: an independent slow implementation ----------------------------------------------------------------


def slow_iou(first: Sequence[float], second: Sequence[float]) -> float:
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    if right <= left or bottom <= top:
        return 0.0
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    inner = (right - left + 1) * (bottom - top + 1)
    return inner / (area[0] + area[1] - inner)


def slow_known_object_ap(
    predictions: list[FoundPairs], truths: list[TruePairs], thing: int, verb: int, allowed: Any
) -> float:
    """One class by itself, as HO-RCNN's MATLAB goes about it: all detections of the test set in order of score.

    The known-object setting leaves out detections of images without the object before anything else.
    """
    images = [
        image
        for image, one in enumerate(truths)
        if any(one.labels[pair[1]] == thing for pair in one.pairs if pair[1] >= 0)
    ]
    rows = []
    for image in images:
        one = predictions[image]
        everything = []
        for pair in range(len(one.person_boxes)):
            for other in range(one.verb_scores.shape[1]):
                score = float(one.verb_scores[pair, other]) * float(allowed[other, one.object_labels[pair]])
                everything.append((-score, pair, other))
        for negative, pair, other in sorted(everything)[:100]:
            if other == verb and one.object_labels[pair] == thing:
                rows.append((-negative, image, pair))
    rows.sort(key=lambda row: -row[0])
    positives = [
        (image, tuple(pair))
        for image, one in enumerate(truths)
        for pair in one.pairs
        if pair[2] == verb and pair[1] >= 0 and one.labels[pair[1]] == thing
    ]
    used, right, precision, recall = set(), 0, [], []
    for number, (_, image, pair) in enumerate(rows, 1):
        best, best_overlap = None, 0.0
        for where, (person, other, _) in positives:
            if where == image:
                overlap = min(
                    slow_iou(predictions[image].person_boxes[pair].tolist(), truths[image].boxes[person].tolist()),
                    slow_iou(predictions[image].object_boxes[pair].tolist(), truths[image].boxes[other].tolist()),
                )
                if overlap >= 0.5 and overlap > best_overlap:
                    best, best_overlap = (where, person, other), overlap
        if best is not None and best not in used:
            used.add(best)
            right += 1
        precision.append(right / number)
        recall.append(right / len(positives))
    total = 0.0
    for level in np.arange(0.0, 1.1, 0.1):
        total += max([p for p, r in zip(precision, recall, strict=True) if r >= level], default=0.0) / 11
    return total


def test_known_object_agrees_with_a_slow_implementation() -> None:
    fixture = Fixture("hoi_eval_hico")
    predictions, truths = fixture_images(fixture)
    allowed = fixture.tensors["correct_mat"].numpy()
    scores = hico_scores(predictions, truths, allowed=allowed)
    differing = 0
    for one in scores.classes:
        expected = slow_known_object_ap(predictions, truths, one.object, one.verb, allowed)
        assert abs(one.known_object_ap - expected) < BOUND
        differing += one.known_object_ap > one.ap + 1e-6
    # else the test would not tell the settings apart
    assert differing > 0
    assert scores.metrics()["mAP_known_object"] > scores.metrics()["mAP"]


def test_known_object_of_random_images_agrees_too() -> None:
    generator = np.random.default_rng(0)
    predictions, truths = [], []
    for _ in range(12):
        corner = generator.uniform(0, 50, (5, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(20, 60, (5, 2))], axis=1)
        labels = np.array([0, 0, *generator.integers(1, 4, 3)])
        hois = np.unique(
            np.stack([generator.integers(0, 2, 4), generator.integers(2, 5, 4), generator.integers(0, 3, 4)], 1),
            axis=0,
        )
        persons, things = generator.integers(0, 2, 8), generator.integers(2, 5, 8)
        noise = generator.normal(0, 4, (2, 8, 4))
        predictions.append(
            FoundPairs(boxes[persons] + noise[0], boxes[things] + noise[1], labels[things], generator.random((8, 3)))
        )
        truths.append(TruePairs(boxes, labels, hois))
    for one in hico_scores(predictions, truths).classes:
        expected = slow_known_object_ap(predictions, truths, one.object, one.verb, np.ones((3, 4)))
        assert abs(one.known_object_ap - expected) < BOUND


def test_a_given_list_of_images_replaces_the_boxed_ones() -> None:
    right, wrong = (
        found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [1], [[0.5]]),
        found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [1], [[0.9]]),
    )
    annotated, other = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)]), truth([(50, 50, 59, 59)], [0], [])
    scores = hico_scores([right, wrong], [annotated, other]).classes[0]
    assert (scores.ap, scores.known_object_ap) == pytest.approx((0.5, 1.0))
    # the image-level labels of HICO know an object in the second image that nobody drew a box around
    given = hico_scores([right, wrong], [annotated, other], images_with_object={1: {0, 1}}).classes[0]
    assert given.known_object_ap == pytest.approx(0.5)


# --- hand-made cases -------------------------------------------------------------------------------------------------


def test_a_pair_is_hit_once_and_by_the_better_prediction() -> None:
    annotated = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    twice = found([(0, 0, 9, 9)] * 2, [(20, 0, 29, 9)] * 2, [1, 1], [[0.9], [0.8]])
    assert hico_scores([twice], [annotated]).classes[0].ap == pytest.approx(1.0)
    once_wrong = found([(50, 0, 59, 9), (0, 0, 9, 9)], [(20, 0, 29, 9)] * 2, [1, 1], [[0.9], [0.8]])
    assert hico_scores([once_wrong], [annotated]).classes[0].ap == pytest.approx(0.5)


def test_verb_and_object_class_must_be_right() -> None:
    annotated = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    for label, scores in ((2, [[0.9, 0.1]]), (1, [[0.0, 0.9]])):
        one = found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [label], scores)
        expected = 0.0 if label == 2 else 1.0
        assert hico_scores([one], [annotated]).classes[0].ap == pytest.approx(expected)


def test_a_person_as_the_object() -> None:
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9)]
    annotated = truth(boxes, [0, 0], [(0, 1, 0)])
    assert hico_scores([found(boxes[:1], boxes[1:], [0], [[0.9]])], [annotated]).metrics()["mAP"] == pytest.approx(1.0)
    # the other way round it is another pair
    assert hico_scores([found(boxes[1:], boxes[:1], [0], [[0.9]])], [annotated]).metrics()["mAP"] == 0.0


def test_images_without_boxes() -> None:
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9)]
    annotated, empty = truth(boxes, [0, 1], [(0, 1, 0)]), truth([], [], [])
    predictions = [found(boxes[:1], boxes[1:], [1], [[0.5]]), found(boxes[:1], boxes[1:], [1], [[0.9]])]
    assert hico_scores(predictions, [annotated, empty]).metrics()["mAP"] == pytest.approx(1.0)
    official = hico_scores(predictions, [annotated, empty], count_images_without_boxes=True)
    assert official.metrics()["mAP"] == pytest.approx(0.5)
    # V-COCO's approximation counts them as wrong
    assert qpic_vcoco_scores(predictions, [annotated, empty], ["hold_obj"])["mAP_all"] == pytest.approx(0.5)


def test_missing_objects_in_v_coco() -> None:
    annotated = truth([(0, 0, 9, 9)], [0], [(0, -1, 1)])
    # class 2 is the missing object; `allowed` has columns for the two others only, and forbids verb 1
    one = found([(0, 0, 9, 9)], [(0, 0, 0, 0)], [2], [[0.1, 0.9]])
    allowed = np.array([[1.0, 1.0], [0.0, 0.0]])
    scores = qpic_vcoco_scores([one], [annotated], ["hold_obj", "walk"], allowed=allowed)
    assert scores["AP_walk"] == pytest.approx(1.0)
    other = found([(0, 0, 9, 9)], [(0, 0, 0, 0)], [1], [[0.1, 0.9]])
    ranked = other.ranked(np.concatenate([allowed, np.ones((2, 1))], axis=1))
    assert ranked[1].tolist() == [0, 1]
    assert ranked[2].tolist() == pytest.approx([0.1, 0.0])


def test_images_without_predictions_count_as_missed() -> None:
    annotated = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    nothing = found([], [], [], np.zeros((0, 1)))
    scores = hico_scores([nothing], [annotated]).classes[0]
    assert (scores.ap, scores.recall, scores.positives) == (0.0, 0.0, 1)


def test_only_the_best_hundred_predictions_count() -> None:
    annotated = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    for before, expected in ((99, 1 / 100), (100, 0.0)):
        persons = [(50, 50, 59, 59)] * before + [(0, 0, 9, 9)]
        scores = [[0.9]] * before + [[0.5]]
        one = found(persons, [(20, 0, 29, 9)] * (before + 1), [1] * (before + 1), scores)
        assert hico_scores([one], [annotated]).classes[0].ap == pytest.approx(expected)


def test_rare_classes() -> None:
    image = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    assert rare_classes([image] * 9, known=[(2, 1)]) == {(1, 0), (2, 1)}
    assert rare_classes([image] * 10) == set()


def test_table_and_names() -> None:
    annotated = truth([(0, 0, 9, 9), (20, 0, 29, 9)], [0, 1], [(0, 1, 0)])
    one = found([(0, 0, 9, 9)], [(20, 0, 29, 9)], [1], [[0.9]])
    table = hico_scores([one], [annotated], rare={(1, 0)}).table(["person", "ball"], ["kick"])
    assert "kick ball" in table
    assert table.splitlines()[1].endswith("rare")


def test_overlaps_count_edge_pixels() -> None:
    boxes = np.array([[0.0, 0.0, 9.0, 9.0]])
    assert overlaps(boxes, np.array([[0.0, 0.0, 9.0, 4.0]]))[0, 0] == pytest.approx(0.5)
    assert overlaps(boxes, np.array([[9.0, 0.0, 18.0, 9.0]]))[0, 0] == 0.0


def test_average_precision_of_ties_keeps_the_order() -> None:
    assert eleven_point_ap([True, False], [0.5, 0.5], 1) == (pytest.approx(1.0), 1.0)
    assert eleven_point_ap([False, True], [0.5, 0.5], 1) == (pytest.approx(0.5), 1.0)


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="predictions of 0 images and annotations of 1"):
        hico_scores([], [truth([], [], [])])
    with pytest.raises(ValueError, match="No interaction is annotated"):
        qpic_vcoco_scores([found([], [], [], np.zeros((0, 1)))], [truth([], [], [])], ["hold_obj"])


def test_the_fixtures_are_where_other_tests_look() -> None:
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures in {FIXTURES}")
    assert (FIXTURES / "hoi_eval_vcoco_scenarios.json").is_file()
