"""A closed smooth surface around a skeleton: rounded cones that melt into each other, meshed with surface nets.

Only additions, products, quotients and square roots of NumPy's elementwise operations decide about the topology, so that
every machine gets the same mesh. Sources: Gibson, "Constrained elastic surface nets", MICCAI 1998; Quilez, "Smooth
minimum", for the union.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cone:
    """A segment with a radius at each end.

    Attributes:
        start: First end, (x, y, z) in metres.
        end: Second end.
        radii: Radius at each end.
        depth: Factor on the extent along z: 0.7 is flatter than wide.
    """

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radii: tuple[float, float]
    depth: float = 1.0


def cone_distance(points: np.ndarray, cone: Cone) -> np.ndarray:
    """About the distance of points `[N, 3]` from the surface of a cone, negative inside, `[N]`."""
    squeeze = np.array([1.0, 1.0, 1.0 / cone.depth])
    start, end = np.array(cone.start) * squeeze, np.array(cone.end) * squeeze
    x, y, z = (points[:, axis] * squeeze[axis] - start[axis] for axis in range(3))
    ax, ay, az = end - start
    length = ax * ax + ay * ay + az * az
    along = np.clip((x * ax + y * ay + z * az) / length, 0.0, 1.0)
    dx, dy, dz = x - along * ax, y - along * ay, z - along * az
    radius = cone.radii[0] + along * (cone.radii[1] - cone.radii[0])
    return np.sqrt(dx * dx + dy * dy + dz * dz) - radius


def union_distance(points: np.ndarray, cones: Sequence[Cone], blend: float) -> np.ndarray:
    """The smooth union of cones symmetric in x: where two are closer than `blend` metres, the surface bridges the notch."""
    # both sides exactly alike, whatever the order of the cones
    points = points * np.array([0.0, 1.0, 1.0]) + np.abs(points) * np.array([1.0, 0.0, 0.0])
    total = cone_distance(points, cones[0])
    for cone in cones[1:]:
        other = cone_distance(points, cone)
        bridge = np.maximum(blend - np.abs(total - other), 0.0)
        total = np.minimum(total, other) - bridge * bridge / (4.0 * blend)
    return total


def surface_nets(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The zero surface of values on a grid `[X, Y, Z]`, negative inside.

    Returns:
        Vertices `[V, 3]` in grid steps, and quadrilaterals `[Q, 4]` that are seen counter-clockwise from outside, in a
        right-handed frame.
    """
    inside = values < 0
    corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    size = np.array(values.shape) - 1

    def corner(array: np.ndarray, offset: tuple[int, int, int]) -> np.ndarray:
        return array[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]

    number = sum(corner(inside, offset).astype(np.int64) for offset in corners)
    crossed: np.ndarray = np.asarray((number > 0) & (number < 8))
    cells = np.argwhere(crossed)
    index = np.full(crossed.shape, -1)
    index[crossed] = np.arange(len(cells))
    total, count = np.zeros((len(cells), 3)), np.zeros(len(cells))
    for first in corners:
        for axis in range(3):
            if first[axis]:
                continue
            second = np.array(first)
            second[axis] = 1
            a = values[tuple((cells + first).T)]
            b = values[tuple((cells + second).T)]
            cuts = (a < 0) != (b < 0)
            step = np.where(cuts, a / np.where(cuts, a - b, 1.0), 0.0)
            place = np.array(first, dtype=np.float64) + step[:, None] * np.eye(3)[axis]
            total += np.where(cuts[:, None], place, 0.0)
            count += cuts
    return cells + total / count[:, None], _net_quads(inside, index)


