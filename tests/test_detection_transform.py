"""Tests of what an image with boxes goes through on its way to a model: boxes stay around what they surround."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessorPil, RTDetrImageProcessorPil

from hf_dropkey.detection.data import DetectionSplit
from hf_dropkey.detection.transform import DetectionCollator, DetectionDataset
from hf_dropkey.images.boxes import BoxAugmentation


NUMBERS = {3: 0, 9: 1}


@pytest.fixture
def split(tmp_path: Path) -> DetectionSplit:
    """Three images of 40 x 30 pixels: two boxes, one crowd beside one box, none."""
    generator = np.random.default_rng(0)
    for number in (5, 6, 7):
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")

    def annotation(category: int, bbox: list[float], iscrowd: int = 0) -> dict[str, Any]:
        return {"category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": iscrowd}

    boxes = {
        5: [annotation(3, [4, 6, 10, 12]), annotation(9, [20.5, 3, 19.5, 9])],
        6: [annotation(9, [0, 0, 40, 30]), annotation(3, [1, 1, 5, 5], iscrowd=1)],
        7: [],
    }
    images = [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 30} for number in boxes]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]
    return DetectionSplit(
        "three", images, lambda image: {"bytes": None, "path": str(tmp_path / image["file_name"])}, boxes, categories
    )


SIZE = {"shortest_edge": 80, "longest_edge": 80}


def test_a_row_is_an_image_and_its_boxes_as_shares(split):
    row = DetectionDataset(split, DetrImageProcessorPil(size=SIZE), NUMBERS)[0]
    assert row["pixel_values"].shape == (3, 60, 80)
    labels = row["labels"]
    expected = [[9 / 40, 12 / 30, 10 / 40, 12 / 30], [30.25 / 40, 7.5 / 30, 19.5 / 40, 9 / 30]]
    torch.testing.assert_close(labels["boxes"], torch.tensor(expected))
    assert labels["class_labels"].tolist() == [0, 1] and labels["frame"].tolist() == [30, 40]
    # no crowd in training; no box at all is fine
    dataset = DetectionDataset(split, DetrImageProcessorPil(size=SIZE), NUMBERS)
    assert dataset[1]["labels"]["class_labels"].tolist() == [1]
    assert dataset[2]["labels"]["boxes"].shape == (0, 4)


def test_augmentation_repeats_with_the_epoch_and_differs_without(split):
    augmentation = BoxAugmentation(flip_probability=0.5, crop_scale=0.5, color_jitter=0.3)

    def rows(epoch: int, seed: int) -> list[torch.Tensor]:
        processor = RTDetrImageProcessorPil(size={"height": 32, "width": 32})
        dataset = DetectionDataset(split, processor, NUMBERS, augmentation=augmentation, seed=seed)
        dataset.epoch.fill_(epoch)
        return [dataset[number]["pixel_values"] for number in range(3)]

    same, again = rows(1, 0), rows(1, 0)
    assert all(torch.equal(one, other) for one, other in zip(same, again, strict=True))
    for other in (rows(2, 0), rows(1, 1)):
        assert not any(torch.equal(one, another) for one, another in zip(same, other, strict=True))


def marked(corners: list[int]) -> Image.Image:
    """Black, with a white box."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    left, upper, right, lower = corners
    pixels[upper:lower, left:right] = 255
    return Image.fromarray(pixels)


def white_box(image: Image.Image) -> list[int]:
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 128)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("augmentation", [BoxAugmentation(1.0), BoxAugmentation(0.5, crop_scale=0.3)], ids=str)
def test_boxes_move_with_what_they_surround(augmentation):
    kept = 0
    for seed in range(40):
        corners = np.array([[4.0, 6.0, 14.0, 18.0]])
        image, moved, stay = augmentation(marked([4, 6, 14, 18]), corners, np.random.default_rng(seed))
        assert len(moved) == stay.sum()
        kept += len(moved)
        if len(moved):
            assert moved[0].tolist() == white_box(image)
    assert kept == 40 if augmentation.crop_scale == 1 else 5 < kept < 40


@pytest.mark.parametrize("name", ["flip_probability", "crop_scale", "color_jitter"])
def test_augmentation_outside_its_range_is_named(name):
    with pytest.raises(ValueError, match=rf"--{name} 1.5 is outside"):
        BoxAugmentation(**{name: 1.5})


def test_a_batch_is_padded_and_says_what_its_boxes_are_shares_of():
    def row(height: int, width: int) -> dict[str, Any]:
        labels = {"boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]), "class_labels": torch.tensor([0])}
        labels |= {"row": torch.tensor(0), "frame": torch.tensor([10.0 * height, 10.0 * width])}
        return {"pixel_values": torch.ones(3, height, width), "labels": labels}

    batch = DetectionCollator(with_mask=True)([row(4, 8), row(6, 3)])
    assert batch["pixel_values"].shape == (2, 3, 6, 8) and batch["pixel_mask"].sum((1, 2)).tolist() == [32, 18]
    assert torch.equal(batch["pixel_values"][:, 0], batch["pixel_mask"].float())
    assert batch["labels"][0]["boxes"].tolist() == [[0.5, 0.5, 1, 1]]
    assert batch["labels"][0]["frame"].tolist() == [40, 80]
    plain = DetectionCollator(with_mask=False)([row(4, 8), row(6, 3)])
    assert "pixel_mask" not in plain
    # four of six rows: the box ends where the image does, and the frame is larger by as much
    torch.testing.assert_close(plain["labels"][0]["boxes"], torch.tensor([[0.5, 1 / 3, 1, 2 / 3]]))
    torch.testing.assert_close(plain["labels"][0]["frame"], torch.tensor([60.0, 80.0]))
    torch.testing.assert_close(plain["labels"][1]["frame"], torch.tensor([60.0, 80.0]))
