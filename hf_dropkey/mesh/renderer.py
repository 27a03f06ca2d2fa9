"""A z-buffer in NumPy: draws triangles with smooth shading, the same on every machine, without OpenGL."""

import functools
from dataclasses import dataclass

import numpy as np


# light that comes from everywhere, and what the lamp adds
AMBIENT = 0.35
DIFFUSE = 0.65
# fragments drawn at once, which bounds memory
FRAGMENTS = 2**22


@dataclass(frozen=True)
class Rendering:
    """A drawn mesh.

    Attributes:
        color: `[H, W, 3]` in [0, 1], 0 where nothing was drawn.
        coverage: `[H, W]`, fraction of each pixel that the mesh covers.
        depth: `[H, W]`, z of the nearest surface, infinite where there is none; without antialiasing.
    """

    color: np.ndarray
    coverage: np.ndarray
    depth: np.ndarray

    def over(self, background: np.ndarray) -> np.ndarray:
        """The mesh in front of an image `[H, W, 3]` in [0, 1]."""
        return self.color + background * (1 - self.coverage[..., None])


def project_points(points: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Pixels `[N, 2]` of points `[N, 3]` by a camera (scale, x, y): `scale * xy + (x, y)`."""
    return camera[0] * points[:, :2] + np.asarray(camera[1:])


def crop_camera(camera: np.ndarray, size: int) -> np.ndarray:
    """The camera (scale, x, y) in pixels of a model's camera (s, tx, ty) on a crop of `size` pixels."""
    s, tx, ty = camera
    half = size / 2
    return np.array([half * s, half * (1 + s * tx), half * (1 + s * ty)])


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals of vertices `[V, 3]`, the area-weighted mean of the triangles around; outwards where faces turn so."""
    corners = vertices[faces]
    of_faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    # one axis after the other: numpy's `add.at` on rows of three takes ten times as long
    places, count = faces.T.reshape(-1), len(vertices)
    sums = np.stack([np.bincount(places, np.tile(axis, 3), count) for axis in of_faces.T], axis=1)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)


def render(
    vertices: np.ndarray,
    faces: np.ndarray,
    camera: np.ndarray,
    size: tuple[int, int],
    *,
    colors: np.ndarray | tuple[float, float, float] = (0.75, 0.78, 0.85),
    light: tuple[float, float, float] = (-0.4, -0.6, -0.7),
    antialias: int = 1,
) -> Rendering:
    """Draws a mesh under weak perspective.

    Args:
        vertices: `[V, 3]`: x right, y down, z away from the camera.
        faces: Triangles `[F, 3]`; which way they turn decides about nothing but outward normals.
        camera: (scale, x, y): a point is drawn at pixel `scale * xy + (x, y)`; pixel i covers [i, i + 1).
        size: Height and width of the image.
        colors: Of each vertex `[V, 3]`, or one for all, in [0, 1].
        light: Where the lamp is, as seen from the body.
        antialias: Samples along each side of a pixel.

    Raises:
        ValueError: Vertices hold NaN or infinity, or triangles name vertices that there are not.
    """
    vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
    if not np.isfinite(vertices).all():
        raise ValueError("The vertices to draw hold NaN or infinity.")
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError(
            f"The triangles name vertices from {faces.min()} to {faces.max()}, but there are {len(vertices)}."
        )
    height, width = (side * antialias for side in size)
    normals = vertex_normals(vertices, faces)
    lamp = np.asarray(light, dtype=np.float64) / np.linalg.norm(light)
    shade = AMBIENT + DIFFUSE * (normals @ lamp).clip(0, 1)
    painted = np.broadcast_to(np.asarray(colors, dtype=np.float64), vertices.shape) * shade[:, None]
    pixels = project_points(vertices, np.asarray(camera, dtype=np.float64) * antialias)
    pixel, depth, face, weights = _nearest(np.column_stack((pixels, vertices[:, 2])), faces, (height, width))
    color = np.zeros((height * width, 3))
    # sums over three corners, written out: numpy reduces so short an axis slowly
    color[pixel] = sum(painted[faces[face, corner]] * weights[:, corner, None] for corner in range(3))
    drawn, far = np.zeros(height * width), np.full(height * width, np.inf)
    drawn[pixel], far[pixel] = 1.0, depth

    def shrunk(values: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        blocks = values.reshape(size[0], antialias, size[1], antialias, *values.shape[1:])
        samples = [blocks[:, row, :, column] for row in range(antialias) for column in range(antialias)]
        return functools.reduce(reduce, samples)

    area = antialias**2
    return Rendering((shrunk(color, np.add) / area).clip(0, 1), shrunk(drawn, np.add) / area, shrunk(far, np.minimum))


def _nearest(
    points: np.ndarray, faces: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is seen in each pixel that anything covers: pixel, depth, triangle, weights of its corners."""
    height, width = size
    corners = points[faces]
    # pixels whose centres may lie in the triangle
    first, second, third = (corners[:, corner, :2] for corner in range(3))
    low = np.ceil(np.minimum(np.minimum(first, second), third) - 0.5).clip(0).astype(np.int64)
    high = np.floor(np.maximum(np.maximum(first, second), third) - 0.5)
    high = np.minimum(high, [width - 1, height - 1]).astype(np.int64)
    extent = (high - low + 1).max(1)
    visible = ((high >= low).all(1)) & (extent > 0)
    found = []
    side = 1
    while visible.any() and side < 2 * max(height, width):
        # triangles grouped by the side of a square that holds them
        chosen = np.flatnonzero(visible & (extent <= side) & (extent > side // 2))
        for start in range(0, len(chosen), max(1, FRAGMENTS // side**2)):
            found.append(
                _fragments(corners, low, high, chosen[start : start + max(1, FRAGMENTS // side**2)], side, width)
            )
        side *= 2
    if not found:
        return np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), np.empty((0, 3))
    pixel, depth, face, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    nearest = np.full(height * width, np.inf)
    np.minimum.at(nearest, pixel, depth)
    candidates = np.flatnonzero(depth == nearest[pixel])
    # of equally near triangles the one with the smallest number, so that ties have one answer
    order = candidates[np.lexsort((face[candidates], pixel[candidates]))]
    order = order[np.append(True, pixel[order][1:] != pixel[order][:-1])] if len(order) else order
    return pixel[order], depth[order], face[order], weights[order]


def _fragments(
    corners: np.ndarray, low: np.ndarray, high: np.ndarray, chosen: np.ndarray, side: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pixels that the triangles `chosen` cover: pixel, depth, triangle, weights of its corners."""
    steps = np.arange(side)
    x = low[chosen, 0, None, None] + steps
    y = low[chosen, 1, None, None] + steps[:, None]
    a, b, c = (corners[chosen, corner, :, None, None] for corner in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    px, py = x + 0.5, y + 0.5
    safe = np.where(area == 0, 1.0, area)
    wb = ((px - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (py - a[:, 1])) / safe
    wc = ((b[:, 0] - a[:, 0]) * (py - a[:, 1]) - (px - a[:, 0]) * (b[:, 1] - a[:, 1])) / safe
    wa = 1 - wb - wc
    inside = (wa >= 0) & (wb >= 0) & (wc >= 0) & (area != 0)
    inside &= (x <= high[chosen, 0, None, None]) & (y <= high[chosen, 1, None, None])
    number, row, column = np.nonzero(inside)
    weights = np.stack((wa[inside], wb[inside], wc[inside]), 1)
    near = corners[chosen[number], :, 2]
    depth = sum(weights[:, corner] * near[:, corner] for corner in range(3))
    pixel = (low[chosen[number], 1] + row) * width + low[chosen[number], 0] + column
    return pixel, depth, chosen[number], weights
