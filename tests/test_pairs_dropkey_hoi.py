"""From raw outputs to readable pairs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dropkey.models.pairs_dropkey_hoi import box_iou, find_pairs, pair_arrays


OBJECTS, VERBS = ["person", "ball", "missing"], ["hold", "kick"]


def outputs(
    labels: list[int], verbs: list[list[float]], boxes: list[list[float]] | None = None, sure: float = 20.0
) -> Any:
    """One image; the class of each query is nearly certain, `verbs` are probabilities."""
    logits = torch.zeros(1, len(labels), 4)
    logits[0, range(len(labels)), labels] = sure
    corners = boxes or [[0.5, 0.5, 0.2, 0.4]] * len(labels)
    return SimpleNamespace(
        logits=logits,
        verb_logits=torch.tensor([verbs]).logit(),
        person_boxes=torch.tensor([corners]),
        object_boxes=torch.tensor([[[0.25, 0.5, 0.1, 0.2]] * len(labels)]),
    )


def pairs(found: Any, **options: Any) -> list[dict[str, Any]]:
    return find_pairs(found, [[100, 200]], objects=OBJECTS, verbs=VERBS, missing_label=2, **options)[0]


def test_a_pair() -> None:
    (pair,) = pairs(outputs([1], [[0.3, 0.8]]), threshold=0.5)
    assert pair["person_box"] == pytest.approx([80, 30, 120, 70])
    assert pair["object_box"] == pytest.approx([40, 40, 60, 60])
    assert pair["object"] == "ball"
    assert pair["object_score"] == pytest.approx(1.0)
    assert pair["verbs"] == {"kick": pytest.approx(0.8)}


def test_scores_of_verbs_include_the_objects() -> None:
    (pair,) = pairs(outputs([1], [[0.3, 0.8]], sure=1.0), threshold=0.0)
    assert pair["object_score"] < 0.6
    assert pair["verbs"]["kick"] == pytest.approx(0.8 * pair["object_score"])
    assert list(pair["verbs"]) == ["kick", "hold"]


def test_a_missing_object_has_no_box() -> None:
    (pair,) = pairs(outputs([2], [[0.3, 0.8]]))
    assert pair["object"] is None
    assert pair["object_box"] is None


def test_no_pair_leaves_the_best_real_class() -> None:
    arrays = pair_arrays(outputs([3], [[0.3, 0.8]]), [[100, 200]])[0]
    assert arrays.object_scores.item() < 1e-6
    assert pairs(outputs([3], [[0.3, 0.8]])) == []


def test_order_threshold_and_number() -> None:
    found = outputs([1, 1, 0], [[0.3, 0.2], [0.9, 0.6], [0.05, 0.01]])
    assert [max(pair["verbs"].values()) for pair in pairs(found)] == pytest.approx([0.9, 0.3])
    assert len(pairs(found, threshold=0.0)) == 3
    assert len(pairs(found, threshold=0.0, top_k=None)) == 3
    assert len(pairs(found, threshold=0.0, top_k=1)) == 1


def test_nms_leaves_out_what_a_better_pair_covers() -> None:
    near, far = [0.51, 0.5, 0.2, 0.4], [0.8, 0.5, 0.2, 0.4]
    found = outputs(
        [1, 1, 1, 0], [[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.6, 0.1]], [[0.5, 0.5, 0.2, 0.4], near, far, near]
    )
    assert len(pairs(found)) == 4
    # the second repeats the first; the third has another person, the fourth another class
    assert [max(pair["verbs"].values()) for pair in pairs(found, nms=0.5)] == pytest.approx([0.9, 0.7, 0.6])
    assert len(pairs(found, nms=1.0)) == 4


def test_missing_objects_are_compared_by_their_persons() -> None:
    found = outputs([2, 2], [[0.9, 0.1], [0.8, 0.1]])
    found.object_boxes[0, 1] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    assert len(pairs(found, nms=0.5)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.1}, r"`threshold` must be in \[0, 1\], got 1.1"),
        ({"threshold": -0.1}, r"`threshold` must be in"),
        ({"nms": 2}, r"`nms` must be in \[0, 1\], got 2"),
        ({"top_k": 0}, "`top_k` must be at least 1, or None"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(outputs([1], [[0.3, 0.8]]), **options)


def test_another_number_of_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="height and width of each of 1 images"):
        pair_arrays(outputs([1], [[0.3, 0.8]]), [[100, 200], [100, 200]])


def test_half_precision_outputs() -> None:
    found = outputs([1], [[0.3, 0.8]])
    half = SimpleNamespace(**{name: value.to(torch.bfloat16) for name, value in vars(found).items()})
    assert pairs(half)[0]["verbs"]["kick"] == pytest.approx(0.8, abs=0.01)


def test_box_iou_of_empty_boxes() -> None:
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
