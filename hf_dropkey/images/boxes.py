"""Boxes on images: augmentation of both, boxes as fractions of the image, batches of images of several sizes.

Every draw is a function of a generator that the caller seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from .augmentation import random_crop_box


# smaller ones are what a crop leaves of an object at its edge
SMALLEST_SIDE_PIXELS = 1.0


@dataclass(frozen=True)
class BoxAugmentation:
    """How much a training image and its boxes may change; the defaults change nothing.

    Attributes:
        flip_probability: Probability of a left-right mirror image, [0, 1].
        crop_scale: Smallest fraction of the area that a random crop keeps, (0, 1]; 1 never crops. A box stays if its
            centre does, cut at the border of the crop.
        keep_cut: Keep a box that a crop cuts as long as some of it is left, wherever its centre is.
        color_jitter: Brightness, contrast and saturation are each scaled by 1 ± color_jitter at most, [0, 1].
    """

    flip_probability: float = 0.5
    crop_scale: float = 1.0
    color_jitter: float = 0.0
    keep_cut: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        allowed = {
            "flip_probability": (0 <= self.flip_probability <= 1, "[0, 1]"),
            "crop_scale": (0 < self.crop_scale <= 1, "(0, 1]"),
            "color_jitter": (0 <= self.color_jitter <= 1, "[0, 1]"),
        }
        for name, (inside, span) in allowed.items():
            if not inside:
                raise ValueError(f"--{name} {getattr(self, name)} is outside {span}; choose a value inside it")

    def __call__(
        self, image: Image.Image, corners: NDArray[np.float64], generator: np.random.Generator
    ) -> tuple[Image.Image, NDArray[np.float64], NDArray[np.bool_]]:
        """A random variant of an image and its boxes.

        Args:
            image: Of any size.
            corners: Boxes `[n, 4]` as x1, y1, x2, y2 in pixels.
            generator: Where the draws come from.

        Returns:
            The image; the boxes that stayed, in its pixels; which of the n these are.
        """
        stay = np.ones(len(corners), dtype=bool)
        if self.crop_scale < 1:
            box = random_crop_box(image.size, smallest_scale=self.crop_scale, generator=generator)
            left, upper, right, lower = (round(edge) for edge in box)
            image = image.crop((left, upper, right, lower))
            corners, stay = crop_boxes(corners, (left, upper, right, lower), keep_cut=self.keep_cut)
        if generator.random() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            corners = np.stack(
                [image.width - corners[:, 2], corners[:, 1], image.width - corners[:, 0], corners[:, 3]], axis=1
            )
        if self.color_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(1 + generator.uniform(-self.color_jitter, self.color_jitter))
        return image, corners, stay


def crop_boxes(
    corners: NDArray[np.float64], crop: tuple[int, int, int, int], *, keep_cut: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The boxes that stay in a crop (left, upper, right, lower), in its pixels, and which of all these are.

    A box stays if its centre does, with `keep_cut` if any of it does.
    """
    left, upper, right, lower = crop
    centers = (corners[:, :2] + corners[:, 2:]) / 2
    inside = (centers >= (left, upper)) & (centers < (right, lower))
    cut = np.clip(corners, (left, upper, left, upper), (right, lower, right, lower)) - (left, upper, left, upper)
    wide = cut[:, 2:] - cut[:, :2] >= SMALLEST_SIDE_PIXELS
    parts = [wide] if keep_cut else [inside, wide]
    stay = np.asarray(np.concatenate(parts, axis=1).all(axis=1), dtype=np.bool_)
    return cut[stay], stay


def centered(corners: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes `[n, 4]` as fractions of an image (centre x, y, width, height), from pixels (x1, y1, x2, y2).

    `size` is the width and height of the image in pixels.
    """
    fractions = corners / np.array([*size, *size])
    first, last = fractions[:, :2], fractions[:, 2:]
    return np.concatenate([(first + last) / 2, last - first], axis=1)


def padded(images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[3, H, W]` of several sizes as a batch `[B, 3, H, W]`, padded with zeros, and its mask `[B, H, W]`.

    The mask is 1 on the image and 0 on the padding.
    """
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for number, image in enumerate(images):
        batch[number, :, : image.shape[1], : image.shape[2]] = image
        mask[number, : image.shape[1], : image.shape[2]] = 1
    return batch, mask
