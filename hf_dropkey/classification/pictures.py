"""Images that a model is looked at with: as its inputs, and as it sees them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .transform import IMAGE_MODES


class Pictures:
    """Images by number, with their names, their classes where known, and as inputs of the model."""

    split: str | None = None

    def __init__(self, rows: Any, names: Sequence[str], classes: Sequence[str] | None, processor: Any, channels: int):
        self.rows, self.names, self.classes = rows, names, classes
        self.processor, self.mode = processor, IMAGE_MODES[channels]

    def __len__(self) -> int:
        return len(self.names)

    def spread(self, count: int) -> list[int]:
        """The numbers of `count` equally spaced images."""
        return [int(number) for number in np.linspace(0, len(self) - 1, min(count, len(self)))]

    def batches(self, numbers: Sequence[int], size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The images as inputs of the model, `size` at a time."""
        for start in range(0, len(numbers), size):
            images = [self.rows[number]["image"].convert(self.mode) for number in numbers[start : start + size]]
            yield {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"].to(device)}

    def seen(self, number: int) -> Image.Image:
        """An image as the model sees it, resized and cropped, without the normalisation of colours."""
        pixels = next(self.batches([number], 1, torch.device("cpu")))["pixel_values"][0]
        if getattr(self.processor, "do_normalize", False):
            mean, std = (
                torch.tensor(getattr(self.processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std")
            )
            pixels = pixels * std + mean
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


class ShownImages(Sequence[Image.Image]):
    """The images as the model sees them, computed on access."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: Any) -> Any:
        return self.pictures.seen(int(number))
