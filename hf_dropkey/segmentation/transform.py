"""What happens to an image and its mask between their files and a model: augmentation, one size, image processor, batch.

All of it runs in the data loader, each time an image is requested. Every draw is a function of (seed, epoch, image id),
so a resumed run sees the images that the uninterrupted one would have seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from transformers import BaseImageProcessor

from ..images.augmentation import random_crop_box
from .data import SegmentationSplit


@dataclass(frozen=True)
class MaskAugmentation:
    """How much a training image and its mask may change, together.

    Attributes:
        flip_probability: Probability of a left-right mirror image, [0, 1].
        crop_scale: Smallest fraction of the area that a random crop keeps, (0, 1]; 1 never crops.
        color_jitter: Brightness, contrast and saturation are each scaled by 1 ± color_jitter at most, [0, 1].
    """

    flip_probability: float = 0.5
    crop_scale: float = 1.0
    color_jitter: float = 0.0

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
        self, image: Image.Image, mask: Image.Image, side: int, generator: np.random.Generator
    ) -> tuple[Image.Image, Image.Image]:
        """A random variant of an image and its mask, `side` x `side` pixels."""
        box = random_crop_box(image.size, smallest_scale=self.crop_scale, generator=generator)
        image, mask = squared(image, mask, side, box)
        if generator.random() < self.flip_probability:
            image, mask = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (image, mask))
        if self.color_jitter:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = enhance(image).enhance(1 + generator.uniform(-self.color_jitter, self.color_jitter))
        return image, mask


def squared(
    image: Image.Image, mask: Image.Image, side: int, box: tuple[float, float, float, float] | None = None
) -> tuple[Image.Image, Image.Image]:
    """A part of an image, by default all of it, stretched to a square; its mask keeps whole class numbers."""
    return (
        image.resize((side, side), Image.Resampling.BILINEAR, box=box),
        mask.resize((side, side), Image.Resampling.NEAREST, box=box),
    )


class SegmentationDataset(torch.utils.data.Dataset):
    """Images as a segmentation model takes them, each with its mask.

    Attributes:
        epoch: Number of the current epoch, in shared memory because the processes of a data loader read it too.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        processor: BaseImageProcessor,
        side: int,
        numbers: Sequence[int],
        *,
        augmentation: MaskAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        """`numbers` has the model's class of each number in the masks; `side` is that of the images in pixels."""
        self.split = split
        self.processor: Any = processor
        self.side = side
        self.numbers = np.array(numbers, dtype=np.int64)
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def classes(self, row: int) -> NDArray[np.int64]:
        """The model's class of each pixel of an image in its own size, or `ignore_index`, `[height, width]`."""
        mask = self.split.mask(row)
        ignored = mask == self.split.ignore_index
        return np.where(ignored, mask, self.numbers[np.where(ignored, 0, mask)])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One image.

        Returns:
            `pixel_values` `[3, side, side]`, `labels` `[side, side]`, and `rows`, the row.
        """
        image = self.split.open(row)
        mask = Image.fromarray(self.classes(row).astype(np.int32))
        if self.augmentation is None:
            image, mask = squared(image, mask, self.side)
        else:
            generator = np.random.default_rng((self.seed, int(self.epoch), self.split.images[row]["id"]))
            image, mask = self.augmentation(image, mask, self.side, generator)
        labels = torch.from_numpy(np.asarray(mask, dtype=np.int64).copy())
        return {"pixel_values": pixels_of(image, self.processor), "labels": labels, "rows": torch.tensor(row)}


def pixels_of(image: Image.Image, processor: Any) -> torch.Tensor:
    """An image of the model's size as the model takes it, `[3, side, side]`."""
    pixels: torch.Tensor = processor(images=image, do_resize=False, do_center_crop=False, return_tensors="pt")[
        "pixel_values"
    ][0]
    return pixels


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of `SegmentationDataset` to a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
