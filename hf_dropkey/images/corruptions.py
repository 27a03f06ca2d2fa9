"""Images made worse in four ways at five strengths, the same for every model: noise, blur, contrast, JPEG.

The strengths are those of ImageNet-C (Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations, ICLR 2019) for images of 224 pixels, which they are applied to at the size that the model gets; the blur is
scaled to other sizes. Noise depends on a seed and the row of the image alone.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter


STRENGTHS = (1, 2, 3, 4, 5)
# standard deviation, as a fraction of the range of pixels
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
# standard deviation in pixels of a Gaussian, at this side
BLUR, BLUR_SIDE = (1.0, 2.0, 3.0, 4.0, 6.0), 224
# factor on the distance of each pixel from the mean of its channel
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
# quality
JPEG = (25, 18, 15, 10, 7)


def noise(image: Image.Image, strength: int, generator: np.random.Generator) -> Image.Image:
    """Adds Gaussian noise to each pixel and channel."""
    pixels = np.asarray(image, dtype=np.float64)
    return _image(pixels + generator.normal(scale=255 * NOISE[strength - 1], size=pixels.shape))


def blur(image: Image.Image, strength: int, generator: np.random.Generator) -> Image.Image:
    """Blurs with a Gaussian."""
    return image.filter(ImageFilter.GaussianBlur(BLUR[strength - 1] * min(image.size) / BLUR_SIDE))


def contrast(image: Image.Image, strength: int, generator: np.random.Generator) -> Image.Image:
    """Moves each pixel towards the mean of its channel."""
    pixels = np.asarray(image, dtype=np.float64)
    mean = pixels.mean(axis=(0, 1))
    return _image((pixels - mean) * CONTRAST[strength - 1] + mean)


def jpeg(image: Image.Image, strength: int, generator: np.random.Generator) -> Image.Image:
    """Saves as JPEG and reads it again."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=JPEG[strength - 1])
    file.seek(0)
    with Image.open(file) as read:
        return read.convert(image.mode)


def _image(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "jpeg": jpeg,
}


def corrupt(image: Image.Image, kind: str, strength: int, *, row: int, seed: int = 0) -> Image.Image:
    """A worse copy of an image, grey or RGB, of the same size and mode.

    Args:
        image: At the size that the model gets.
        kind: One of `CORRUPTIONS`.
        strength: 1 to 5.
        row: The number of the image, on which its noise depends.
        seed: Of the noise.

    Raises:
        ValueError: The kind or strength is not known, or the image is of another mode.
    """
    if kind not in CORRUPTIONS or strength not in STRENGTHS:
        raise ValueError(
            f"{kind} at strength {strength} is not known; choose from {', '.join(CORRUPTIONS)} at strengths 1 to 5"
        )
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"the image is of mode {image.mode}; convert it to L or RGB first")
    number = list(CORRUPTIONS).index(kind)
    return CORRUPTIONS[kind](image, strength, np.random.default_rng((seed, number, strength, row)))
