"""Images and masks change together, keep whole class numbers, and are the same after a resume."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerImageProcessorPil

from hf_dropkey.segmentation.data import scene_split
from hf_dropkey.segmentation.transform import MaskAugmentation, SegmentationDataset, collate


def dataset(**more: Any) -> SegmentationDataset:
    processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    return SegmentationDataset(scene_split("train", 6, 48, 255), processor, 32, range(5), **more)


@pytest.mark.usefixtures("auto_image_processor")
def test_rows_have_one_size_and_the_model_s_numbers() -> None:
    plain = dataset()
    row = plain[2]
    assert row["pixel_values"].shape == (3, 32, 32) and row["labels"].shape == (32, 32) and row["rows"] == 2
    other = dataset()
    other.numbers = np.array([4, 3, 2, 1, 0])
    assert torch.equal(other[2]["labels"], 4 - row["labels"])
    batch = collate([plain[0], plain[1]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["rows"].tolist() == [0, 1]


@pytest.mark.usefixtures("auto_image_processor")
def test_draws_depend_on_seed_epoch_and_image() -> None:
    varied = dataset(augmentation=MaskAugmentation(crop_scale=0.3, color_jitter=0.4), seed=1)
    again = dataset(augmentation=MaskAugmentation(crop_scale=0.3, color_jitter=0.4), seed=1)
    assert torch.equal(varied[3]["pixel_values"], again[3]["pixel_values"])
    assert torch.equal(varied[3]["labels"], again[3]["labels"])
    again.epoch.fill_(1)
    assert not torch.equal(varied[3]["pixel_values"], again[3]["pixel_values"])


def test_image_and_mask_change_together() -> None:
    """With an image whose brightness is its class, they still agree after every change, away from borders."""
    mask = np.zeros((40, 60), np.int32)
    mask[10:30, 5:25], mask[20:38, 30:55] = 1, 2
    image = Image.fromarray(np.repeat((100 * mask)[..., None], 3, axis=2).astype(np.uint8))
    augmentation = MaskAugmentation(crop_scale=0.3)
    for seed in range(20):
        changed, moved = augmentation(image, Image.fromarray(mask), 32, np.random.default_rng(seed))
        assert changed.size == moved.size == (32, 32)
        assert set(np.unique(np.asarray(moved))) <= {0, 1, 2}
        agree = np.round(np.asarray(changed)[..., 0] / 100) == np.asarray(moved)
        assert agree.mean() > 0.85


@pytest.mark.usefixtures("auto_image_processor")
def test_ignored_pixels_stay_ignored() -> None:
    marked = dataset()
    mask = marked.split.mask

    def with_ignored(row: int) -> Any:
        found = mask(row).copy()
        found[:24] = 255
        return found

    object.__setattr__(marked.split, "mask", with_ignored)
    labels = marked[0]["labels"]
    assert (labels[:15] == 255).all() and (labels[17:] != 255).all()


@pytest.mark.parametrize(("name", "value"), [("flip_probability", 1.5), ("crop_scale", 0.0), ("color_jitter", -0.1)])
def test_values_outside_their_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name} {value} is outside"):
        MaskAugmentation(**{name: value})
