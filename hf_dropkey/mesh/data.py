"""Persons with meshes or joints, one a row: generated from a body model, or read from a user's data set and checked.

A row has `image` and `box` ([x, y, width, height] in pixels), and what is known of the person: `vertices` [V, 3] or
(`pose`, `shape`) of the body, `joints_3d` [J, 4] in metres with confidence, `joints_2d` [J, 3] in pixels with
confidence, `camera` [3] (scale, x, y: a point is drawn at `scale * xy + (x, y)`). x points right, y down, z away.
"""

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..images.checks import name_some, read_checked_image
from ..images.folders import image_endings, visible_files
from ..images.sources import data_fingerprint, image_bytes, image_name
from ..models.pipeline_dropkey_mesh import BOX_MARGIN, check_box
from .bodies import JOINT_ROWS, PARTS, Body
from .metrics import mean_body
from .renderer import project_points, render
from .topology import unit_problem


logger = logging.getLogger(__name__)

# joints of the model in the layouts that data sets have; -1 where a layout lacks one
JOINT_LAYOUTS = {
    14: tuple(range(14)),
    # COCO has neither neck nor top of the head
    17: (16, 14, 12, 11, 13, 15, 10, 8, 6, 5, 7, 9, -1, -1),
    # of METRO's 24 joints: the 14th is the head, not the top of the head
    24: (*range(13), 18),
}
# of EXIF, and its values that swap width and height
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
COLUMNS = ("image", "box", "vertices", "pose", "shape", "joints_3d", "joints_2d", "camera")
# coarser than any mistake of a joint regressor, finer than swapped sides
JOINT_TOLERANCE_METRES = 0.15
# cubic metres; an adult has 0.05 to 0.1
LEAST_VOLUME = 0.005


@dataclass(frozen=True)
class Person:
    """One person; what is not known is None.

    Attributes:
        box: x, y, width, height in pixels.
        vertices: `[V, 3]` metres.
        joints_3d: `[14, 4]` metres and confidence.
        joints_2d: `[14, 3]` pixels and confidence.
    """

    box: tuple[float, ...]
    vertices: np.ndarray | None = None
    joints_3d: np.ndarray | None = None
    joints_2d: np.ndarray | None = None


class MeshSplit(Protocol):
    """Persons in images."""

    name: str

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image.Image:
        """The image of a row, in RGB."""

    def person(self, row: int) -> Person:
        """What is known of the person of a row."""

    def identities(self) -> Iterator[tuple[str, str, int]]:
        """Name, a hash of what is known of the person, and size in bytes of the image of each row."""


def digest(*arrays: Any) -> str:
    """A hash of arrays, of which any may be None."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(b"none" if array is None else str(np.shape(array)).encode() + np.asarray(array).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class MeshData:
    """What a model of bodies is trained and evaluated on."""

    train: MeshSplit | None
    evaluation: MeshSplit | None

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Rows, names, persons and sizes of the images to `train` and for `evaluation`."""
        splits = {"train": self.train, "evaluation": self.evaluation}
        return {name: data_fingerprint(split.identities()) for name, split in splits.items() if split is not None}


# --- generated people ------------------------------------------------------------------------------------------------

# what a person may wear, and skin, dark to light
_SKIN = ((0.35, 0.22, 0.15), (0.98, 0.84, 0.73))


