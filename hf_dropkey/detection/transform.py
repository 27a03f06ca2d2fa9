"""What happens to an image with boxes between its file and a detection model: augmentation, image processor, batch.

All of it runs in the data loader, each time an image is asked for. Every draw is a function of (seed, epoch, image id),
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
from .data import DetectionSplit


# smaller ones are what a crop leaves of an object at its edge
SMALLEST_SIDE_PIXELS = 1.0


@dataclass(frozen=True)
class BoxAugmentation:
    """How much a training image and its boxes may change; the defaults change nothing.

    Attributes:
        flip_probability: Probability of a left-right mirror image, [0, 1].
        crop_scale: Smallest share of the area that a random crop keeps, (0, 1]; 1 never crops. A box stays if its
            centre does, cut at the border of the crop.
        color_jitter: Brightness, contrast and saturation are each scaled by 1 - color_jitter to 1 + color_jitter, [0, 1].
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
                raise ValueError(f"{name}={getattr(self, name)} is outside {span}; choose a value inside it")

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
            corners, stay = crop_boxes(corners, (left, upper, right, lower))
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
    corners: NDArray[np.float64], crop: tuple[int, int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The boxes that stay in a crop (left, upper, right, lower), in its pixels, and which of all these are."""
    left, upper, right, lower = crop
    centers = (corners[:, :2] + corners[:, 2:]) / 2
    inside = (centers >= (left, upper)) & (centers < (right, lower))
    cut = np.clip(corners, (left, upper, left, upper), (right, lower, right, lower)) - (left, upper, left, upper)
    wide = cut[:, 2:] - cut[:, :2] >= SMALLEST_SIDE_PIXELS
    stay = np.asarray(np.concatenate([inside, wide], axis=1).all(axis=1), dtype=np.bool_)
    return cut[stay], stay


class DetectionDataset(torch.utils.data.Dataset):
    """Images as a detection model takes them, each with its boxes; crowd regions are left out.

    Attributes:
        epoch: Number of the current epoch, in shared memory because the processes of a data loader read it too.
    """

    def __init__(
        self,
        split: DetectionSplit,
        processor: BaseImageProcessor,
        class_numbers: Mapping[int, int],
        *,
        augmentation: BoxAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        """`class_numbers` has the model's class of each category id."""
        self.split = split
        self.processor: Any = processor
        self.class_numbers = dict(class_numbers)
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One image.

        Returns:
            `pixel_values` `[3, H, W]`, and `labels` with `boxes` `[n, 4]` (centre x, centre y, width, height as shares of
            the image), `class_labels` `[n]`, `row`, and `frame` (height and width, in pixels of the original image, of
            what the boxes are shares of).
        """
        record, image = self.split.images[row], self.split.open(row)
        objects = [found for found in self.split.boxes[record["id"]] if not found["iscrowd"]]
        boxes = np.array([found["bbox"] for found in objects], dtype=np.float64).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        classes = np.array([self.class_numbers[found["category_id"]] for found in objects], dtype=np.int64)
        if self.augmentation is not None:
            generator = np.random.default_rng((self.seed, int(self.epoch), record["id"]))
            image, corners, stay = self.augmentation(image, corners, generator)
            classes = classes[stay]
        shares = corners / np.array([image.width, image.height] * 2)
        centers = np.concatenate([(shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]], axis=1)
        # padding is the batch's business
        pixels = self.processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"][0]
        labels = {
            "boxes": torch.tensor(centers, dtype=torch.float32),
            "class_labels": torch.tensor(classes),
            "row": torch.tensor(row),
            "frame": torch.tensor([record["height"], record["width"]], dtype=torch.float32),
        }
        return {"pixel_values": pixels, "labels": labels}


class DetectionCollator:
    """Rows of `DetectionDataset` to a batch, padded to its largest height and width with zeros.

    A model that takes a mask reads positions off the image without its padding, so boxes stay shares of the image, as
    in the original DETR. (Transformers' processors make them shares of the padded image, which `post_process_object_detection`
    does not undo.) A model without a mask sees the padded image only, so boxes become shares of that, and `frame` grows
    with it.
    """

    def __init__(self, *, with_mask: bool) -> None:
        """`with_mask` makes the batch's `pixel_mask`."""
        self.with_mask = with_mask

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`pixel_values` `[B, 3, H, W]`, `labels` (a list of B dictionaries) and perhaps `pixel_mask` `[B, H, W]`, 1 = image."""
        sizes = [row["pixel_values"].shape[1:] for row in rows]
        height, width = (max(size[side] for size in sizes) for side in (0, 1))
        pixel_values = torch.zeros(len(rows), 3, height, width)
        mask = torch.zeros(len(rows), height, width, dtype=torch.int64)
        labels = []
        for number, (row, (own_height, own_width)) in enumerate(zip(rows, sizes, strict=True)):
            pixel_values[number, :, :own_height, :own_width] = row["pixel_values"]
            mask[number, :own_height, :own_width] = 1
            label = dict(row["labels"])
            if not self.with_mask:
                share = torch.tensor([own_height / height, own_width / width])
                label["boxes"] = label["boxes"] * share.flip(0).repeat(2)
                label["frame"] = label["frame"] / share
            labels.append(label)
        batch = {"pixel_values": pixel_values, "labels": labels}
        return {**batch, "pixel_mask": mask} if self.with_mask else batch
