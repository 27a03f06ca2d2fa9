"""Bodies of the persons in photographs: boxes from the user or a detector in, pictures and mesh files out."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil, pipeline

from ..extras import needed
from ..images.checks import read_image_file
from ..images.folders import check_writable, images_among, make_output_folder, output_names
from ..models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh
from ..models.pipeline_dropkey_mesh import BodyMeshPipeline, check_box
from ..saved import check_model_source, one_error
from .figures import alone, overlay, with_joints, write_glb, write_obj


logger = logging.getLogger(__name__)

PERSON_LABELS = ("person", "pedestrian", "human")
SIDE_PIXELS = 384


@dataclass
class PredictionArguments:
    """Which model looks at which persons."""

    _argument_group_name = "Prediction"

    model_name_or_path: str = field(metadata={"help": "The trained model: a folder or a hub id."})
    images: list[Path] = field(metadata={"help": "Photographs, or folders of them."})
    out: Path = field(default=Path("bodies"), metadata={"help": "Folder for pictures and meshes."})
    box: list[float] | None = field(
        default=None,
        metadata={"help": "x y width height in pixels of the person; four more numbers for each further person. For one "
                  "image."},
    )  # fmt: skip
    boxes: Path | None = field(
        default=None,
        metadata={
            "help": 'JSON file with the boxes of each image by its file name: {"a.jpg": [[x, y, width, height]]}.'
        },
    )
    detector: str | None = field(
        default=None,
        metadata={"help": "Object detector of Transformers that finds the persons, such as PekingU/rtdetr_r18vd."},
    )
    detector_threshold: float = field(default=0.5, metadata={"help": "Smallest score of a found person, [0, 1]."})
    glb: bool = field(default=False, metadata={"help": "Write GLB files beside OBJ files; needs trimesh."})

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one source of boxes at most, and its numbers can be boxes."""
        given = [name for name in ("box", "boxes", "detector") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"--{given[0]} and --{given[1]} both say where the persons are; leave one out")
        if self.box is not None and (len(self.box) % 4 or len(self.images) != 1):
            raise ValueError(
                f"--box takes four numbers for each person of one image, got {len(self.box)} numbers for "
                f"{len(self.images)} images. For several images use --boxes"
            )
        if not 0 <= self.detector_threshold <= 1:
            raise ValueError(f"--detector_threshold {self.detector_threshold} is outside [0, 1]")


ARGUMENTS = (PredictionArguments,)