@dataclass
class GeneratedPeople:
    """Drawn people: body, pose, shape, clothes, camera, light and background of a row follow from (seed, row).

    Attributes:
        body: The body model.
        count: Number of rows.
        seed: Rows of another seed are other people.
        size: Side of the square images in pixels.
        backgrounds: Photographs to draw people on, instead of coloured shapes.
        keep: Whether drawn rows stay in memory.
    """

    body: Body
    count: int
    seed: int
    size: int
    backgrounds: Sequence[Path] = ()
    keep: bool = True
    name: str = "generated people"
    _kept: dict[int, tuple[Image.Image, Person]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.count

    def image(self, row: int) -> Image.Image:
        """The image of a row."""
        return self.draw(row)[0]

    def person(self, row: int) -> Person:
        """The person of a row: everything is known, and exact."""
        return self.draw(row)[1]

    def identities(self) -> Iterator[tuple[str, str, int]]:
        """Seed and row as the name, a hash of body and backgrounds, and the side of the images: all the rest follows."""
        known = digest(self.body.template, self.body.faces, self.body.joint_regressor)
        files = [(path.name, path.stat().st_size) for path in self.backgrounds]
        for row in range(self.count):
            yield f"seed {self.seed} row {row}", f"{known} {files}", self.size

    def vertices(self, rows: Sequence[int]) -> np.ndarray:
        """The meshes of rows, without drawing them, `[N, V, 3]`."""
        drawn = [self.body.sample(1, self._generator(row)) for row in rows]
        pose, shape = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        return self.body(pose, shape)[0]

    def _generator(self, row: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, row])

    def draw(self, row: int) -> tuple[Image.Image, Person]:
        """Image and person of a row."""
        if row in self._kept:
            return self._kept[row]
        generator = self._generator(row)
        vertices, joints = (one[0] for one in self.body(*self.body.sample(1, generator)))
        camera = self._camera(vertices, generator)
        light = generator.uniform((-1.0, -1.0, -1.0), (1.0, 0.2, -0.4))
        colors = self._colors(generator)
        drawn = render(vertices, self.body.faces, camera, (self.size, self.size), colors=colors, light=tuple(light),
                       antialias=2)  # fmt: skip
        picture = drawn.over(self._background(generator)).clip(0, 1) * 255
        noisy = picture + generator.normal(0, 2.0, picture.shape)
        image = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
        pixels = project_points(vertices, camera)
        corner, extent = pixels.min(0), np.ptp(pixels, axis=0)
        chosen = joints[list(JOINT_ROWS)]
        sure = np.ones((len(chosen), 1))
        person = Person(
            (*map(float, corner), *map(float, extent)),
            vertices.astype(np.float32),
            np.hstack((chosen, sure)),
            np.hstack((project_points(chosen, camera), sure)),
        )
        if self.keep:
            self._kept[row] = (image, person)
        return image, person

    def _camera(self, vertices: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A camera whose image is about the square that a detector's box would give."""
        low, high = vertices[:, :2].min(0), vertices[:, :2].max(0)
        scale = self.size / (BOX_MARGIN * (high - low).max()) * generator.uniform(0.9, 1.0)
        middle = self.size / 2 * (1 + generator.uniform(-0.06, 0.06, 2))
        return np.array([scale, *(middle - scale * (low + high) / 2)])

    def _colors(self, generator: np.random.Generator) -> np.ndarray:
        """A colour for each vertex: clothes where the body says which part a vertex belongs to, else one."""
        palette = {name: generator.uniform(0.05, 0.95, 3) for name in PARTS}
        palette["skin"] = np.array(_SKIN[0]) + generator.random() * np.subtract(_SKIN[1], _SKIN[0])
        palette["hair"] = palette["hair"] * 0.5
        if generator.random() < 0.4:
            # bare legs
            palette["trousers"] = palette["skin"] if generator.random() < 0.3 else palette["trousers"] * 0.4
        parts = getattr(self.body, "parts", None)
        if parts is None:
            return np.broadcast_to(palette["shirt"], np.shape(self.body.template))
        return np.array([palette[name] for name in PARTS])[parts]

    def _background(self, generator: np.random.Generator) -> np.ndarray:
        """A part of a photograph, or coloured shapes on a gradient, `[size, size, 3]` in [0, 1]."""
        if self.backgrounds:
            return self._photograph(self.backgrounds[int(generator.integers(len(self.backgrounds)))], generator)
        ramp = np.linspace(0, 1, self.size)
        first, second = generator.uniform(0.1, 0.9, (2, 3))
        angle = generator.uniform(0, 2 * np.pi)
        mix = (np.cos(angle) * (ramp - 0.5)[None] + np.sin(angle) * (ramp - 0.5)[:, None] + 0.75)[..., None] / 1.5
        picture = first * mix + second * (1 - mix)
        for _ in range(int(generator.integers(0, 7))):
            x, y = generator.uniform(0, 1, 2)
            width, height = generator.uniform(0.05, 0.5, 2)
            color, ellipse = generator.uniform(0, 1, 3), generator.random() < 0.5
            dx, dy = np.abs(ramp - x)[None] / width, np.abs(ramp - y)[:, None] / height
            inside = (dx**2 + dy**2 < 0.25) if ellipse else (np.maximum(dx, dy) < 0.5)
            picture = np.where(inside[..., None], color, picture)
        return picture

    def _photograph(self, file: Path, generator: np.random.Generator) -> np.ndarray:
        """A random square of a photograph."""
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        side = min(image.size) * generator.uniform(0.5, 1.0)
        left, upper = (generator.uniform(0, whole - side) for whole in image.size)
        box = (left, upper, left + side, upper + side)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)) / 255.0


