"""Tests of average precision against values worked out by hand, and of reading detections off a model's outputs."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ConditionalDetrImageProcessorPil,
    DetrImageProcessorPil,
    EvalPrediction,
    RTDetrImageProcessorPil,
    YolosImageProcessorPil,
)

from hf_dropkey.detection.data import DetectionSplit
from hf_dropkey.detection.metrics import (
    COCO_METRICS,
    CocoMetrics,
    coco_metrics,
    coco_package,
    coco_results,
    package_version,
    post_process,
)


def truth(*boxes: list[float], images: int = 1) -> dict[str, Any]:
    """One category; each box is on the first image."""
    return {
        "images": [{"id": number, "width": 200, "height": 200} for number in range(images)],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"image_id": 0, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} for box in boxes
        ],
    }


def found(box: list[float], score: float = 0.9, image: int = 0) -> dict[str, Any]:
    return {"image_id": image, "category_id": 7, "bbox": box, "score": score}


MEDIUM, LARGE = [10, 10, 50, 60], [60, 60, 120, 120]


def test_perfect_detections_score_one_and_absent_sizes_minus_one():
    metrics = coco_metrics(truth(MEDIUM, LARGE), [found(MEDIUM), found(LARGE)])
    assert tuple(metrics) == COCO_METRICS
    absent = {"AP_small", "AR_small"}
    # with one detection an image, one of two objects is found
    expected = {name: -1.0 if name in absent else 0.5 if name == "AR_1" else 1.0 for name in COCO_METRICS}
    assert metrics == pytest.approx(expected)


def test_no_detections_score_zero():
    metrics = coco_metrics(truth(MEDIUM), [])
    assert {name: value for name, value in metrics.items() if value != -1} == pytest.approx(
        {name: 0.0 for name in COCO_METRICS if not name.endswith(("small", "large"))}
    )


def test_a_false_detection_with_a_better_score_halves_the_precision():
    wrong = [150, 0, 40, 40]
    metrics = coco_metrics(truth(MEDIUM, LARGE), [found(MEDIUM, 0.8), found(wrong, 0.9)])
    # precision is 1/2 up to recall 1/2, which is 51 of COCO's 101 recall levels
    assert metrics["AP"] == pytest.approx(51 / 101 / 2)
    assert (metrics["AR_1"], metrics["AR_100"]) == (0.0, 0.5)
    better = coco_metrics(truth(MEDIUM, LARGE), [found(MEDIUM, 0.9), found(wrong, 0.8)])
    assert better["AP"] == pytest.approx(51 / 101)


def test_a_loose_box_counts_up_to_its_overlap():
    # 62 of 100 columns: IoU 0.62, above the thresholds 0.50, 0.55 and 0.60
    metrics = coco_metrics(truth([0, 0, 100, 100]), [found([0, 0, 62, 100])])
    assert (metrics["AP"], metrics["AP50"], metrics["AP75"]) == pytest.approx((0.3, 1.0, 0.0))


def test_crowds_are_neither_missed_nor_false():
    document = truth(MEDIUM, LARGE)
    document["annotations"][1]["iscrowd"] = 1
    assert coco_metrics(document, [found(MEDIUM)])["AP"] == pytest.approx(1)
    assert coco_metrics(document, [found(MEDIUM, 0.5), found([80, 80, 30, 30], 0.9)])["AP"] == pytest.approx(1)


def test_detections_of_an_unknown_image_are_an_error():
    with pytest.raises(ValueError, match=r"not in the ground truth: \[5\]"):
        coco_metrics(truth(MEDIUM), [found(MEDIUM, image=5)])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hides packages."""

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize("hidden", ["pycocotools", "scipy"])
def test_a_missing_package_is_named_with_the_way_to_get_it(without: Any, hidden: str) -> None:
    assert coco_package() in ("pycocotools", "faster-coco-eval")
    without(hidden, "faster_coco_eval")
    with pytest.raises(ImportError, match=rf"{hidden} is not installed.* pip install 'hf_dropkey\[coco\]'"):
        coco_metrics(truth(MEDIUM), [])


def test_either_package_is_enough_and_a_choice_is_met(without: Any) -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval, of the extra [test]")
    assert coco_package() == "faster-coco-eval" and coco_package("pycocotools") == "pycocotools"
    assert package_version("faster-coco-eval").startswith("faster-coco-eval 1.")
    without("pycocotools", "pycocotools.coco", "pycocotools.cocoeval")
    assert coco_metrics(truth(MEDIUM), [found(MEDIUM)])["AP"] == pytest.approx(1)
    with pytest.raises(ImportError, match="pycocotools is not installed"):
        coco_metrics(truth(MEDIUM), [found(MEDIUM)], package="pycocotools")
    with pytest.raises(ValueError, match="--coco_package mine is not known; choose from auto, faster-coco-eval, pyc"):
        coco_package("mine")
    without("faster_coco_eval")
    with pytest.raises(ImportError, match="faster-coco-eval is not installed; run pip install faster-coco-eval"):
        coco_package("faster-coco-eval")


