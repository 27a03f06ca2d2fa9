"""Pictures of body meshes: over the photograph, from the side, joints; and meshes as OBJ and GLB files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..extras import needed
from .data import SWAPPED_JOINTS
from .renderer import project_points, render


# of the 14 joints: right ankle, knee, hip, left hip, knee, ankle, right wrist, elbow, shoulder, left the same, neck, head
BONES = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 12), (9, 12), (9, 10), (10, 11), (12, 13))
RIGHT, LEFT, MIDDLE = (214, 90, 60), (60, 120, 214), (90, 160, 90)
BODY_COLOR = (0.66, 0.76, 0.92)
TRUE_COLOR = (0.72, 0.84, 0.66)
PAPER = 1.0


def overlay(
    image: Image.Image,
    meshes: Sequence[np.ndarray],
    faces: np.ndarray,
    cameras: Sequence[np.ndarray],
    *,
    color: tuple[float, float, float] = BODY_COLOR,
    opacity: float = 0.9,
) -> Image.Image:
    """Meshes drawn over a photograph, the farthest person first.

    Args:
        image: The photograph.
        meshes: `[V, 3]` each, metres.
        faces: `[F, 3]`.
        cameras: (scale, x, y) of each mesh, in pixels of the photograph.
        color: Of the meshes, [0, 1].
        opacity: Of the meshes, [0, 1].
    """
    picture = np.asarray(image.convert("RGB")) / 255.0
    # under weak perspective a smaller scale is farther away
    for index in sorted(range(len(meshes)), key=lambda number: cameras[number][0]):
        drawn = render(meshes[index], faces, cameras[index], picture.shape[:2], colors=color, antialias=2)
        picture = opacity * drawn.over(picture) + (1 - opacity) * picture
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def alone(
    vertices: np.ndarray,
    faces: np.ndarray,
    size: int,
    *,
    turn: float = 0.0,
    color: tuple[float, float, float] = BODY_COLOR,
    reach: float | None = None,
) -> Image.Image:
    """A mesh on white paper, turned by `turn` degrees about the vertical axis; 90 is a view from its side.

    `reach` metres from the middle of the mesh fill half the picture; None fits the mesh.
    """
    cosine, sine = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    middle = (vertices.min(0) + vertices.max(0)) / 2
    turned = (vertices - middle) @ np.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]]).T
    reach = 1.1 * float(np.abs(turned[:, :2]).max()) if reach is None else reach
    camera = np.array([size / 2 / reach, size / 2, size / 2])
    drawn = render(turned, faces, camera, (size, size), colors=color, antialias=2)
    return Image.fromarray((drawn.over(np.full((size, size, 3), PAPER)).clip(0, 1) * 255).round().astype(np.uint8))


def with_joints(image: Image.Image, joints: np.ndarray) -> Image.Image:
    """A copy of an image with the 14 joints `[14, 2]` (pixels) and their bones: right red, left blue."""
    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    width = max(1, round(max(drawn.size) / 120))
    right = {number for number in range(len(SWAPPED_JOINTS)) if number in (0, 1, 2, 6, 7, 8)}
    left = {SWAPPED_JOINTS[number] for number in right}

    def color(*ends: int) -> tuple[int, int, int]:
        if right.issuperset(ends) or (right & set(ends) and not left & set(ends)):
            return RIGHT
        return LEFT if left & set(ends) and not right & set(ends) else MIDDLE

    for first, second in BONES:
        pen.line([tuple(joints[first]), tuple(joints[second])], fill=color(first, second), width=width)
    for number, (x, y) in enumerate(joints):
        pen.ellipse([x - width, y - width, x + width, y + width], fill=color(number))
    return drawn


def sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, side: int = 192, gap: int = 6
) -> Image.Image:
    """Pictures in rows of equal squares, with a title above each column."""
    head = 16
    width = len(titles) * (side + gap) + gap
    paper = Image.new("RGB", (width, head + len(rows) * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(paper)
    for column, title in enumerate(titles):
        pen.text((gap + column * (side + gap), 4), title, fill="black")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            place = (gap + column * (side + gap), head + gap + number * (side + gap))
            paper.paste(picture.resize((side, side), Image.Resampling.BICUBIC), place)
    return paper


def prediction_row(
    image: Image.Image,
    vertices: np.ndarray,
    camera: np.ndarray,
    joints: np.ndarray,
    faces: np.ndarray,
    true_vertices: np.ndarray | None,
    *,
    side: int = 192,
) -> list[Image.Image]:
    """An image, its joints, its mesh in place and from the side, and the true mesh from the side.

    Args:
        image: A square crop.
        vertices: Predicted `[V, 3]`.
        camera: (scale, x, y) in pixels of the crop.
        joints: Predicted `[14, 3]`.
        faces: `[F, 3]`.
        true_vertices: `[V, 3]`, None where the row has none.
        side: Of each picture in pixels.
    """
    factor = side / image.width
    large = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    wide = np.asarray(camera) * factor
    pictures = [
        large,
        with_joints(large, project_points(joints, wide)),
        overlay(large, [vertices], faces, [wide]),
        alone(vertices, faces, side, turn=90, reach=1.1),
    ]
    if true_vertices is not None:
        pictures.append(alone(true_vertices, faces, side, turn=90, color=TRUE_COLOR, reach=1.1))
    return pictures


PREDICTION_TITLES = ("image", "joints", "mesh", "from the side", "true, from the side")


# --- files -----------------------------------------------------------------------------------------------------------


def write_obj(file: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A mesh as a Wavefront OBJ file, y up, as viewers expect: a half turn about x from the model's axes."""
    turned = np.asarray(vertices, dtype=np.float64) * np.array([1.0, -1.0, -1.0])
    lines = ["# metres, y up", *(f"v {x:.5f} {y:.5f} {z:.5f}" for x, y, z in turned)]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_glb(file: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A mesh as a binary glTF file, y up.

    Raises:
        ImportError: trimesh is not installed.
    """
    with needed("body"):
        import trimesh  # type: ignore[import-not-found,unused-ignore]  # optional
    turned = np.asarray(vertices, dtype=np.float64) * np.array([1.0, -1.0, -1.0])
    trimesh.Trimesh(turned, faces, process=False).export(file)