def background_files(folder: str | None) -> list[Path]:
    """The images in a folder of photographs, by name.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"--backgrounds {folder} is {'a file' if Path(folder).exists() else 'not there'}; give a folder"
        )
    endings = image_endings()
    found = sorted(file for file in map(Path, visible_files(folder)) if file.suffix.lower() in endings)
    if not found:
        raise FileNotFoundError(f"--backgrounds {folder}: there is no image in this folder.")
    return found


# --- rows of a user's data set ---------------------------------------------------------------------------------------


class RowPeople:
    """Checked rows of a data set of the library `datasets`.

    Args:
        rows: With undecoded images in `image`.
        name: What messages call it.
        body: For `pose` and `shape`, and for joints of rows that have a mesh only.
        skip: Leave bad rows out and count them, instead of stopping.

    Raises:
        ValueError: Columns or rows cannot be used; names and counts them.
    """

    def __init__(self, rows: Any, name: str, body: Body, *, skip: bool = False):
        self.name = name
        self.rows = rows
        self.body = body
        check_columns(rows.column_names, name)
        self.outside = 0
        problems = Counter[str]()
        bad, self.numbers, self.people = [], [], []
        columns = [column for column in rows.column_names if column in COLUMNS and column != "image"]
        plain = rows.select_columns(columns) if columns else rows
        for number in range(len(rows)):
            try:
                person = self._read({**plain[number], "size": shown_size(rows[number]["image"], number)}, number)
            except RowProblem as problem:
                problems[problem.kind] += 1
                bad.append(str(problem))
                continue
            self.numbers.append(number)
            self.people.append(person)
        self._report(bad, problems, skip)

    def _report(self, bad: list[str], problems: Counter[str], skip: bool) -> None:
        """Raises ValueError, or logs what is left out."""
        total = len(self.rows)
        if bad:
            kinds = ", ".join(f"{count} {kind}" for kind, count in problems.most_common())
            message = f"{len(bad)} of {total} rows of {self.name} cannot be used ({kinds}): {name_some(bad)}"
            if not skip or not self.people:
                raise ValueError(f"{message}. Repair or remove them, or leave them out with --skip_bad_rows")
            logger.warning("%s. They are left out.", message)
        if self.outside:
            logger.warning("%d joints of %s lie outside their images and count as not seen.", self.outside, self.name)
        self._check_directions()

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, row: int) -> Image.Image:
        """The image of a row, in RGB, turned as its file says."""
        number = self.numbers[row]
        return read_checked_image(self.rows[number]["image"], number).convert("RGB")

    def person(self, row: int) -> Person:
        """The person of a row."""
        return self.people[row]

    def identities(self) -> Iterator[tuple[str, str, int]]:
        """The image's name, a hash of the person, and the image's size in bytes, of each row."""
        for number, one in zip(self.numbers, self.people, strict=True):
            cell = self.rows[number]["image"]
            known = digest(one.box, one.vertices, one.joints_3d, one.joints_2d)
            yield image_name(cell.get("path"), number), known, image_bytes(cell)

    def _read(self, row: Mapping[str, Any], number: int) -> Person:
        """What a row says, checked.

        Raises:
            RowProblem: It cannot be used.
        """
        if row.get("box") is None:
            raise RowProblem(number, "without a person", "no box: an image without persons has no row")
        box = self._box(row, number)
        vertices = self._vertices(row, number)
        joints_3d = joints_of(row.get("joints_3d"), 4, number, "joints_3d")
        joints_2d = joints_of(row.get("joints_2d"), 3, number, "joints_2d")
        if vertices is not None:
            regressed = self.body.joint_regressor[list(JOINT_ROWS)] @ vertices
            if joints_3d is None:
                joints_3d = np.hstack((regressed, np.ones((len(regressed), 1))))
            else:
                check_sides(joints_3d, regressed, number)
            camera = camera_of(row.get("camera"), number)
            if joints_2d is None and camera is not None:
                pixels = project_points(regressed, camera)
                joints_2d = np.hstack((pixels, np.ones((len(pixels), 1))))
        if joints_3d is not None:
            check_metres(joints_3d[joints_3d[:, 3] > 0, :3], number)
        if joints_3d is None and joints_2d is None:
            raise RowProblem(number, "without a target", "neither vertices nor joints")
        return Person(box, vertices, joints_3d, self._seen(joints_2d, row["size"]))

    def _box(self, row: Mapping[str, Any], number: int) -> tuple[float, ...]:
        """A box that has an area and touches the image."""
        try:
            check_box(row["box"], row["size"])
        except ValueError as error:
            raise RowProblem(number, "with a bad box", str(error).rstrip(".")) from error
        return tuple(float(value) for value in row["box"])

    def _seen(self, joints: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
        """The 2-D joints; those outside the image are counted, and count as not seen."""
        if joints is None:
            return None
        outside = (joints[:, 2] > 0) & ~((joints[:, :2] >= 0) & (joints[:, :2] <= size)).all(1)
        self.outside += int(outside.sum())
        return np.where(outside[:, None], 0.0, joints)

    def _vertices(self, row: Mapping[str, Any], number: int) -> np.ndarray | None:
        """The mesh of a row, given or posed."""
        given = row.get("vertices")
        if given is None and row.get("pose") is not None:
            if row.get("shape") is None:
                raise RowProblem(number, "without a shape", "a pose needs a shape")
            pose, shape = (numbers(row[name], number, name) for name in ("pose", "shape"))
            try:
                given = self.body(pose[None], shape[None])[0][0]
            except (ValueError, IndexError, RuntimeError) as error:
                raise ValueError(
                    f"row {number} of {self.name} has a pose of the shape {list(pose.shape)} and a shape of "
                    f"{list(shape.shape)}, which {type(self.body).__name__} does not take ({error}). Choose the body of the "
                    "data with --body"
                ) from error
        if given is None:
            return None
        vertices = numbers(given, number, "vertices")
        wanted = np.shape(self.body.template)
        if vertices.shape != wanted:
            raise ValueError(
                f"row {number} of {self.name} has vertices of the shape {list(vertices.shape)}, but the body has "
                f"{list(wanted)}. Choose the body of the data with --body: a model predicts one topology"
            )
        if not np.isfinite(vertices).all():
            raise RowProblem(number, "with NaN vertices", "vertices hold NaN or infinity")
        problem = unit_problem(float(np.ptp(vertices, axis=0).max()))
        if problem:
            raise ValueError(
                f"row {number} of {self.name} has vertices over {np.ptp(vertices, axis=0).max():.4g}; {problem}"
            )
        return vertices.astype(np.float32)

    def _check_directions(self) -> None:
        """Raises ValueError where most people stand on their heads."""
        # right and left ankle, top of the head
        standing = [
            person.joints_3d[13, 1] - person.joints_3d[[0, 5], 1].mean()
            for person in self.people
            if person.joints_3d is not None and (person.joints_3d[[0, 5, 13], 3] > 0).all()
        ]
        if standing and np.median(standing) > 0:
            raise ValueError(
                f"In most rows of {self.name} the head lies below the ankles: y seems to point up. y must grow "
                "downwards, as in images: change the signs of y and z of joints_3d and vertices"
            )
        own = signed_volume(self.body.template, self.body.faces)
        volumes = [
            signed_volume(one.vertices, self.body.faces) for one in self.people[:100] if one.vertices is not None
        ]
        # an open mesh of no volume tells nothing
        if volumes and abs(own) > LEAST_VOLUME and np.median(volumes) * np.sign(own) < -LEAST_VOLUME:
            raise ValueError(
                f"Most meshes of {self.name} are turned inside out: one axis is mirrored, and left and right with it. x must "
                "point to the right of the image, y down and z away from the camera: change the sign of one axis"
            )


def shown_size(cell: Mapping[str, Any] | None, number: int) -> tuple[int, int]:
    """Width and height of an undecoded image, turned as its file says; reads the file's head only.

    Raises:
        RowProblem: There is no image that can be read.
    """
    if cell is None or (cell.get("bytes") is None and cell.get("path") is None):
        raise RowProblem(number, "without an image", "no image")
    try:
        with Image.open(cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"])) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowProblem(number, "with a bad image", f"image: {error}") from error
    return (height, width) if turned else (width, height)


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """The volume in cubic metres inside a mesh `[V, 3]`; below 0 where its triangles look inwards."""
    first, second, third = np.moveaxis((vertices - vertices.mean(0))[faces], 1, 0)
    return float((first * np.cross(second, third)).sum() / 6)


class RowProblem(ValueError):
    """One row that cannot be used; `kind` is what a summary counts it as."""

    def __init__(self, number: int, kind: str, message: str):
        super().__init__(f"row {number} ({message})")
        self.kind = kind


def check_columns(names: Sequence[str], split: str) -> None:
    """Raises ValueError where columns are missing that every row needs."""
    missing = [name for name in ("image", "box") if name not in names]
    known = [name for name in ("vertices", "pose", "joints_3d", "joints_2d") if name in names]
    if missing or not known:
        raise ValueError(
            f"{split} has the columns {', '.join(names)}. Every row needs `image`, `box` ([x, y, width, height] in "
            "pixels) and one of `vertices` [V, 3], `pose` and `shape`, `joints_3d` [J, 4], `joints_2d` [J, 3]"
        )


def numbers(values: Any, number: int, name: str) -> np.ndarray:
    """A column of a row as an array.

    Raises:
        RowProblem: Its lists are of different lengths, or hold something else than numbers.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise RowProblem(number, f"with bad {name}", f"{name} is not an array of numbers") from error


