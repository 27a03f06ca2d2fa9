"""Segments images with a saved model, and writes masks, pictures and a summary."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from ..images.checks import read_image_file
from ..images.folders import check_writable, images_among, make_output_folder, output_names
from ..patching import apply_dropkey
from ..patching.apply import dropkey_modules
from .arguments import IGNORE_INDEX, SegmentationModelArguments
from .figures import Segmented, class_colors, segmentations
from .job import segmented
from .model import auto_class, image_side, pretrained_config
from .transform import pixels_of


logger = logging.getLogger(__name__)

RESULTS = "segmentation.json"


@dataclass
class PredictionArguments:
    """Which model, which images, what is measured."""

    _argument_group_name = "Prediction"

    model: str = field(
        metadata={"help": "Segmentation model: a folder or a hub id.", "aliases": ["--model_name_or_path"]}
    )
    images: list[str] = field(metadata={"help": "Image files, or folders of them."})
    out: Path = field(metadata={"help": f"Folder to write a mask and a picture for each image and {RESULTS} to."})
    samples: int = field(
        default=20, metadata={"help": "Random masks of DropKey for the uncertainty of each pixel; 0: none."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels of what the model sees. Default: as its image processor has it."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.samples == 1 or self.samples < 0:
            raise ValueError(f"--samples {self.samples} is neither 0, for no uncertainty, nor at least 2")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size {self.image_size} is below 1")


ARGUMENTS = (PredictionArguments,)


def load_model(source: str, revision: str = "main") -> Any:
    """A saved model in eval mode, with the DropKey that its configuration remembers.

    Raises:
        FileNotFoundError: The folder lacks files.
        ValueError: The model segments nothing.
    """
    config: Any = pretrained_config(SegmentationModelArguments(model_name_or_path=source, revision=revision))
    model = auto_class(config).from_pretrained(source, config=config, revision=revision)
    if not any(True for _ in dropkey_modules(model)) and getattr(config, "dropkey_ratio", None):
        apply_dropkey(model)
    return model.eval()


def predict(arguments: PredictionArguments) -> dict[str, dict[str, Any]]:
    """Segments each image; writes its mask, a picture and the summary, which is returned by file name.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: There is no image, or nothing can be written.
        ValueError: An image cannot be read, the model segments nothing, or has no DropKey for an uncertainty.
    """
    files = images_among(arguments.images)
    check_writable(arguments.out, "--out")
    model = load_model(arguments.model, arguments.revision)
    config: Any = model.config
    if arguments.samples and not any(module.dropkey_ratio for _, module in dropkey_modules(model)):
        raise ValueError(f"{arguments.model} has no DropKey, whose masks give the uncertainty; pass --samples 0")
    processor = AutoImageProcessor.from_pretrained(arguments.model, revision=arguments.revision, backend="pil")
    named = SegmentationModelArguments(model_name_or_path=arguments.model, image_size=arguments.image_size)
    side = image_side(config, processor, named)
    names = [config.id2label[number] for number in range(len(config.id2label))]
    make_output_folder(arguments.out, "--out")
    found: dict[str, dict[str, Any]] = {}
    for file, name in zip(files, output_names(files), strict=True):
        image = read_image_file(file)
        pixels = pixels_of(image.resize((side, side), Image.Resampling.BILINEAR), processor)[None]
        classes, spread = segmented(model, pixels, image.size[::-1], samples=arguments.samples)
        save_mask(classes, len(names), arguments.out / f"{name}_mask.png")
        drawing = arguments.out / f"{name}_segments.png"
        figure = segmentations(
            [Segmented(image, None, classes, spread)], names, title=file.name, ignore_index=IGNORE_INDEX
        )
        figure.savefig(drawing, dpi=150)
        found[str(file)] = summary(classes, spread, names)
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in found[str(file)]["fractions"].items())
        print(f"{file}: {shares}; drawn in {drawing}")
    (arguments.out / RESULTS).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def save_mask(classes: NDArray[np.int64], count: int, file: Path) -> None:
    """Writes class numbers as a PNG whose values are the numbers, with a palette of the figure's colours.

    Raises:
        ValueError: There are more than 256 classes.
    """
    if count > 256:
        raise ValueError(f"{count} classes do not fit into the 256 values of a mask")
    mask = Image.fromarray(classes.astype(np.uint8))
    mask.putpalette((class_colors(count) * 255).round().astype(np.uint8).reshape(-1).tolist())
    mask.save(file)


def summary(classes: NDArray[np.int64], spread: NDArray[np.float64] | None, names: list[str]) -> dict[str, Any]:
    """The fraction of each class that is there, the largest first, and the mean uncertainty."""
    counts = np.bincount(classes.reshape(-1), minlength=len(names))
    order = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    fractions = {names[number]: float(counts[number] / classes.size) for number in order}
    return {"fractions": fractions, "mean_entropy": None if spread is None else float(spread.mean())}
