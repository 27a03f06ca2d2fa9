"""RandAugment, TrivialAugment and random erasing: pure functions of the generator, on grey and colour images."""

import numpy as np
import pytest
from PIL import Image

from hf_dropkey.images.augmentation import Augmentation
from hf_dropkey.images.policies import (
    ERASED_AREA,
    GREY,
    NAMES,
    POLICIES,
    RANGES,
    Policy,
    apply_policy,
    erase_box,
    operate,
)


def photo(mode: str = "RGB", width: int = 24, height: int = 16) -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_variant_is_a_function_of_the_generator(policy: Policy, mode: str) -> None:
    image = photo(mode)
    variants = [apply_policy(image, policy, draws(seed)) for seed in range(40)]
    assert all((one.size, one.mode) == (image.size, mode) for one in variants)
    again = [apply_policy(image, policy, draws(seed)) for seed in range(40)]
    assert [one.tobytes() for one in variants] == [one.tobytes() for one in again]
    assert len({one.tobytes() for one in variants}) > 15


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_keeps_the_size_and_changes_nothing_at_strength_zero(name: str, mode: str) -> None:
    image = photo(mode)
    original = np.asarray(image, dtype=float)
    changes = []
    for strength in (0.0, 0.2, 1.0):
        changed = operate(image, name, strength, RANGES["trivialaugment"])
        assert (changed.size, changed.mode) == (image.size, mode)
        changes.append(np.abs(np.asarray(changed, dtype=float) - original).mean())
    if name in ("autocontrast", "equalize"):
        assert changes[0] == changes[1] == changes[2]
    elif name == "identity" or (name == "color" and mode == "L"):
        assert changes == [0, 0, 0]
    else:
        assert changes[0] == 0 and changes[1] > 0 and changes[2] > 0


def test_shifts_and_shears_go_where_they_say() -> None:
    image = photo("L")
    pixels = np.asarray(image)
    ranges = {"shift": 0.25, "shear": 1.0, "rotate": 90.0, "enhance": 1.0, "bits": 4.0}
    shifted = np.asarray(operate(image, "shift_x", 1.0, ranges))
    assert np.array_equal(shifted[:, :18], pixels[:, 6:]) and (shifted[:, 18:] == GREY).all()
    up = np.asarray(operate(image, "shift_y", -1.0, ranges))
    assert np.array_equal(up[4:], pixels[:-4]) and (up[:4] == GREY).all()
    posterized = np.asarray(operate(image, "posterize", 1.0, ranges))
    assert np.array_equal(posterized, pixels & 0b11110000)
    assert np.array_equal(
        np.asarray(operate(image, "solarize", 0.5, ranges)), np.where(pixels < 128, pixels, 255 - pixels)
    )


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="--augment autoaugment is not among randaugment, trivialaugment"):
        apply_policy(photo(), "autoaugment", draws())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_box_is_erased_within_the_area_of_the_paper(mode: str) -> None:
    image = photo(mode, 60, 40)
    original = np.asarray(image)
    fractions = []
    for seed in range(60):
        erased = np.asarray(erase_box(image, draws(seed)))
        assert np.array_equal(erased, np.asarray(erase_box(image, draws(seed))))
        changed = (erased != original).reshape(40, 60, -1).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert changed.sum() > 0.9 * area, "all of the box is noise"
        fractions.append(area / 2400)
    assert min(fractions) > 0.5 * ERASED_AREA[0] and max(fractions) < 1.2 * ERASED_AREA[1]
    assert 0.1 < np.mean(fractions) < 0.24


def test_augmentation_draws_these_last_so_that_the_others_stay_as_they_were() -> None:
    image = photo()
    plain = Augmentation((16, 16), 0.5, 0.5, 10.0, 0.1, 0.3)(image, draws(3))
    unused = Augmentation((16, 16), 0.5, 0.5, 10.0, 0.1, 0.3, None, 0.0)(image, draws(3))
    assert plain.tobytes() == unused.tobytes()
    more = Augmentation((16, 16), 0.5, 0.5, 10.0, 0.1, 0.3, "randaugment", 1.0)(image, draws(3))
    assert more.size == plain.size and more.tobytes() != plain.tobytes()
    erased = [Augmentation((16, 24), random_erasing=0.5)(image, draws(seed)) for seed in range(200)]
    same = sum(one.tobytes() == erased[0].resize((24, 16)).tobytes() for one in erased)
    untouched = sum(one.tobytes() == Augmentation((16, 24))(image, draws()).tobytes() for one in erased)
    assert same >= 1 and 70 < untouched < 130
    with pytest.raises(ValueError, match=r"--random_erasing 1.5 is outside \[0, 1\]"):
        Augmentation((8, 8), random_erasing=1.5)
