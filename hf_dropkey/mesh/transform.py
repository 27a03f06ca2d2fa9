"""From a person in an image to a model's input: crop, mirror image, rotation, colours; and targets that go with them.

All of it runs in the data loader. Every draw is a function of (seed, epoch, row), so a resumed run sees the images that
the uninterrupted one would have seen.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..models.pipeline_dropkey_mesh import square_of
from .data import SWAPPED_JOINTS, MeshSplit, Person


@dataclass(frozen=True)
class MeshAugmentation:
    """How much a training image and its person may change; the defaults are METRO's.

    Attributes:
        flip_probability: Probability of a left-right mirror image, [0, 1].
        rotation_probability: Probability of a rotation in the image plane, [0, 1].
        rotation_std: Standard deviation of its angle in degrees, cut at twice that.
        scale_std: Standard deviation of the factor on the crop's side around 1, cut at one standard deviation, [0, 1).
        color_noise: Each colour channel is multiplied by 1 - color_noise to 1 + color_noise, [0, 1].
    """

    flip_probability: float = 0.5
    rotation_probability: float = 0.4
    rotation_std: float = 30.0
    scale_std: float = 0.25
    color_noise: float = 0.4

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        allowed = {
            "flip_probability": (0 <= self.flip_probability <= 1, "[0, 1]"),
            "rotation_probability": (0 <= self.rotation_probability <= 1, "[0, 1]"),
            "rotation_std": (0 <= self.rotation_std <= 90, "[0, 90] degrees"),
            "scale_std": (0 <= self.scale_std < 1, "[0, 1)"),
            "color_noise": (0 <= self.color_noise <= 1, "[0, 1]"),
        }
        for name, (inside, span) in allowed.items():
            if not inside:
                raise ValueError(f"--{name} {getattr(self, name)} is outside {span}; choose a value inside it")

    def draw(self, generator: np.random.Generator) -> "View":
        """A random view."""
        flip = bool(generator.random() < self.flip_probability)
        turned = generator.random() < self.rotation_probability
        angle = float(np.clip(self.rotation_std * generator.standard_normal(), -2 * self.rotation_std,
                              2 * self.rotation_std))  # fmt: skip
        scale = float(
            np.clip(1 + self.scale_std * generator.standard_normal(), 1 - self.scale_std, 1 + self.scale_std)
        )
        colors = generator.uniform(1 - self.color_noise, 1 + self.color_noise, 3)
        return View(flip, angle if turned else 0.0, scale, tuple(map(float, colors)))


@dataclass(frozen=True)
class View:
    """How a person is looked at.

    Attributes:
        flip: Whether left and right change sides.
        angle: Degrees by which the image turns, from x to y.
        scale: Factor on the side of the crop: above 1 the person looks smaller.
        colors: Factor on each channel.
    """

    flip: bool = False
    angle: float = 0.0
    scale: float = 1.0
    colors: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def turn(self) -> np.ndarray:
        """What happens to x and y of the image and of the body, `[2, 2]`: the rotation, then the mirror image."""
        cosine, sine = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        return np.diag([-1.0, 1.0]) @ rotation if self.flip else rotation

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points `[N, 3]` of a body, turned; sides are not swapped."""
        return np.concatenate((points[:, :2] @ self.turn.T, points[:, 2:]), axis=1)


