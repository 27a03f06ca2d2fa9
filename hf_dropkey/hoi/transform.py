"""What happens to an image with interactions between its file and a model: augmentation, image processor, batch.

All of it runs in the data loader. Every draw is a function of (seed, epoch, image id), so a resumed run sees the images
that the uninterrupted one would have seen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BaseImageProcessor

from ..images.boxes import BoxAugmentation, centered, padded
from .data import Annotation, HoiSplit
from .metrics import NO_OBJECT


class HoiDataset(torch.utils.data.Dataset):
    """Images as the model takes them, each with its pairs.

    Attributes:
        epoch: Number of the current epoch, in shared memory because the processes of a data loader read it too.
    """

    def __init__(
        self,
        split: HoiSplit,
        processor: BaseImageProcessor,
        *,
        missing_label: int | None = None,
        augmentation: BoxAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        """`missing_label` is the class of a missing object; `augmentation` should keep boxes that a crop cuts."""
        self.split = split
        self.processor: Any = processor
        self.missing_label = missing_label
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One image.

        Returns:
            `pixel_values` `[3, H, W]`, and `labels` as the model takes them, with `row`, and `frame` (height and width
            in pixels of the original image).
        """
        record, image, annotation = self.split.images[row], self.split.open(row), self.split.annotations[row]
        if self.augmentation is not None:
            generator = np.random.default_rng((self.seed, int(self.epoch), record["id"]))
            image, corners, stay = self.augmentation(image, annotation.boxes, generator)
            annotation = kept_pairs(annotation, corners, stay)
        # padding is the batch's business
        pixels = self.processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"][0]
        targets = pair_targets(annotation, image.size, len(self.split.verbs), self.missing_label)
        labels: dict[str, torch.Tensor] = {
            **{name: torch.from_numpy(value) for name, value in targets.items()},
            "row": torch.tensor(row),
            "frame": torch.tensor([record["height"], record["width"]], dtype=torch.float32),
        }
        return {"pixel_values": pixels, "labels": labels}


def kept_pairs(annotation: Annotation, corners: NDArray[np.float64], stay: NDArray[np.bool_]) -> Annotation:
    """The annotation of which some boxes stay, at new places: pairs that lose a box vanish, a missing object stays one.

    Args:
        annotation: Of n boxes.
        corners: The boxes that stay.
        stay: Which of the n these are.
    """
    places = np.where(stay, np.cumsum(stay) - 1, NO_OBJECT)
    person, thing, verb = annotation.pairs.T
    bare = thing == NO_OBJECT
    kept = stay[person] & (bare | stay[thing])
    moved = np.stack([places[person], np.where(bare, NO_OBJECT, places[thing]), verb], axis=1)
    return Annotation(corners, annotation.labels[stay], moved[kept])


def pair_targets(
    annotation: Annotation, size: tuple[int, int], verbs: int, missing_label: int | None
) -> dict[str, NDArray[Any]]:
    """An annotation as the model's labels: one target for each (person, object), with all its verbs.

    Args:
        annotation: In pixels.
        size: Width and height of the image.
        verbs: Number of verbs.
        missing_label: The class of a missing object.

    Raises:
        ValueError: An object is missing, and there is no class for it.
    """
    pairs = np.unique(annotation.pairs[:, :2], axis=0).reshape(-1, 2)
    bare = pairs[:, 1] == NO_OBJECT
    if bare.any() and missing_label is None:
        raise ValueError("an interaction has no object, and the model has no class for a missing object")
    shares = centered(annotation.boxes, size).astype(np.float32)
    # the last row is the missing object's, whose box is all zeros
    shares = np.concatenate([shares, np.zeros((1, 4), dtype=np.float32)])
    labels = np.concatenate([annotation.labels, [0 if missing_label is None else missing_label]])
    wanted = np.zeros((len(pairs), verbs), dtype=np.float32)
    places = {(int(person), int(thing)): number for number, (person, thing) in enumerate(pairs)}
    for person, thing, verb in annotation.pairs:
        wanted[places[int(person), int(thing)], verb] = 1
    return {
        "class_labels": labels[pairs[:, 1]].astype(np.int64),
        "verb_labels": wanted,
        "person_boxes": shares[pairs[:, 0]],
        "object_boxes": shares[pairs[:, 1]],
    }


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of `HoiDataset` as a batch: `pixel_values` padded with zeros, `pixel_mask` (1 = image), list of `labels`.

    Boxes stay fractions of the image without its padding, as in the original DETR.
    """
    pixel_values, mask = padded([row["pixel_values"] for row in rows])
    return {"pixel_values": pixel_values, "pixel_mask": mask, "labels": [dict(row["labels"]) for row in rows]}
