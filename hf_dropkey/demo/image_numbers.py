"""What an image processor does, as numbers that a page in the browser follows: resize, crop, rescale, normalise.

Processors can do more than their settings say. So the numbers are followed here too, on pictures of several shapes, and
compared with what the processor makes of them, before a page is written with them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..classification.transform import IMAGE_MODES


RESAMPLINGS = {resampling: resampling.name.lower() for resampling in Image.Resampling}
# grey levels between Pillow and torchvision, whose processors round elsewhere; another filter or crop is far beyond
TOLERANCE_LEVELS = 2


@dataclass(frozen=True)
class Resize:
    """The first step: to `size`, "height" and "width" or "shortest_edge" in pixels, by one of Pillow's filters."""

    size: dict[str, int]
    resampling: str


@dataclass(frozen=True)
class ImageNumbers:
    """The steps of an image processor, in their order; None for a step that it leaves out.

    Attributes:
        channels: 1 or 3.
        height: Of the images that the model takes, in pixels.
        width: The same.
        resize: To another size.
        crop: "height" and "width" of the middle part.
        rescale_factor: Of the grey levels, 1 without.
        normalize: "mean" and "std" of each channel.
    """

    channels: int
    height: int
    width: int
    resize: Resize | None
    crop: dict[str, int] | None
    rescale_factor: float
    normalize: dict[str, list[float]] | None

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def follow(self, image: Image.Image) -> NDArray[np.float32]:
        """What the model takes of an image, `[channels, height, width]`, by Pillow and numpy."""
        image = image.convert(IMAGE_MODES[self.channels])
        if self.resize is not None:
            found = next(number for number, name in RESAMPLINGS.items() if name == self.resize.resampling)
            image = image.resize(_target_size(image, self.resize.size), found)
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels)
        if self.crop is not None:
            pixels = _middle(pixels, self.crop["height"], self.crop["width"])
        values = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.normalize is not None:
            mean, std = (np.array(self.normalize[name], dtype=np.float32) for name in ("mean", "std"))
            values = (values - mean) / std
        return values.transpose(2, 0, 1)


def _target_size(image: Image.Image, size: Mapping[str, int]) -> tuple[int, int]:
    """Width and height to resize to."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short, long = sorted(image.size)
    other = int(size["shortest_edge"] * long / short)
    return (size["shortest_edge"], other) if image.width <= image.height else (other, size["shortest_edge"])


def _middle(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle part, with zeros around what is smaller."""
    for axis, wanted in enumerate((height, width)):
        length = pixels.shape[axis]
        before = -(-(max(wanted, length) - length) // 2)
        around = [(0, 0)] * 3
        around[axis] = (before, max(wanted, length) - length - before)
        start = max(0, (length - wanted) // 2 + before)
        pixels = np.pad(pixels, around).take(range(start, start + wanted), axis)
    return pixels


def image_numbers(processor: Any, channels: int) -> ImageNumbers:
    """The numbers of an image processor.

    Args:
        processor: Of Transformers.
        channels: Of the model's images.

    Raises:
        ValueError: It makes images of several sizes, or does something else than the steps of `ImageNumbers`.
    """
    found = processor.to_dict()
    resize = crop = normalize = None
    if found.get("do_resize"):
        size = {name: int(side) for name, side in dict(found["size"]).items() if side is not None}
        if set(size) not in ({"height", "width"}, {"shortest_edge"}):
            raise _another(processor, f"resizes to {size}")
        resampling = found.get("resample")
        resize = Resize(size, RESAMPLINGS[Image.Resampling.BILINEAR if resampling is None else int(resampling)])  # type: ignore[index]  # the numbers are members
    if found.get("do_center_crop"):
        crop = {name: int(found["crop_size"][name]) for name in ("height", "width")}
    final = crop or (resize.size if resize is not None else {})
    if "height" not in final:
        raise _another(processor, "makes images of several sizes")
    if found.get("do_normalize"):
        normalize = {name: _each(found[f"image_{name}"], channels) for name in ("mean", "std")}
    factor = float(found["rescale_factor"]) if found.get("do_rescale") else 1.0
    numbers = ImageNumbers(channels, final["height"], final["width"], resize, crop, factor, normalize)
    _compare(numbers, processor)
    return numbers


def _each(value: Any, channels: int) -> list[float]:
    values = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)] * channels
    return values * channels if len(values) == 1 else values


def _compare(numbers: ImageNumbers, processor: Any) -> None:
    """Raises ValueError where the processor makes something else of pictures than the numbers do."""
    draws = np.random.default_rng(0)
    smallest = min(numbers.normalize["std"]) if numbers.normalize is not None else 1.0
    allowed = TOLERANCE_LEVELS * numbers.rescale_factor / smallest
    for width, height in ((2 * numbers.width + 1, numbers.height), (numbers.width, 3 * numbers.height), (37, 23)):
        pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(IMAGE_MODES[numbers.channels])
        expected = np.asarray(processor([image], return_tensors="np")["pixel_values"])[0]
        followed = numbers.follow(image)
        if expected.shape != followed.shape:
            raise _another(processor, f"makes {expected.shape} of a picture where these steps make {followed.shape}")
        difference = float(np.abs(expected - followed).max())
        if not difference <= allowed:
            raise _another(processor, f"makes values that differ by {difference:.2g}")


def _another(processor: Any, what: str) -> ValueError:
    return ValueError(
        f"the image processor {type(processor).__name__} {what}; the page in the browser resizes to one size, crops the "
        "middle, rescales and normalises. Serve the page with hf-dropkey demo, which uses the processor itself"
    )
