"""Random changes of training images, in the data loader, each time an image is read.

Every draw is a function of (seed, epoch, row), so a resumed run sees the same images as an uninterrupted one, with any
number of loader processes.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .policies import Policy, apply_policy, erase_box


# the aspect ratios that "random resized crop" has used since Szegedy et al., 2015
CROP_ASPECTS = (3 / 4, 4 / 3)
CROP_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """The ranges of the random changes; the defaults change only the size of the image.

    Attributes:
        image_size: Height and width of the result, in pixels.
        crop_scale: Smallest fraction of the image's area that a random resized crop keeps, (0, 1]; 1 never crops.
        flip_probability: Probability of a left-right mirror image, [0, 1].
        rotation_degrees: Largest rotation to either side, [0, 180].
        shift_fraction: Largest shift in each direction as a fraction of the side, [0, 1).
        color_jitter: Brightness, contrast and saturation are each scaled by 1 ± color_jitter at most, [0, 1].
        augment: "randaugment" or "trivialaugment", after the others; None for neither.
        random_erasing: Probability that a box of the image is filled with random pixels, last of all, [0, 1].
    """

    image_size: tuple[int, int]
    crop_scale: float = 1.0
    flip_probability: float = 0.0
    rotation_degrees: float = 0.0
    shift_fraction: float = 0.0
    color_jitter: float = 0.0
    augment: Policy | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        allowed = {
            "crop_scale": (0 < self.crop_scale <= 1, "(0, 1]"),
            "flip_probability": (0 <= self.flip_probability <= 1, "[0, 1]"),
            "rotation_degrees": (0 <= self.rotation_degrees <= 180, "[0, 180]"),
            "shift_fraction": (0 <= self.shift_fraction < 1, "[0, 1)"),
            "color_jitter": (0 <= self.color_jitter <= 1, "[0, 1]"),
            "random_erasing": (0 <= self.random_erasing <= 1, "[0, 1]"),
        }
        for name, (inside, span) in allowed.items():
            if not inside:
                raise ValueError(f"--{name} {getattr(self, name)} is outside {span}; choose a value inside it")

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """A random variant of `image`, in its own mode."""
        height, width = self.image_size
        box = random_crop_box(image.size, smallest_scale=self.crop_scale, generator=generator)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if generator.random() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rotation_degrees or self.shift_fraction:
            image = self._move(image, generator)
        if self.color_jitter:
            image = self._jitter(image, generator)
        if self.augment:
            image = apply_policy(image, self.augment, generator)
        if self.random_erasing and generator.random() < self.random_erasing:
            image = erase_box(image, generator)
        return image

    def _move(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        angle = math.radians(generator.uniform(-self.rotation_degrees, self.rotation_degrees))
        shift = generator.uniform(-self.shift_fraction, self.shift_fraction, size=2) * image.size
        cosine, sine = math.cos(angle), math.sin(angle)
        center = np.array(image.size) / 2
        # Pillow takes the inverse map, from a pixel of the result to its place in the source
        turn = np.array([[cosine, -sine], [sine, cosine]])
        start = center - turn @ (center + shift)
        # one resampling for both, because each blurs the image
        matrix = (cosine, -sine, float(start[0]), sine, cosine, float(start[1]))
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    def _jitter(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + generator.uniform(-self.color_jitter, self.color_jitter))
        return image


def random_crop_box(
    image_size: tuple[int, int], *, smallest_scale: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box (left, upper, right, lower) with a random fraction of the area and a random aspect ratio.

    The whole image when `smallest_scale` is 1, or when no drawn box fits, which only very long images make likely.
    """
    width, height = image_size
    if smallest_scale < 1:
        for _ in range(CROP_TRIES):
            area = generator.uniform(smallest_scale, 1) * width * height
            aspect = math.exp(generator.uniform(math.log(CROP_ASPECTS[0]), math.log(CROP_ASPECTS[1])))
            crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if crop_width <= width and crop_height <= height:
                left = generator.uniform(0, width - crop_width)
                upper = generator.uniform(0, height - crop_height)
                return left, upper, left + crop_width, upper + crop_height
    return 0.0, 0.0, float(width), float(height)


class KnowsEpoch(Protocol):
    """A transform whose draws depend on the epoch, a 0-d integer tensor in shared memory."""

    epoch: torch.Tensor


class AugmentationEpoch(TrainerCallback):
    """Sets the epoch of a training transform, so that every epoch has new variants of the images."""

    def __init__(self, transform: KnowsEpoch) -> None:
        """Takes the transform of the training rows."""
        self.transform = transform

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs before the data loader of the epoch starts, also in the middle of an epoch after a resume."""
        self.transform.epoch.fill_(int(state.epoch or 0))