class SquareView:
    """A view of a square of an image, -1 to 1 across the crop.

    Args:
        box: Of the person, in pixels.
        view: How it is looked at.
    """

    def __init__(self, box: tuple[float, ...], view: View):
        left, top, side = square_of(box)
        self.view = view
        self.half = side * view.scale / 2
        self.middle = np.array([left + side / 2, top + side / 2])

    def positions(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels `[N, 2]` of the image as positions in the crop, -1 to 1."""
        return (pixels - self.middle) @ self.view.turn.T / self.half

    def crop(self, image: Image.Image, size: int) -> Image.Image:
        """The crop, `size` x `size` pixels; what lies outside the image is black."""
        # Pillow wants the way back, from a pixel of the crop to its place in the image
        back = np.linalg.inv(self.view.turn) * self.half * 2 / size
        start = self.middle - back @ np.array([size / 2, size / 2])
        shrink = max(1, int(2 * self.half / size))
        if shrink > 1:
            # bilinear sampling of a much larger square would skip pixels
            image, back, start = image.reduce(shrink), back / shrink, start / shrink
        matrix = (back[0, 0], back[0, 1], start[0], back[1, 0], back[1, 1], start[1])
        return image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def mirrored_person(person: Person, mirror: np.ndarray | None) -> Person:
    """The person with left and right joints and vertices swapped, coordinates as they are."""
    order = list(SWAPPED_JOINTS)
    if person.vertices is not None and mirror is None:
        raise ValueError("this body has no mirror image; train with --flip_probability 0")
    return replace(
        person,
        vertices=None if person.vertices is None else person.vertices[mirror],
        joints_3d=None if person.joints_3d is None else person.joints_3d[order],
        joints_2d=None if person.joints_2d is None else person.joints_2d[order],
    )


def targets(person: Person, square: SquareView, num_vertices: int) -> dict[str, torch.Tensor]:
    """What the model is compared with: see `DropKeyMeshForBodyMesh.forward`.

    Joints that a crop cuts off count: a model has to guess them.
    """
    view = square.view
    count = len(SWAPPED_JOINTS)
    joints_3d, joints_2d = np.zeros((count, 4)), np.zeros((count, 3))
    if person.joints_3d is not None:
        joints_3d = np.hstack((view.points(person.joints_3d[:, :3]), person.joints_3d[:, 3:]))
    if person.joints_2d is not None:
        seen = person.joints_2d[:, 2:]
        joints_2d = np.hstack((square.positions(person.joints_2d[:, :2]) * (seen > 0), seen))
    vertices = np.zeros((num_vertices, 3)) if person.vertices is None else view.points(person.vertices)
    arrays = {
        "joints_3d": joints_3d,
        "joints_2d": joints_2d,
        "vertices": vertices,
        "has_joints_3d": float(person.joints_3d is not None),
        "has_vertices": float(person.vertices is not None),
    }
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in arrays.items()}


class MeshDataset(torch.utils.data.Dataset):
    """Persons as a model takes them.

    Attributes:
        epoch: Number of the current epoch, in shared memory because the processes of a data loader read it too.
    """

    def __init__(
        self,
        split: MeshSplit,
        processor: BaseImageProcessor,
        *,
        image_size: int,
        num_vertices: int,
        mirror: np.ndarray | None = None,
        augmentation: MeshAugmentation | None = None,
        seed: int = 0,
        num_channels: int = 3,
    ) -> None:
        """`mirror` is the vertex of the other side for each vertex; `augmentation` None changes nothing."""
        self.split = split
        self.processor: Any = processor
        self.image_size = image_size
        self.num_vertices = num_vertices
        self.mirror = mirror
        self.augmentation = augmentation
        self.seed = seed
        self.mode = "L" if num_channels == 1 else "RGB"
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def view(self, row: int) -> View:
        """How the person of a row is looked at in this epoch."""
        if self.augmentation is None:
            return View()
        return self.augmentation.draw(np.random.default_rng([self.seed, int(self.epoch), row]))

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        image, person = self.split.image(row), self.split.person(row)
        view = self.view(row)
        if view.flip:
            person = mirrored_person(person, self.mirror)
        square = SquareView(person.box, view)
        crop = square.crop(image, self.image_size)
        if view.colors != (1.0, 1.0, 1.0):
            noisy = np.asarray(crop, dtype=np.float64) * np.array(view.colors)
            crop = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
        pixels = self.processor(crop.convert(self.mode), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, **targets(person, square, self.num_vertices)}
