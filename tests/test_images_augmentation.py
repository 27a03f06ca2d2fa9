"""Augmentation is a function of (seed, epoch, row) and stays in its bounds; without it the processor decides alone."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments, ViTImageProcessorPil

from hf_dropkey.classification.transform import ImageTransform, collate_images
from hf_dropkey.images.augmentation import Augmentation, AugmentationEpoch, random_crop_box


SIDE = 16
EVERYTHING = Augmentation((SIDE, SIDE), 0.3, 0.5, 20.0, 0.2, 0.4)


def picture(seed: int = 0, height: int = SIDE, width: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def transform_of(augmentation: Augmentation | None = EVERYTHING, channels: int = 3, seed: int = 0) -> ImageTransform:
    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    return ImageTransform(
        processor, label_ids={"a": 0, "b": 1}, num_channels=channels, augmentation=augmentation, seed=seed
    )


def rows_of(count: int = 6) -> dict[str, list]:
    return {"image": [picture(n) for n in range(count)], "label": ["a", "b"] * (count // 2), "row": list(range(count))}


def test_by_default_only_the_size_changes():
    image = picture(0, 20, 30)
    expected = image.resize((8, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels(Augmentation((12, 8))(image, draws())), pixels(expected))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flip(probability):
    image = picture()
    flipped = pixels(Augmentation((SIDE, SIDE), flip_probability=probability)(image, draws()))
    assert np.array_equal(flipped, pixels(image)[:, ::-1] if probability else pixels(image))


def test_shift_moves_as_far_as_allowed_and_no_farther():
    image = Image.new("L", (41, 41))
    image.putpixel((20, 20), 255)
    ways = np.arange(41)
    moves = []
    for seed in range(200):
        moved = pixels(Augmentation((41, 41), shift_fraction=0.1)(image, draws(seed)))
        moves.append([(moved.sum(axis) * ways).sum() / moved.sum() - 20 for axis in (0, 1)])
    largest = np.abs(moves).max(axis=0)
    # blurring between pixels moves the centre of the spot by less than half a pixel
    assert (largest > 3.0).all()
    assert (largest < 4.1 + 0.5).all()
    assert np.abs(np.mean(moves, axis=0)).max() < 0.6


def test_rotation_turns_around_the_centre_to_both_sides():
    image = Image.new("L", (41, 41))
    image.paste(255, (30, 19, 35, 22))
    angles = []
    for seed in range(200):
        turned = pixels(Augmentation((41, 41), rotation_degrees=30)(image, draws(seed)))
        rows, columns = np.indices(turned.shape) - 20
        x, y = (turned * columns).sum() / turned.sum(), (turned * rows).sum() / turned.sum()
        assert np.hypot(x, y) == pytest.approx(12, abs=0.5)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert max(angles) == pytest.approx(30, abs=3)
    assert min(angles) == pytest.approx(-30, abs=3)


def test_crops_keep_the_promised_share_inside_the_image():
    generator = draws()
    fractions = []
    for _ in range(500):
        left, upper, right, lower = random_crop_box((60, 40), smallest_scale=0.35, generator=generator)
        assert 0 <= left < right <= 60 and 0 <= upper < lower <= 40
        fractions.append((right - left) * (lower - upper) / 2400)
        assert 0.74 < (right - left) / (lower - upper) < 1.34 or fractions[-1] == 1
    assert min(fractions) < 0.4 and max(fractions) > 0.8
    assert min(fractions) >= 0.35 - 1e-9


def test_jitter_changes_brightness_both_ways_within_bounds():
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    values = [pixels(Augmentation((4, 4), color_jitter=0.2)(image, draws(seed))).mean() for seed in range(100)]
    assert 79 <= min(values) < 90 and 110 < max(values) <= 121


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_mode_stays(mode):
    assert EVERYTHING(picture().convert(mode), draws()).mode == mode


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", 0.0),
        ("crop_scale", 1.1),
        ("flip_probability", -0.1),
        ("rotation_degrees", 181.0),
        ("shift_fraction", 1.0),
        ("color_jitter", float("nan")),
    ],
)
def test_values_outside_their_range_are_errors(name, value):
    with pytest.raises(ValueError, match=f"--{name} {value} is outside"):
        Augmentation((SIDE, SIDE), **{name: value})


def test_without_augmentation_the_processor_decides_alone():
    transform = transform_of(None)
    rows = rows_of()
    out = transform(rows)
    assert torch.equal(out["pixel_values"], transform.processor(rows["image"], return_tensors="pt")["pixel_values"])
    assert out["labels"] == [0, 1, 0, 1, 0, 1]


def test_augmented_images_are_not_cropped_again():
    size = {"height": SIDE, "width": SIDE}
    processor = ViTImageProcessorPil(size={"shortest_edge": 2 * SIDE}, do_center_crop=True, crop_size=size)
    row = {"image": [picture()], "label": ["a"], "row": [0]}
    transform = ImageTransform(processor, label_ids={"a": 0}, num_channels=3, augmentation=Augmentation((SIDE, SIDE)))
    expected = torch.from_numpy(pixels(picture()) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(transform(row)["pixel_values"][0].double(), expected, atol=1e-5, rtol=0)


def test_an_image_depends_on_seed_epoch_and_row_alone():
    rows = rows_of()
    transform = transform_of()
    together = transform(rows)["pixel_values"]
    alone = [transform({name: [column[n]] for name, column in rows.items()})["pixel_values"][0] for n in (5, 2)]
    assert torch.equal(together[5], alone[0]) and torch.equal(together[2], alone[1])
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(transform_of()(rows)["pixel_values"], together)
    assert not torch.equal(transform_of(seed=1)(rows)["pixel_values"], together)
    transform.epoch.fill_(1)
    next_epoch = transform(rows)["pixel_values"]
    assert all(not torch.equal(before, after) for before, after in zip(together, next_epoch, strict=True))


def test_two_rows_with_the_same_picture_vary_differently():
    rows = {"image": [picture()] * 2, "label": ["a"] * 2, "row": [0, 1]}
    first, second = transform_of()(rows)["pixel_values"]
    assert not torch.equal(first, second)


def test_the_callback_tells_epochs_from_the_trainers_state(tmp_path):
    transform = transform_of()
    callback = AugmentationEpoch(transform)
    for epoch, expected in ((None, 0), (0.0, 0), (0.75, 0), (1.0, 1), (2.5, 2)):
        state = TrainerState(epoch=epoch)
        callback.on_epoch_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
        assert int(transform.epoch) == expected


def test_processes_of_a_data_loader_see_the_epoch_and_give_the_same_images():
    transform = transform_of()
    rows = Dataset.from_dict(rows_of())
    rows.set_transform(transform)
    settings = {"batch_size": 4, "collate_fn": collate_images}
    plain = DataLoader(rows, **settings)
    parallel = DataLoader(rows, **settings, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in (0, 1):
        transform.epoch.fill_(epoch)
        batches = list(zip(plain, parallel, strict=True))
        assert [len(batch["labels"]) for batch, _ in batches] == [4, 2]
        for expected, batch in batches:
            assert torch.equal(expected["pixel_values"], batch["pixel_values"])
            assert torch.equal(expected["labels"], batch["labels"])
        seen.append(batches[0][1]["pixel_values"])
    assert not torch.equal(*seen)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers):
    file = io.BytesIO()
    picture().save(file, format="PNG")
    cells = [{"bytes": file.getvalue()[:end], "path": None} for end in (None, 60)]
    rows = Dataset.from_dict({"image": cells, "label": ["a", "b"], "row": [4, 7]})
    rows.set_transform(transform_of(None))
    whole, cut = DataLoader(rows.select([0])), DataLoader(rows, num_workers=workers, collate_fn=collate_images)
    whole_pixels = next(iter(whole))["pixel_values"][0]
    assert torch.equal(whole_pixels, transform_of(None)(rows_of(2))["pixel_values"][0])
    with pytest.raises(ValueError, match=r"an image cannot be used: row 7 \(.*Repair or remove it"):
        list(cut)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGBA"), (3, "L"), (3, "P"), (1, "1")])
def test_images_get_the_channels_of_the_model(channels, mode):
    rows = {"image": [picture().convert(mode)], "label": ["a"], "row": [0]}
    for augmentation in (None, EVERYTHING):
        pixel_values = transform_of(augmentation, channels)(rows)["pixel_values"]
        assert pixel_values.shape == (1, channels, SIDE, SIDE)
        assert pixel_values.abs().max() <= 1


def test_other_numbers_of_channels_are_errors():
    with pytest.raises(ValueError, match=r"--num_channels 2 is not among \[1, 3\], the channels of images"):
        transform_of(channels=2)
