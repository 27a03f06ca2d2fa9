"""What happens to an image with boxes between its file and a detection model: augmentation, image processor, batch.

All of it runs in the data loader, each time an image is requested. Every draw is a function of (seed, epoch, image id),
so a resumed run sees the images that the uninterrupted one would have seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor

from ..images.boxes import BoxAugmentation, centered, padded
from .data import DetectionSplit


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
        centers = centered(corners, image.size)
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
        pixel_values, mask = padded([row["pixel_values"] for row in rows])
        labels = []
        for row in rows:
            label = dict(row["labels"])
            if not self.with_mask:
                share = torch.tensor(row["pixel_values"].shape[1:]) / torch.tensor(pixel_values.shape[2:])
                label["boxes"] = label["boxes"] * share.flip(0).repeat(2)
                label["frame"] = label["frame"] / share
            labels.append(label)
        batch = {"pixel_values": pixel_values, "labels": labels}
        return {**batch, "pixel_mask": mask} if self.with_mask else batch
