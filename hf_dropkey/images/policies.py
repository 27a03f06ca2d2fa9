"""RandAugment and TrivialAugment: random operations on an image, drawn from a generator, on Pillow alone.

Cubuk et al., "RandAugment", CVPR Workshops 2020; Müller and Hutter, "TrivialAugment", ICCV 2021, with its wide ranges.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


Policy = Literal["randaugment", "trivialaugment"]
POLICIES: tuple[Policy, ...] = ("randaugment", "trivialaugment")
GREY = 128
# of RandAugment on ImageNet: operations on each image, and their strength as a fraction of the largest
OPERATIONS, STRENGTH = 2, 9 / 30
# largest magnitudes: shear as a slope, shifts as fractions of the side, degrees, changes of brightness, contrast,
# colour and sharpness, and bits that are lost
RANGES: Mapping[Policy, Mapping[str, float]] = {
    "randaugment": {"shear": 0.3, "shift": 150 / 331, "rotate": 30.0, "enhance": 0.9, "bits": 4.0},
    "trivialaugment": {"shear": 0.99, "shift": 32 / 224, "rotate": 135.0, "enhance": 0.99, "bits": 6.0},
}
ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
# what they do is the same at any strength
FIXED: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "identity": lambda image: image,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
}
NAMES = (*FIXED, *ENHANCERS, "shear_x", "shear_y", "shift_x", "shift_y", "rotate", "posterize", "solarize")


def apply_policy(image: Image.Image, policy: Policy, generator: np.random.Generator) -> Image.Image:
    """A random variant of an image of mode L or RGB, of the same size and mode.

    Raises:
        ValueError: There is no such policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"--augment {policy} is not among {', '.join(POLICIES)}; choose one of them, or leave it out")
    single = policy == "trivialaugment"
    for _ in range(1 if single else OPERATIONS):
        name = NAMES[int(generator.integers(len(NAMES)))]
        strength = float(generator.random()) if single else STRENGTH
        sign = 1 if generator.random() < 0.5 else -1
        image = operate(image, name, strength * sign, RANGES[policy])
    return image


def operate(image: Image.Image, name: str, strength: float, ranges: Mapping[str, float]) -> Image.Image:
    """One operation on an image.

    Args:
        image: Of mode L or RGB.
        name: One of `NAMES`.
        strength: Fraction of the largest magnitude, [-1, 1]; the sign is a direction, and of no concern to some.
        ranges: The largest magnitudes.
    """
    if name in FIXED:
        return FIXED[name](image)
    if name in ENHANCERS:
        changed: Image.Image = ENHANCERS[name](image).enhance(1 + strength * ranges["enhance"])
        return changed
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(abs(strength) * ranges["bits"]))
    if name == "solarize":
        return ImageOps.solarize(image, round(256 * (1 - abs(strength))))
    fill = GREY if image.mode == "L" else (GREY,) * len(image.getbands())
    if name == "rotate":
        return image.rotate(strength * ranges["rotate"], Image.Resampling.BILINEAR, fillcolor=fill)
    width, height = image.size
    slope, shift = strength * ranges["shear"], strength * ranges["shift"]
    # the inverse map, about the centre
    matrices = {
        "shear_x": (1.0, slope, -slope * height / 2, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, slope, 1.0, -slope * width / 2),
        "shift_x": (1.0, 0.0, shift * width, 0.0, 1.0, 0.0),
        "shift_y": (1.0, 0.0, 0.0, 0.0, 1.0, shift * height),
    }
    return image.transform(
        image.size, Image.Transform.AFFINE, matrices[name], Image.Resampling.BILINEAR, fillcolor=fill
    )


# the area of an erased box as a fraction of the image's, and its aspect ratio, as in the paper
ERASED_AREA, ERASED_ASPECT, ERASING_TRIES = (0.02, 0.33), (0.3, 3.3), 10


def erase_box(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The image with a random box full of random pixels, in its own mode.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020.
    """
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    for _ in range(ERASING_TRIES):
        area = generator.uniform(*ERASED_AREA) * height * width
        aspect = np.exp(generator.uniform(*np.log(ERASED_ASPECT)))
        rows, columns = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < rows < height and 0 < columns < width:
            top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
            box = pixels[top : top + rows, left : left + columns]
            box[...] = generator.integers(0, 256, box.shape, dtype=np.uint8)
            break
    return Image.fromarray(pixels, image.mode)