def camera_of(values: Any, number: int) -> np.ndarray | None:
    """The camera (scale, x, y) of a row; None if there is none.

    Raises:
        RowProblem: It is not three finite numbers, the first above 0.
    """
    if values is None:
        return None
    camera = numbers(values, number, "camera")
    if camera.shape != (3,) or not np.isfinite(camera).all() or camera[0] <= 0:
        raise RowProblem(
            number, "with a bad camera", f"camera is (scale, x, y) with a scale above 0, got {camera.tolist()}"
        )
    return camera


def joints_of(values: Any, columns: int, number: int, name: str) -> np.ndarray | None:
    """Joints `[14, columns]` of a layout in `JOINT_LAYOUTS`, confidence last; None if there are none.

    Raises:
        ValueError: The confidence is missing, or the layout is unknown.
        RowProblem: A joint that counts is NaN.
    """
    if values is None:
        return None
    joints = numbers(values, number, name)
    axes = "x, y, z" if columns == 4 else "x, y"
    if joints.ndim == 2 and joints.shape[1] == columns - 1:
        raise ValueError(
            f"row {number}: {name} has {columns - 1} columns; the confidence is missing. Each joint is [{axes}, "
            "confidence]; write 1 where a joint is known and 0 where it is not"
        )
    if joints.ndim != 2 or joints.shape[1] != columns or len(joints) not in JOINT_LAYOUTS:
        raise ValueError(
            f"row {number}: {name} has the shape {list(joints.shape)}, but [J, {columns}] with J of "
            f"{', '.join(map(str, JOINT_LAYOUTS))} is read: METRO's 14, COCO's 17 or METRO's 24 joints"
        )
    layout = np.array(JOINT_LAYOUTS[len(joints)])
    found = np.where((layout >= 0)[:, None], joints[layout], 0.0)
    # what is not known may hold anything, but whether it is known may not
    if not np.isfinite(found[found[:, -1] > 0]).all() or np.isnan(found[:, -1]).any():
        raise RowProblem(number, f"with NaN {name}", f"{name} hold NaN or infinity")
    found[found[:, -1] <= 0] = 0.0
    return found


