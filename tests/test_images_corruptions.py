"""Images made worse: as strong as they should be, the same each time, and of the same size and mode."""

import numpy as np
import pytest
from PIL import Image

from hf_dropkey.images.corruptions import BLUR, BLUR_SIDE, CONTRAST, CORRUPTIONS, NOISE, STRENGTHS, corrupt


def photograph(side: int = 224, mode: str = "RGB") -> Image.Image:
    """Smooth shapes and fine texture, away from black and white."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    draws = np.random.default_rng(0)
    waves = [127 + 40 * np.sin(6 * rows + phase) * np.cos(9 * columns) for phase in (0.0, 1.0, 2.0)]
    pixels = np.stack(waves, axis=-1) + draws.normal(scale=12, size=(side, side, 3))
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8)).convert(mode)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_strength_is_worse_than_the_one_before(kind: str, mode: str) -> None:
    image = photograph(mode=mode)
    before = image.tobytes()
    found = [corrupt(image, kind, strength, row=3) for strength in STRENGTHS]
    distances = [distance(image, one) for one in found]
    assert distances == sorted(distances) and distances[0] > 1 and len(set(distances)) == 5
    assert all((one.size, one.mode) == (image.size, mode) for one in found)
    assert image.tobytes() == before


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_row_alone_decides(kind: str) -> None:
    image = photograph(32)
    one = corrupt(image, kind, 2, row=3)
    np.random.default_rng().normal()
    assert one.tobytes() == corrupt(image, kind, 2, row=3).tobytes()
    for other in (corrupt(image, kind, 2, row=4), corrupt(image, kind, 2, row=3, seed=1)):
        assert (one.tobytes() != other.tobytes()) == (kind == "noise")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_strengths_are_those_of_the_table(strength: int) -> None:
    grey = Image.new("L", (200, 200), 128)
    noisy = np.asarray(corrupt(grey, "noise", strength, row=0), dtype=float)
    # the two strongest are cut off at black and white
    if strength < 4:
        assert noisy.std() / 255 == pytest.approx(NOISE[strength - 1], rel=0.02)
    image = photograph(64)
    before, after = (np.asarray(one, dtype=float) for one in (image, corrupt(image, "contrast", strength, row=0)))
    assert after.std(axis=(0, 1)) / before.std(axis=(0, 1)) == pytest.approx(CONTRAST[strength - 1], rel=0.1)
    assert after.mean(axis=(0, 1)) == pytest.approx(before.mean(axis=(0, 1)), abs=0.5)


def test_the_blur_is_a_gaussian_of_its_width_at_any_size() -> None:
    for side in (224, 448):
        dot = np.zeros((side, side), dtype=np.uint8)
        dot[side // 2, side // 2 - 1 : side // 2 + 1] = 255
        spread = np.asarray(corrupt(Image.fromarray(dot).resize((side, side)), "blur", 1, row=0), dtype=float)
        weights = spread.sum(axis=1) / spread.sum()
        places = np.arange(side)
        width = np.sqrt((weights * (places - (weights * places).sum()) ** 2).sum())
        # eight bits cut the tails off
        assert width == pytest.approx(BLUR[0] * side / BLUR_SIDE, rel=0.25)


def test_what_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="fog at strength 1 is not known; choose from noise, blur, contrast, jpeg"):
        corrupt(photograph(8), "fog", 1, row=0)
    with pytest.raises(ValueError, match="noise at strength 6 is not known"):
        corrupt(photograph(8), "noise", 6, row=0)
    with pytest.raises(ValueError, match="mode RGBA; convert it to L or RGB first"):
        corrupt(photograph(8).convert("RGBA"), "jpeg", 1, row=0)