def read_boxes(file: Path) -> dict[str, list[list[float]]]:
    """Boxes by the names of their images.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--boxes {file} is {'a folder' if file.exists() else 'not there'}; give a JSON file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    # also text that is not UTF-8, and JSON that is nested too deeply
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--boxes {file} is not a JSON file: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(boxes, list) for boxes in found.values()):
        raise ValueError(f'--boxes {file} must be of the form {{"a.jpg": [[x, y, width, height]]}}.')
    return found


def person_boxes(detections: Sequence[dict[str, Any]], threshold: float) -> list[list[float]]:
    """Boxes [x, y, width, height] of the persons that a detection pipeline found, surest first."""
    persons = [one for one in detections if one["label"].lower() in PERSON_LABELS and one["score"] >= threshold]
    boxes = []
    for one in sorted(persons, key=lambda person: -person["score"]):
        corners = one["box"]
        boxes.append(
            [float(corners["xmin"]), float(corners["ymin"]), float(corners["xmax"] - corners["xmin"]),
             float(corners["ymax"] - corners["ymin"])]
        )  # fmt: skip
    return boxes


def load_bodies(model: str) -> BodyMeshPipeline:
    """The pipeline of a trained model."""
    check_model_source(model)
    return BodyMeshPipeline(
        model=DropKeyMeshForBodyMesh.from_pretrained(model),
        image_processor=ViTImageProcessorPil.from_pretrained(model),
    )


def check_boxes(arguments: PredictionArguments, files: Sequence[Path]) -> None:
    """Raises ValueError if boxes by file name would be those of several images."""
    if arguments.boxes is not None and len({file.name for file in files}) < len(files):
        raise ValueError(
            f"--boxes {arguments.boxes} names images by their file name, which several of --images share; give each folder "
            "a call of its own"
        )


class Boxes:
    """Where the persons of an image are, as the arguments say."""

    def __init__(self, arguments: PredictionArguments):
        self.arguments = arguments
        self.listed = None if arguments.boxes is None else read_boxes(arguments.boxes)
        self.detector: Any = None
        if arguments.detector is not None:
            check_model_source(arguments.detector)
            with one_error(f"--detector {arguments.detector} is not an object detector of Transformers"):
                self.detector = pipeline("object-detection", model=arguments.detector)
            labels = {label.lower() for label in self.detector.model.config.id2label.values()}
            if not labels & set(PERSON_LABELS):
                raise ValueError(
                    f"--detector {arguments.detector} knows no persons: none of its classes is called "
                    f"{' or '.join(PERSON_LABELS)}."
                )

    def of(self, file: Path, image: Image.Image) -> list[list[float]] | None:
        """Boxes of the persons; None means the whole image is one person.

        Raises:
            ValueError: A box has no area or lies outside the image, or a listed image has no entry.
        """
        if self.detector is not None:
            return person_boxes(self.detector(image), self.arguments.detector_threshold)
        if self.listed is not None:
            if file.name not in self.listed:
                raise ValueError(f"--boxes {self.arguments.boxes} has no entry {file.name!r}; write [] for no person.")
            boxes = self.listed[file.name]
        elif self.arguments.box is not None:
            boxes = [self.arguments.box[start : start + 4] for start in range(0, len(self.arguments.box), 4)]
        else:
            return None
        for box in boxes:
            check_box(box, image.size)
        return [[float(value) for value in box] for box in boxes]


def write_results(
    out: Path, name: str, image: Image.Image, results: Sequence[dict[str, Any]], faces: np.ndarray, *, glb: bool
) -> list[Path]:
    """Overlay and joints of an image, and side view and mesh of each person; returns the files."""
    meshes = [one["vertices"].numpy() for one in results]
    cameras = [np.array(one["camera"]) for one in results]
    files = [out / f"{name}_mesh.png", out / f"{name}_joints.png"]
    overlay(image, meshes, faces, cameras).save(files[0])
    drawn = image
    for one in results:
        drawn = with_joints(drawn, one["joints_2d"].numpy())
    drawn.save(files[1])
    for number, mesh in enumerate(meshes):
        files += [out / f"{name}_{number}_side.png", out / f"{name}_{number}.obj"]
        alone(mesh, faces, SIDE_PIXELS, turn=90).save(files[-2])
        write_obj(files[-1], mesh, faces)
        if glb:
            files.append(out / f"{name}_{number}.glb")
            write_glb(files[-1], mesh, faces)
    return files


def predict(arguments: PredictionArguments) -> dict[str, Any]:
    """Looks at all images; returns the number of images, persons, and of images without persons.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: A path is not there, or nothing can be written.
        ImportError: trimesh is missing for GLB files.
        ValueError: An image, a box or the model cannot be used.
    """
    files = images_among(list(map(str, arguments.images)))
    check_boxes(arguments, files)
    check_writable(arguments.out, "--out")
    if arguments.glb:
        with needed("body"):
            import trimesh  # noqa: F401  # now, not after the first picture
    bodies, boxes = load_bodies(arguments.model_name_or_path), Boxes(arguments)
    model: Any = bodies.model
    faces = model.mesh.body.faces.cpu().numpy()
    make_output_folder(arguments.out, "--out")
    counts = {"images": len(files), "persons": 0, "images_without_persons": 0}
    for file, name in zip(files, output_names(files), strict=True):
        image = read_image_file(file)
        found = bodies(image, boxes=boxes.of(file, image))
        if not found:
            counts["images_without_persons"] += 1
            logger.warning("%s: no person, nothing is written", file)
            continue
        counts["persons"] += len(found)
        if not all(math.isfinite(value) for one in found for value in one["camera"]):
            raise ValueError(
                f"{file}: the model's camera is not finite. Check the weights of {arguments.model_name_or_path}."
            )
        written = write_results(arguments.out, name, image, found, faces, glb=arguments.glb)
        print(f"{file}: {len(found)} persons, {len(written)} files in {arguments.out}")
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    return counts