def test_without_the_faster_package_the_other_counts(without: Any) -> None:
    without("faster_coco_eval")
    assert coco_package() == "pycocotools"
    assert coco_metrics(truth(MEDIUM), [found(MEDIUM)])["AP"] == pytest.approx(1)


def test_both_packages_give_the_same_numbers() -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval, of the extra [test]")
    draws = np.random.default_rng(0)
    document: dict[str, Any] = {
        "images": [{"id": number, "width": 300, "height": 300} for number in range(30)],
        "categories": [{"id": number, "name": str(number)} for number in (3, 5, 9)],
        "annotations": [],
    }
    results = []
    for image in range(30):
        for _ in range(draws.integers(0, 8)):
            left, upper = draws.uniform(0, 180, 2)
            width, height = draws.uniform(4, 120, 2)
            category = int(draws.choice([3, 5, 9]))
            crowd = int(draws.random() < 0.1)
            box = [float(left), float(upper), float(width), float(height)]
            document["annotations"].append(
                {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            )
            for _ in range(draws.integers(0, 4)):
                moved = [float(value + draws.normal(scale=6)) for value in box]
                guess = category if draws.random() < 0.8 else 3
                # many equal scores
                score = float(np.round(draws.random(), 1))
                results.append({"image_id": image, "category_id": guess, "bbox": moved, "score": score})
    one, other = (coco_metrics(document, results, package=name) for name in ("pycocotools", "faster-coco-eval"))
    assert one == pytest.approx(other, abs=1e-12)
    assert 0.05 < one["AP"] < 0.95 and len(set(one.values())) > 8
    none = [coco_metrics(document, [], package=name) for name in ("pycocotools", "faster-coco-eval")]
    assert none[0] == none[1]


@pytest.mark.parametrize(
    ("processor", "extra_class"),
    [
        (DetrImageProcessorPil(), True),
        (YolosImageProcessorPil(), True),
        (ConditionalDetrImageProcessorPil(), False),
        (RTDetrImageProcessorPil(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_detections_are_boxes_in_pixels_with_class_and_score(processor, extra_class):
    logits = torch.full((2, 3, 4 + extra_class), -9.0)
    # image 0: query 1 is class 2; image 1: query 0 is class 3
    logits[0, 1, 2] = logits[1, 0, 3] = 9.0
    boxes = torch.full((2, 3, 4), 0.5)
    boxes[0, 1] = torch.tensor([0.5, 0.25, 0.2, 0.1])
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    detections = post_process(processor, outputs, torch.tensor([[100.0, 200.0], [50.0, 40.0]]))
    assert detections.shape[0] == 2 and detections.shape[2] == 6 and detections.shape[1] >= 3
    best = detections[0, detections[0, :, 0].argmax()]
    torch.testing.assert_close(best[1:], torch.tensor([2.0, 80.0, 20.0, 120.0, 30.0]))
    assert best[0] > 0.99
    best = detections[1, detections[1, :, 0].argmax()]
    torch.testing.assert_close(best[1:], torch.tensor([3.0, 10.0, 12.5, 30.0, 37.5]))


def test_results_are_cut_at_the_border_and_unannotated_classes_left_out():
    detections = np.array([[0.9, 1, -5, 2, 30, 90], [0.8, 0, 1, 1, 2, 2]])
    image = {"id": 4, "width": 20, "height": 50}
    assert coco_results(detections, image, [None, 7]) == [
        {"image_id": 4, "category_id": 7, "bbox": [0, 2, 20, 48], "score": 0.9}
    ]


def test_metrics_of_a_trainer_are_those_of_the_images_it_evaluated():
    document = truth(MEDIUM, images=2)
    boxes = {0: document["annotations"], 1: [{**document["annotations"][0], "image_id": 1}]}
    split = DetectionSplit("two", document["images"], lambda image: image, boxes, document["categories"])
    right = [[0.9, 0, 10, 10, 60, 70], [0.1, 0, 0, 0, 9, 9]]
    compute = CocoMetrics(split, [7])
    assert compute(EvalPrediction(np.array([right]), np.array([1])))["AP"] == pytest.approx(1)
    wrong = [[0.9, 0, 100, 100, 120, 120], [0.1, 0, 0, 0, 9, 9]]
    half = compute(EvalPrediction(np.array([right, wrong]), np.array([1, 0])))
    # both images' best detections have one score; the stable order takes the first image's first
    assert 0 < half["AP"] < 1 and half["AR_100"] == pytest.approx(0.5)
