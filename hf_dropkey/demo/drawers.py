"""Models that are drawn rather than put in a sentence: detectors, human-object interactions, body meshes.

Each answers one image at a time with the drawing of its own task; nothing about the model is changed.
"""

import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..detection.figures import detected
from ..detection.metrics import post_process
from ..hoi.figures import interactions, pair_text
from ..hoi.predict import load_pipeline
from ..hoi.scenes import draw_scene, make_scene
from ..mesh.bodies import procedural_body
from ..mesh.data import GeneratedPeople
from ..mesh.figures import alone, overlay, with_joints
from ..mesh.prediction import load_bodies
from ..models.attention import default_device
from .examples import Example, photographs


MOST_SHOWN = 20
# generated examples: how many, and their sides in pixels
GENERATED, SCENE_SIDE, PERSON_SIDE = 6, 320, 192
GENERATED_SEED = 1000
DPI = 120


@dataclass(frozen=True)
class Drawing:
    """An answer: a sentence, pictures with a line each, and the same as values that JSON knows."""

    sentence: str
    pictures: tuple[tuple[Image.Image, str], ...]
    found: tuple[Mapping[str, Any], ...]


class Drawer(Protocol):
    """An opened model."""

    # the smallest score that is shown at first; None for a task without scores
    threshold: float | None

    def draw(self, image: Image.Image, threshold: float) -> Drawing:
        """The answer to an image."""

    def examples(self) -> Sequence[Example]:
        """Images to start with, made here or with a free licence."""


def picture_of(figure: Any) -> Image.Image:
    """A figure as an image."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    return Image.open(content).convert("RGB")


def counted(names: Sequence[str]) -> str:
    """Names with how often they come: "2 person, ball"."""
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())


class Detector:
    """An opened object detector."""

    threshold: float | None = 0.5

    def __init__(self, folder: Path):
        self._model: Any = AutoModelForObjectDetection.from_pretrained(folder).to(default_device()).eval()
        self._processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._lock = threading.Lock()

    def draw(self, image: Image.Image, threshold: float) -> Drawing:
        """The boxes whose score is at least the threshold, the surest first."""
        pixels = self._processor(images=image, do_pad=False, return_tensors="pt")["pixel_values"]
        with self._lock, torch.inference_mode():
            outputs = self._model(pixel_values=pixels.to(self._model.device))
            frame = torch.tensor([[float(image.height), float(image.width)]], device=self._model.device)
            rows = post_process(self._processor, outputs, frame)[0].cpu()
        names = self._model.config.id2label
        boxes = [
            (names[int(number)], box, score)
            for score, number, *box in rows[rows[:, 0].argsort(descending=True)].tolist()
        ]
        shown = [box for box in boxes if box[2] >= threshold][:MOST_SHOWN]
        if shown:
            words = f"{len(shown)} found: {counted([name for name, _, _ in shown])}"
        else:
            words = f"Nothing with a score of {threshold:g} or more" + (
                f"; the surest is {boxes[0][0]} with {boxes[0][2]:.2f}" if boxes else ""
            )
        found = tuple({"label": name, "score": score, "box": box} for name, box, score in shown)
        return Drawing(words, ((picture_of(detected(image, shown)), "boxes with their scores"),), found)

    def examples(self) -> Sequence[Example]:
        """Photographs."""
        return photographs()


class Interactions:
    """An opened model of human-object interactions."""

    # as `hf-dropkey predict`
    threshold: float | None = 0.3

    def __init__(self, folder: Path):
        self._pipeline = load_pipeline(str(folder))
        self._lock = threading.Lock()

    def draw(self, image: Image.Image, threshold: float) -> Drawing:
        """The pairs of a person and an object with a verb of at least the threshold."""
        with self._lock:
            pairs = self._pipeline(image, threshold=threshold, top_k=MOST_SHOWN)
        figure = interactions([image], [("pairs", [pairs])], title="", columns=1)
        words = f"No verb with a score of {threshold:g} or more"
        if pairs:
            words = f"{'1 pair' if len(pairs) == 1 else f'{len(pairs)} pairs'}: {pair_text(pairs[0])}"
        found = tuple({"verbs": dict(pair["verbs"]), "object": pair["object"]} for pair in pairs)
        return Drawing(words, ((picture_of(figure), "solid: person, dashed: object, with their verbs"),), found)

    def examples(self) -> Sequence[Example]:
        """Drawn scenes, as the recipe trains on."""
        return [
            Example(f"scene {row}", draw_scene(make_scene(GENERATED_SEED, row), SCENE_SIDE))
            for row in range(GENERATED)
        ]


class Bodies:
    """An opened body mesh model, which takes the whole image for one person."""

    threshold: float | None = None

    def __init__(self, folder: Path):
        self._pipeline: Any = load_bodies(str(folder))
        model: Any = self._pipeline.model
        self._faces = model.mesh.body.faces.cpu().numpy()
        self._lock = threading.Lock()

    def draw(self, image: Image.Image, threshold: float) -> Drawing:
        """The mesh over the image and from the side, and the joints.

        Raises:
            ValueError: The model's camera is not finite.
        """
        with self._lock:
            (body,) = self._pipeline(image)
        mesh, camera = body["vertices"].numpy(), np.array(body["camera"])
        if not np.isfinite(camera).all() or not np.isfinite(mesh).all():
            raise ValueError("The model gives numbers that are not finite. Check its weights.")
        joints = with_joints(image, body["joints_2d"].numpy())
        pictures = (
            (overlay(image, [mesh], self._faces, [camera]), "mesh over the image"),
            (alone(mesh, self._faces, PERSON_SIDE * 2, turn=90), "mesh from the side"),
            (joints, "joints: right red, left blue"),
        )
        height = float(np.ptp(mesh[:, 1]))
        words = (
            f"A body of {len(mesh):,} vertices, {height:.2f} m from top to bottom; the picture is taken for one person"
        )
        return Drawing(words, pictures, ({"camera": camera.tolist(), "joints_2d": body["joints_2d"].tolist()},))

    def examples(self) -> Sequence[Example]:
        """Drawn people, as the recipe trains on."""
        people = GeneratedPeople(procedural_body(), GENERATED, GENERATED_SEED, PERSON_SIDE)
        return [Example(f"person {row}", people.image(row)) for row in range(GENERATED)]


DRAWERS: dict[str, type[Detector] | type[Interactions] | type[Bodies]] = {
    "detection": Detector,
    "hoi": Interactions,
    "mesh": Bodies,
}
