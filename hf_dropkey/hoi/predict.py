"""Finds pairs in images with a saved model, draws them, and writes them as JSON."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..images.checks import read_image
from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from ..models.pipeline_dropkey_hoi import HoiPipeline
from .figures import interactions


logger = logging.getLogger(__name__)

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
RESULTS = "pairs.json"


@dataclass
class PredictionArguments:
    """Which model, which images, what is shown."""

    _argument_group_name = "Prediction"

    model: str = field(
        metadata={"help": "DropKeyHoi model: a folder or a hub id.", "aliases": ["--model_name_or_path"]}
    )
    images: list[str] = field(metadata={"help": "Image files, or folders of them."})
    out: Path = field(metadata={"help": f"Folder to write a PNG for each image and {RESULTS} to."})
    threshold: float = field(default=0.3, metadata={"help": "Smallest score of a verb that is shown, [0, 1]."})
    top_k: int = field(default=20, metadata={"help": "Largest number of pairs in an image."})
    nms: float | None = field(
        default=None,
        metadata={"help": "Leave out pairs that overlap a better one by more than this IoU in both boxes, [0, 1]."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        for name in ("threshold", "nms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name} {value} is outside [0, 1]")
        if self.top_k < 1:
            raise ValueError(f"--top_k {self.top_k} is below 1")


ARGUMENTS = (PredictionArguments,)


def image_files(paths: Iterable[str]) -> list[Path]:
    """The image files among paths, folders looked into, in order.

    Raises:
        FileNotFoundError: A path is not there, or there is no image.
    """
    paths = list(paths)
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no image file or folder {path}")
    if not files:
        raise FileNotFoundError(f"there is no image in {paths}; images end in {sorted(IMAGE_ENDINGS)}")
    return files


def load_pipeline(source: str, revision: str = "main") -> HoiPipeline:
    """The pipeline of a saved model.

    Raises:
        ValueError: The model finds no pairs.
    """
    model: Any = AutoModelForObjectDetection.from_pretrained(source, revision=revision)
    if model.config.model_type != DropKeyHoiConfig.model_type:
        raise ValueError(
            f"{source} has model_type {model.config.model_type!r} and finds no pairs; give a {DropKeyHoiConfig.model_type!r}"
        )
    processor = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
    return HoiPipeline(model=model.eval(), image_processor=processor)


def predict(arguments: PredictionArguments) -> dict[str, list[dict[str, Any]]]:
    """Finds and draws the pairs of each image; returns them by file name.

    Raises:
        FileNotFoundError: There is no image.
        ValueError: An image cannot be read, or the model finds no pairs.
    """
    files = image_files(arguments.images)
    pipeline = load_pipeline(arguments.model, arguments.revision)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for number, file in enumerate(files):
        image = read_image({"path": str(file), "bytes": None}, number).convert("RGB")
        pairs = pipeline(image, threshold=arguments.threshold, top_k=arguments.top_k, nms=arguments.nms)
        found[str(file)] = pairs
        drawing = arguments.out / f"{file.stem}_pairs.png"
        draw(image, pairs, file.name, drawing)
        print(f"{file}: {len(pairs)} pairs, drawn in {drawing}")
        for pair in pairs:
            verbs = ", ".join(f"{name} {score:.2f}" for name, score in pair["verbs"].items())
            print(f"  {verbs}: {pair['object'] or 'no object'} {pair['object_score']:.2f}")
    (arguments.out / RESULTS).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def draw(image: Image.Image, pairs: list[dict[str, Any]], name: str, file: Path) -> None:
    """Draws one image with its pairs."""
    figure = interactions([image], [("pairs", [pairs])], title=name, columns=1)
    figure.savefig(file, dpi=200)