def _net_quads(inside: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A quadrilateral around each grid edge that the surface cuts; `index` has the vertex of each cell."""
    quads = []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        low = np.take(inside, range(inside.shape[axis] - 1), axis)
        high = np.take(inside, range(1, inside.shape[axis]), axis)
        for outward, edges in ((True, low & ~high), (False, ~low & high)):
            places = np.argwhere(edges)
            quad = []
            for du, dv in ((-1, -1), (0, -1), (0, 0), (-1, 0)):
                cell = places.copy()
                cell[:, u] += du
                cell[:, v] += dv
                quad.append(index[tuple(cell.T)])
            if not outward:
                quad.reverse()
            quads.append(np.stack(quad, 1))
    return np.concatenate(quads)


def halved(quads: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Two triangles for each quadrilateral `[Q, 4]`, along its shorter diagonal, `[2 Q, 3]`."""
    first, second = (
        np.linalg.norm(vertices[quads[:, a]] - vertices[quads[:, b]], axis=1) for a, b in ((0, 2), (1, 3))
    )
    # rounding decides about no tie
    turned = np.where((second < first - 1e-6)[:, None], np.roll(quads, -1, axis=1), quads)
    return np.concatenate((turned[:, [0, 1, 2]], turned[:, [0, 2, 3]]))


def edges_of(faces: np.ndarray) -> np.ndarray:
    """The edges of polygons `[F, K]`, each once, smaller index first, `[E, 2]`."""
    pairs = np.stack((faces, np.roll(faces, -1, axis=1)), -1).reshape(-1, 2)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def smoothed(values: np.ndarray, edges: np.ndarray, steps: int, amount: float = 0.5) -> np.ndarray:
    """Values of vertices `[V, C]` after moving `steps` times by `amount` towards the mean of their neighbours."""
    degree = np.bincount(edges.reshape(-1), minlength=len(values))[:, None]
    for _ in range(steps):
        sums = np.zeros_like(values)
        np.add.at(sums, edges[:, 0], values[edges[:, 1]])
        np.add.at(sums, edges[:, 1], values[edges[:, 0]])
        values = values + amount * (sums / degree - values)
    return values


def body_surface(cones: Sequence[Cone], blend: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """A closed mesh around cones that are symmetric in x, its vertices spread evenly.

    Args:
        cones: The parts.
        blend: See `union_distance`.
        step: Side of a grid cell in metres, about the length of an edge.

    Returns:
        Vertices `[V, 3]`, symmetric in x up to rounding, and triangles `[F, 3]`, seen counter-clockwise from outside in
        a right-handed frame.
    """
    ends = np.array([[cone.start, cone.end] for cone in cones]).reshape(-1, 3)
    reach = max(max(cone.radii) for cone in cones) + 2 * step
    halves = [np.ceil((np.abs(ends[:, 0]).max() + reach) / step)]
    # the middle of x lies inside a cell, so that both sides are alike
    axes = [(np.arange(2 * halves[0]) - halves[0] + 0.5) * step]
    for axis in (1, 2):
        low, high = ends[:, axis].min() - reach, ends[:, axis].max() + reach
        axes.append(low + np.arange(np.ceil((high - low) / step) + 1) * step)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    values = union_distance(grid.reshape(-1, 3), cones, blend).reshape(grid.shape[:3])
    vertices, quads = surface_nets(values)
    vertices = vertices * step + np.array([axis[0] for axis in axes])
    # the edges of quadrilaterals are alike on both sides, the diagonals are not
    edges = edges_of(quads)
    for _ in range(6):
        vertices = _onto_surface(smoothed(vertices, edges, 1), cones, blend)
    return vertices, halved(quads, vertices)


def _onto_surface(vertices: np.ndarray, cones: Sequence[Cone], blend: float) -> np.ndarray:
    """Vertices moved along the gradient to where the distance is 0 (Newton's method)."""
    tiny = 1e-4
    for _ in range(2):
        value = union_distance(vertices, cones, blend)
        sides = [
            [union_distance(vertices + sign * tiny * np.eye(3)[axis], cones, blend) for sign in (1, -1)]
            for axis in range(3)
        ]
        gradient = np.stack([(plus - minus) / (2 * tiny) for plus, minus in sides], 1)
        # at a crease the distance is not a smooth function, and a small step does
        vertices = vertices - gradient * (value / (gradient**2).sum(1).clip(0.25))[:, None]
    return vertices