def check_metres(joints: np.ndarray, number: int) -> None:
    """Raises ValueError where joints `[N, 3]` of an adult are not metres."""
    if len(joints) < 10:
        return
    extent = float(np.ptp(joints, axis=0).max())
    problem = unit_problem(extent)
    if problem:
        raise ValueError(f"row {number}: joints_3d extend over {extent:.4g}; {problem}")


def check_sides(joints: np.ndarray, regressed: np.ndarray, number: int) -> None:
    """Raises ValueError where 3-D joints are not those of the mesh, naming swapped sides."""
    seen = joints[:, 3] > 0
    if seen.sum() < 3:
        return

    def apart(other: np.ndarray) -> float:
        difference = (joints[:, :3] - other)[seen]
        return float(np.linalg.norm(difference - difference.mean(0), axis=1).mean())

    distance = apart(regressed)
    if distance <= JOINT_TOLERANCE_METRES:
        return
    swapped = apart(regressed[list(SWAPPED_JOINTS)])
    why = "left and right are swapped" if swapped < distance / 2 else "they belong to another person or another frame"
    raise ValueError(
        f"row {number}: joints_3d lie {1000 * distance:.0f} mm from the joints of the row's own mesh on average; "
        f"{why}. Both must be metres in one frame, in the order of METRO's joints"
    )


# the joint of the other side, for each of the 14
SWAPPED_JOINTS = (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13)


def mean_vertices(split: MeshSplit, regressor: np.ndarray, limit: int = 500) -> np.ndarray | None:
    """The mean mesh of the first `limit` rows, those that have one, pelvis at 0, `[V, 3]`; None without any."""
    rows = range(min(limit, len(split)))
    if isinstance(split, GeneratedPeople):
        meshes = split.vertices(rows)
    else:
        meshes = np.array([mesh for row in rows if (mesh := split.person(row).vertices) is not None])
    return mean_body(meshes, regressor) if len(meshes) else None
