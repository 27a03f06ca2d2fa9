"""Sizes of every family are what their names say, and images reach them as their published evaluations had it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_dropkey.classification.families import FAMILIES, SMALLEST, family_of, image_processor


EVERY_SIZE = [(name, size) for name, family in FAMILIES.items() for size in family.sizes]


def parameters(family: str, size: str, **shape: int) -> int:
    about = FAMILIES[family]
    with torch.device("meta"):
        model = about.model_class(about.config_class(**about.sizes[size], **shape))
    return sum(parameter.numel() for parameter in model.parameters())


# Touvron et al., DeiT, ICML 2021, table 1: 5, 22 and 86 million
@pytest.mark.parametrize(("size", "count"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_sizes_of_vit_are_those_of_deit(size: str, count: int) -> None:
    assert parameters("vit", size, **FAMILIES["vit"].photo_shape, num_labels=1000) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_size_for_the_digits(family: str) -> None:
    about = FAMILIES[family]
    assert about.usual_size in about.sizes
    assert parameters(family, SMALLEST, **about.digits_shape, num_labels=10) < 500_000


@pytest.mark.parametrize(("family", "size"), EVERY_SIZE)
def test_every_size_takes_the_usual_photographs(family: str, size: str) -> None:
    about = FAMILIES[family]
    assert about.config_class(**about.sizes[size], **about.photo_shape).image_size == 224


def test_configurations_belong_to_a_family() -> None:
    for name, family in FAMILIES.items():
        assert family_of(family.config_class.model_type) == name
    assert family_of("vit") == "vit"
    assert family_of("swin") is family_of(None) is None


# --- image processors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "image_size", "shortest_edge"),
    [
        ("t2t_vit", "t2t_vit_14", 224, 248),
        ("t2t_vit", "t2t_vit_t_14", 384, 426),
        ("volo", "volo_d1", 224, 233),
        ("volo", "volo_d2", 384, 384),
        ("volo", "volo_d3", 448, 448),
        ("volo", "volo_d4", 448, 389),
        ("volo", "volo_d5", 512, 445),
        ("ceit", "ceit_tiny", 224, 256),
        ("ceit", "ceit_small", 384, 438),
    ],
)
@pytest.mark.usefixtures("auto_image_processor")
def test_image_processors_crop_as_the_published_evaluations(
    tmp_path: Path, family: str, size: str, image_size: int, shortest_edge: int
) -> None:
    image_processor(family, size, image_size).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((600, 700), Image.Resampling.BICUBIC)
    found = processor(photo, return_tensors="pt")["pixel_values"][0]

    width, height = shortest_edge, int(700 * shortest_edge / 600)
    resized = photo.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    pixels = np.asarray(resized.crop((left, top, left + image_size, top + image_size))) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.shape == (3, image_size, image_size)
    # a crop beyond the image is padded with black
    assert (left < 0) == (image_size > shortest_edge)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-5, rtol=0)


def test_gray_images_become_three_channels() -> None:
    processor = image_processor("ceit", "ceit_tiny", 32)
    assert processor(Image.new("L", (40, 50)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_vit_takes_the_whole_image() -> None:
    processor = image_processor("vit", "tiny", 16)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    found = processor(picture, return_tensors="pt")["pixel_values"][0]
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)) / 127.5 - 1
    torch.testing.assert_close(found.double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_one_channel_get_gray_images(family: str) -> None:
    processor = image_processor(family, SMALLEST, 32, num_channels=1)
    found = processor(Image.new("L", (40, 50), 255), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, torch.ones(1, 1, 32, 32))
