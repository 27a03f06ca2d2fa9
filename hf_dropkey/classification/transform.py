"""From rows with images to batches of tensors for a classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig

from ..images.augmentation import Augmentation
from ..images.checks import read_images
from ..images.corruptions import corrupt
from .data import ImageData
from .pretrained import channels


IMAGE_MODES = {1: "L", 3: "RGB"}


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
        with_rows: bool = False,
    ) -> None:
        """Without `augmentation` the processor does everything, as it does for users of the saved model.

        Args:
            processor: The image processor.
            label_ids: Id of each value of `label`.
            num_channels: Of the images that the model takes.
            augmentation: How the images vary.
            seed: Of the variations.
            with_rows: Give `row` too, which `MixingCollator` draws from.

        Raises:
            ValueError: The model has neither one nor three channels.
        """
        if num_channels not in IMAGE_MODES:
            raise ValueError(
                f"--num_channels {num_channels} is not among {sorted(IMAGE_MODES)}, the channels of images; choose one of them"
            )
        self.processor = processor
        self.label_ids = dict(label_ids)
        self.mode = IMAGE_MODES[num_channels]
        self.augmentation = augmentation
        self.seed = seed
        self.with_rows = with_rows
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
        rows = {"row": batch["row"]} if self.with_rows else {}
        return {"pixel_values": pixel_values, "labels": [self.label_ids[label] for label in batch["label"]], **rows}


class CorruptedTransform(ImageTransform):
    """As `ImageTransform` for evaluation, on images that are made worse at the size that the model gets."""

    def __init__(self, kind: str, strength: int, processor: BaseImageProcessor, **settings: Any) -> None:
        """`kind` and `strength` are those of `hf_dropkey.images.corruptions.corrupt`."""
        super().__init__(processor, **settings)
        self.kind, self.strength = kind, strength

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """One batch of rows, with images or undecoded ones."""
        images = [image.convert(self.mode) for image in read_images(batch)["image"]]
        resized = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        worse = [
            corrupt(_as_image(pixels), self.kind, self.strength, row=row)
            for pixels, row in zip(resized, batch["row"], strict=True)
        ]
        found = self.processor(worse, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        return {"pixel_values": found, "labels": [self.label_ids[label] for label in batch["label"]]}


def _as_image(pixels: NDArray[Any]) -> Image.Image:
    """An image of `[C, H, W]` in 0 to 255."""
    whole = np.rint(pixels.clip(0, 255)).astype(np.uint8)
    return Image.fromarray(whole[0] if len(whole) == 1 else whole.transpose(1, 2, 0))


def collate_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `ImageTransform` to a batch: `pixel_values` `[B, C, H, W]` and `labels` `[B]`."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def transform_rows(
    data: ImageData,
    processor: BaseImageProcessor,
    config: PreTrainedConfig,
    augmentation: Augmentation,
    *,
    seed: int,
    with_rows: bool = False,
) -> ImageTransform:
    """Makes the data sets give tensors from now on; returns the transform of the training rows, with their numbers if asked."""
    takes: dict[str, Any] = {"label_ids": data.label_ids, "num_channels": channels(config)}
    data.evaluation.set_transform(ImageTransform(processor, **takes))
    training = ImageTransform(processor, **takes, augmentation=augmentation, seed=seed, with_rows=with_rows)
    if data.train is not None:
        data.train.set_transform(training)
    return training
