"""Finds pairs in images with a saved model, draws them, and writes them as JSON."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig

from ..images.checks import read_image_file
from ..images.folders import check_writable, images_among, make_output_folder, output_names
from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from ..models.pipeline_dropkey_hoi import HoiPipeline
from ..saved import check_model_source
from .figures import interactions


logger = logging.getLogger(__name__)

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


def load_pipeline(source: str, revision: str = "main") -> HoiPipeline:
    """The pipeline of a saved model.

    Raises:
        FileNotFoundError: There is no such folder, or it lacks files.
        ValueError: The model finds no pairs.
    """
    check_model_source(source)
    found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if found.get("model_type") != DropKeyHoiConfig.model_type:
        raise ValueError(
            f"{source} has model_type {found.get('model_type')!r} and finds no pairs; give a {DropKeyHoiConfig.model_type!r}"
        )
    model: Any = AutoModelForObjectDetection.from_pretrained(source, revision=revision)
    processor = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
    return HoiPipeline(model=model.eval(), image_processor=processor)


def predict(arguments: PredictionArguments) -> dict[str, list[dict[str, Any]]]:
    """Finds and draws the pairs of each image; returns them by file name.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: There is no image, or nothing can be written.
        ValueError: An image cannot be read, or the model finds no pairs.
    """
    files = images_among(arguments.images)
    check_writable(arguments.out, "--out")
    pipeline = load_pipeline(arguments.model, arguments.revision)
    make_output_folder(arguments.out, "--out")
    found: dict[str, list[dict[str, Any]]] = {}
    for file, name in zip(files, output_names(files), strict=True):
        image = read_image_file(file)
        pairs = pipeline(image, threshold=arguments.threshold, top_k=arguments.top_k, nms=arguments.nms)
        found[str(file)] = pairs
        drawing = arguments.out / f"{name}_pairs.png"
        draw(image, pairs, file.name, drawing)
        print(f"{file}: {len(pairs)} pairs, drawn in {drawing}")
        for pair in pairs:
            verbs = ", ".join(f"{verb} {score:.2f}" for verb, score in pair["verbs"].items())
            print(f"  {verbs}: {pair['object'] or 'no object'} {pair['object_score']:.2f}")
    (arguments.out / RESULTS).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def draw(image: Image.Image, pairs: list[dict[str, Any]], name: str, file: Path) -> None:
    """Draws one image with its pairs."""
    figure = interactions([image], [("pairs", [pairs])], title=name, columns=1)
    figure.savefig(file, dpi=200)
