"""From an annotated image to a batch: pairs stay pairs through crops and flips, verbs of one pair are one target."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessorPil

from hf_dropkey.hoi.data import Annotation, HoiSplit
from hf_dropkey.hoi.transform import HoiDataset, collate, kept_pairs, pair_targets
from hf_dropkey.images.boxes import BoxAugmentation


SIZE = {"shortest_edge": 40, "longest_edge": 40}


def annotation(pairs: list[tuple[int, int, int]] | None = None) -> Annotation:
    """A person on the left, a ball on the right, a person in the middle."""
    boxes = np.array([[2.0, 4.0, 12.0, 28.0], [30.0, 10.0, 38.0, 18.0], [18.0, 4.0, 26.0, 28.0]])
    chosen = [(0, 1, 0), (0, 1, 2), (2, -1, 1), (2, 0, 1)] if pairs is None else pairs
    return Annotation(boxes, np.array([0, 1, 0]), np.array(chosen, dtype=np.int64).reshape(-1, 3))


def split(folder: Path, *annotations: Annotation) -> HoiSplit:
    images: list[dict[str, Any]] = []
    for number in range(len(annotations)):
        width, height = (40, 32) if number % 2 == 0 else (32, 40)
        Image.new("RGB", (width, height), (number * 40, 0, 0)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    cell = lambda image: {"bytes": None, "path": str(folder / image["file_name"])}  # noqa: E731  # a one-line stand-in
    return HoiSplit("made", images, cell, list(annotations), ["person", "ball"], ["hold", "walk", "kick"])


def test_verbs_of_one_pair_are_one_target() -> None:
    targets = pair_targets(annotation(), (40, 32), 3, missing_label=2)
    assert targets["class_labels"].tolist() == [1, 2, 0]
    assert targets["verb_labels"].tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert targets["person_boxes"][0] == pytest.approx([7 / 40, 16 / 32, 10 / 40, 24 / 32])
    assert targets["object_boxes"][0] == pytest.approx([34 / 40, 14 / 32, 8 / 40, 8 / 32])
    assert targets["object_boxes"][1].tolist() == [0, 0, 0, 0]
    # the person in the middle acts on the other one
    assert targets["object_boxes"][2] == pytest.approx(targets["person_boxes"][0])


def test_images_without_pairs() -> None:
    targets = pair_targets(annotation([]), (40, 32), 3, missing_label=None)
    assert {name: value.shape for name, value in targets.items()} == {
        "class_labels": (0,),
        "verb_labels": (0, 3),
        "person_boxes": (0, 4),
        "object_boxes": (0, 4),
    }


def test_a_missing_object_needs_a_class() -> None:
    with pytest.raises(ValueError, match="no class for a missing object"):
        pair_targets(annotation(), (40, 32), 3, missing_label=None)


@pytest.mark.parametrize(
    ("stay", "expected"),
    [
        ([True, True, True], [(0, 1, 0), (0, 1, 2), (2, -1, 1), (2, 0, 1)]),
        # a lost object takes its pairs along, other pairs stay with new numbers
        ([True, False, True], [(1, -1, 1), (1, 0, 1)]),
        ([False, True, True], [(1, -1, 1)]),
        ([True, True, False], [(0, 1, 0), (0, 1, 2)]),
        ([False, False, False], []),
    ],
)
def test_pairs_that_lose_a_box_vanish(stay: list[bool], expected: list[tuple[int, int, int]]) -> None:
    whole = annotation()
    kept = kept_pairs(whole, whole.boxes[stay], np.array(stay))
    assert [tuple(pair) for pair in kept.pairs.tolist()] == expected
    assert kept.labels.tolist() == whole.labels[stay].tolist()


def test_a_crop_keeps_what_is_left_of_a_box() -> None:
    image, whole = Image.new("RGB", (40, 32)), annotation()
    augmentation = BoxAugmentation(flip_probability=0, crop_scale=0.2, keep_cut=True)
    by_center = BoxAugmentation(flip_probability=0, crop_scale=0.2)
    more = 0
    for seed in range(50):
        _, corners, stay = augmentation(image, whole.boxes, np.random.default_rng(seed))
        _, _, fewer = by_center(image, whole.boxes, np.random.default_rng(seed))
        assert (stay | ~fewer).all()
        more += int((stay & ~fewer).sum())
        assert (corners[:, 2:] - corners[:, :2] >= 1).all()
    assert more > 0


def test_a_flip_moves_boxes_and_keeps_pairs(tmp_path: Path) -> None:
    one = split(tmp_path, annotation())
    processor = DetrImageProcessorPil(size=SIZE)
    plain = HoiDataset(one, processor, missing_label=2)[0]["labels"]
    flipped = HoiDataset(one, processor, missing_label=2, augmentation=BoxAugmentation(1.0, keep_cut=True))[0][
        "labels"
    ]
    assert torch.equal(plain["verb_labels"], flipped["verb_labels"])
    torch.testing.assert_close(flipped["person_boxes"][:, 0], 1 - plain["person_boxes"][:, 0])
    real = plain["class_labels"] != 2
    torch.testing.assert_close(flipped["object_boxes"][real, 0], 1 - plain["object_boxes"][real, 0])
    # a missing object stays a box of zeros
    assert not flipped["object_boxes"][~real].any()


def test_draws_depend_on_seed_epoch_and_image(tmp_path: Path) -> None:
    one = split(tmp_path, annotation())
    augmentation = BoxAugmentation(0.5, crop_scale=0.3, keep_cut=True)
    dataset = HoiDataset(one, DetrImageProcessorPil(size=SIZE), missing_label=2, augmentation=augmentation)
    first = dataset[0]["pixel_values"]
    assert torch.equal(first, dataset[0]["pixel_values"])
    dataset.epoch.fill_(1)
    assert first.shape != dataset[0]["pixel_values"].shape or not torch.equal(first, dataset[0]["pixel_values"])


def test_a_batch_is_padded_and_boxes_stay_fractions_of_the_image(tmp_path: Path) -> None:
    one = split(tmp_path, annotation(), annotation([]))
    dataset = HoiDataset(one, DetrImageProcessorPil(size=SIZE), missing_label=2)
    batch = collate([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 40, 40)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 32, 32 * 40]
    assert len(batch["labels"][0]["class_labels"]) == 3
    assert len(batch["labels"][1]["class_labels"]) == 0
    assert batch["labels"][1]["frame"].tolist() == [40, 32]
    assert batch["labels"][0]["person_boxes"][0].tolist() == pytest.approx([7 / 40, 16 / 32, 10 / 40, 24 / 32])
