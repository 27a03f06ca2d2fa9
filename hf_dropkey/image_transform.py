"""What happens to an image between its file and the model: augmentation, image processor, batch.

All of it runs in the data loader, each time an image is asked for. Every draw is a function of (seed, epoch, row), so
a resumed run sees the images that the uninterrupted one would have seen, whatever the number of loader processes.
May import `image_checks`, NumPy, Pillow, torch and Transformers; no model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from transformers import BaseImageProcessor, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .image_checks import read_images


# the aspect ratios that "random resized crop" has used since Szegedy et al., 2015
CROP_ASPECTS = (3 / 4, 4 / 3)
CROP_TRIES = 10
IMAGE_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Augmentation:
    """How much a training image may change; the defaults change only its size.

    Attributes:
        image_size: Height and width of what comes out, in pixels.
        crop_scale: Smallest share of the image's area that a random resized crop keeps, (0, 1]; 1 never crops.
        flip_probability: Probability of a left-right mirror image, [0, 1].
        rotation_degrees: Largest rotation to either side, [0, 180].
        shift_fraction: Largest shift in each direction as a share of the side, [0, 1).
        color_jitter: Brightness, contrast and saturation are each scaled by 1 - color_jitter to 1 + color_jitter, [0, 1].
    """

    image_size: tuple[int, int]
    crop_scale: float = 1.0
    flip_probability: float = 0.0
    rotation_degrees: float = 0.0
    shift_fraction: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        allowed = {
            "crop_scale": (0 < self.crop_scale <= 1, "(0, 1]"),
            "flip_probability": (0 <= self.flip_probability <= 1, "[0, 1]"),
            "rotation_degrees": (0 <= self.rotation_degrees <= 180, "[0, 180]"),
            "shift_fraction": (0 <= self.shift_fraction < 1, "[0, 1)"),
            "color_jitter": (0 <= self.color_jitter <= 1, "[0, 1]"),
        }
        for name, (inside, span) in allowed.items():
            if not inside:
                raise ValueError(f"{name}={getattr(self, name)} is outside {span}; choose a value inside it")

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
        return image

    def _move(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        angle = math.radians(generator.uniform(-self.rotation_degrees, self.rotation_degrees))
        shift = generator.uniform(-self.shift_fraction, self.shift_fraction, size=2) * image.size
        cosine, sine = math.cos(angle), math.sin(angle)
        center = np.array(image.size) / 2
        # Pillow wants the way back, from a pixel of the result to its place in the source
        turn = np.array([[cosine, -sine], [sine, cosine]])
        start = center - turn @ (center + shift)
        # one resampling for both, because each one blurs
        matrix = (cosine, -sine, float(start[0]), sine, cosine, float(start[1]))
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    def _jitter(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + generator.uniform(-self.color_jitter, self.color_jitter))
        return image


def random_crop_box(
    image_size: tuple[int, int], *, smallest_scale: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box (left, upper, right, lower) with a random share of the area and a random aspect ratio.

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


class ImageTransform:
    """Rows with `image`, `label` and `row` to `pixel_values` and `labels`; for `Dataset.set_transform`.

    Attributes:
        epoch: Number of the current epoch, in shared memory because the processes of a data loader read it too.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        label_ids: Mapping[Any, int],
        num_channels: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        """Without `augmentation` the processor does everything, as it does for whoever loads the saved model.

        Raises:
            ValueError: The model has neither one nor three channels.
        """
        if num_channels not in IMAGE_MODES:
            raise ValueError(
                f"num_channels={num_channels}; images have {sorted(IMAGE_MODES)} channels, choose one of them"
            )
        self.processor = processor
        self.label_ids = dict(label_ids)
        self.mode = IMAGE_MODES[num_channels]
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """One batch of rows, with images or undecoded ones.

        Raises:
            ValueError: An image cannot be used; names it.
        """
        images = [image.convert(self.mode) for image in read_images(batch)["image"]]
        steps: dict[str, Any] = {}
        if self.augmentation is not None:
            # it makes images of the final size, of which a centre crop would cut off the border
            steps = {"do_resize": False, "do_center_crop": False}
            generators = [np.random.default_rng((self.seed, int(self.epoch), row)) for row in batch["row"]]
            images = list(map(self.augmentation, images, generators))
        pixel_values = self.processor(images, **steps, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": [self.label_ids[label] for label in batch["label"]]}


class AugmentationEpoch(TrainerCallback):
    """Tells a training transform which epoch it is, so that every epoch sees new variants of the images."""

    def __init__(self, transform: ImageTransform) -> None:
        """`transform` is the one that the training rows use."""
        self.transform = transform

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs before the data loader of the epoch starts, also in the middle of an epoch after a resume."""
        self.transform.epoch.fill_(int(state.epoch or 0))


def collate_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `ImageTransform` to a batch: `pixel_values` `[B, C, H, W]` and `labels` `[B]`."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
