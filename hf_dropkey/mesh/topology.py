"""What a checkpoint holds of a body: three resolutions of its mesh, the ways between them, and checks of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..extras import needed
from .bodies import JOINT_NAMES, Body
from .surface import edges_of


with needed("train"):
    from scipy.spatial import cKDTree

NEIGHBOURS = 3
# the maps to finer meshes are fitted to this many bodies; metres by which they may miss, against the change of a row
FITTED_BODIES, FIT_RIDGE = 300, 0.01
# an adult in metres, from small and bent to tall with raised arms
BODY_EXTENT = (0.5, 3.0)


@dataclass(frozen=True)
class Topology:
    """A body's mesh at three resolutions.

    Attributes:
        template: Full mesh in rest pose `[V, 3]`.
        faces: Triangles `[F, 3]`.
        joint_regressor: `[R, V]`.
        downsampling: Full to middle `[mid, V]`, middle to coarse `[coarse, mid]`.
        upsampling: Coarse to middle `[mid, coarse]`, middle to full `[V, mid]`: first weights of the learned maps.
        adjacency: Coarse vertices and their neighbours, rows sum to 1, `[coarse, coarse]`.
    """

    template: np.ndarray
    faces: np.ndarray
    joint_regressor: np.ndarray
    downsampling: tuple[np.ndarray, np.ndarray]
    upsampling: tuple[np.ndarray, np.ndarray]
    adjacency: np.ndarray

    @property
    def num_vertices(self) -> list[int]:
        """Vertices of the coarse, the middle and the full mesh."""
        return [len(self.downsampling[1]), len(self.downsampling[0]), len(self.template)]

    def tensors(self) -> dict[str, Any]:
        """The arguments of `DropKeyMeshForBodyMesh.set_body`."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

        return {
            "template": tensor(self.template),
            "faces": torch.from_numpy(self.faces.astype(np.int64)),
            "joint_regressor": tensor(self.joint_regressor),
            "downsampling": [tensor(one) for one in self.downsampling],
            "upsampling": [tensor(one) for one in self.upsampling],
            "adjacency": tensor(self.adjacency),
        }


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` points of `[N, 3]`, each the farthest from those before it, `[count]`."""
    chosen = np.empty(count, dtype=np.int64)
    # the first one is the farthest from the middle; steps of a nanometre keep rounding from deciding
    distance = np.linalg.norm(points - points.mean(0), axis=1).round(9)
    chosen[0] = distance.argmax()
    nearest = np.full(len(points), np.inf)
    for number in range(1, count):
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[number - 1]], axis=1).round(9))
        chosen[number] = nearest.argmax()
    return chosen


def interpolation(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Inverse-distance weights of the `NEIGHBOURS` nearest sources `[S, 3]` for each target `[T, 3]`, `[T, S]`."""
    count = min(NEIGHBOURS, len(sources))
    distance, index = cKDTree(sources).query(targets, k=list(range(1, count + 1)))
    weight = 1.0 / distance.clip(1e-6)
    matrix = np.zeros((len(targets), len(sources)))
    np.put_along_axis(matrix, index, weight / weight.sum(1, keepdims=True), axis=1)
    return matrix


def fitted_map(start: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The linear map of vertices near `start` `[T, S]` that gives the finer meshes of sampled bodies, `[T, S]`.

    A mean of three coarse vertices lies inside the body, and beside another limb where limbs are near each other in rest.
    Ridge regression finds what the vertices of posed bodies have in common.

    Args:
        start: Interpolation weights.
        sources: Coarser meshes `[N, S, 3]`, pelvis at 0.
        targets: The finer meshes of the same bodies, `[N, T, 3]`.
    """
    # each axis of each body is a sample
    known, wanted = (meshes.transpose(0, 2, 1).reshape(-1, meshes.shape[1]) for meshes in (sources, targets))
    gram = known.T @ known + FIT_RIDGE**2 * len(known) * np.eye(known.shape[1])
    change: np.ndarray = np.linalg.solve(gram, known.T @ (wanted - known @ start.T)).T
    return start + change


def coarse_adjacency(template: np.ndarray, faces: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Which coarse points `[C, 3]` have touching regions on the full mesh, with themselves, rows sum to 1."""
    region = cKDTree(coarse).query(template)[1]
    touching = np.eye(len(coarse))
    pairs = region[edges_of(faces)]
    touching[pairs[:, 0], pairs[:, 1]] = touching[pairs[:, 1], pairs[:, 0]] = 1.0
    return touching / touching.sum(1, keepdims=True)


def make_topology(body: Body, levels: Sequence[int]) -> Topology:
    """Three resolutions of a body's mesh.

    Args:
        body: The body.
        levels: Vertices of the coarse and of the middle mesh.

    Raises:
        ValueError: The body cannot be right (`check_body`), or the levels do not fit its mesh.
    """
    template, faces = np.asarray(body.template, dtype=np.float64), np.asarray(body.faces)
    regressor = np.asarray(body.joint_regressor, dtype=np.float64)
    check_body(template, faces, regressor)
    coarse, middle = levels
    if not 1 <= coarse <= middle <= len(template):
        raise ValueError(
            f"--mesh_levels {coarse} {middle} must grow from the coarse mesh to at most the {len(template)} vertices of "
            "the body."
        )
    order = farthest_points(template, middle)
    # the coarse points are the first of the middle ones
    down = (np.eye(len(template))[order], np.eye(middle)[:coarse])
    points = template[order]
    meshes, _ = body(*body.sample(FITTED_BODIES, np.random.default_rng(0)))
    meshes = meshes - regressor[:1] @ meshes
    fine = meshes[:, order]
    up = (
        fitted_map(interpolation(points[:coarse], points), fine[:, :coarse], fine),
        fitted_map(interpolation(points, template), fine, meshes),
    )
    return Topology(template, faces, regressor, down, up, coarse_adjacency(template, faces, points[:coarse]))


# --- checks ----------------------------------------------------------------------------------------------------------


def unit_problem(extent: float) -> str | None:
    """What is wrong with the largest extent of a body, which should be metres; None if nothing is."""
    low, high = BODY_EXTENT
    if low <= extent <= high:
        return None
    for unit, factor in (("centimetres", 100), ("millimetres", 1000)):
        if low * factor <= extent <= high * factor:
            return f"it looks like {unit}. Divide by {factor}: metres are expected"
    return f"an adult in metres has between {low} and {high}"


def check_body(template: np.ndarray, faces: np.ndarray, joint_regressor: np.ndarray) -> None:
    """Raises ValueError for a body that cannot be right: shapes, NaN, units, direction of y, left and right."""
    if template.ndim != 2 or template.shape[1] != 3 or not np.isfinite(template).all():
        raise ValueError(f"A body's template must be finite and [V, 3], got {list(template.shape)}.")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.min() < 0 or faces.max() >= len(template):
        raise ValueError(
            f"A body's faces must be triangles [F, 3] of vertices 0 to {len(template) - 1}, got {list(faces.shape)} "
            f"from {faces.min()} to {faces.max()}."
        )
    if joint_regressor.shape != (len(JOINT_NAMES), len(template)):
        raise ValueError(
            f"A body's joint_regressor must be [{len(JOINT_NAMES)}, {len(template)}], one row for each of "
            f"{', '.join(JOINT_NAMES)}; got {list(joint_regressor.shape)}."
        )
    sums = joint_regressor.sum(1)
    if np.abs(sums - 1).max() > 1e-3:
        raise ValueError(
            f"Each row of a joint regressor must sum to 1; the row of {JOINT_NAMES[int(np.abs(sums - 1).argmax())]} "
            f"sums to {sums[np.abs(sums - 1).argmax()]:.4g}."
        )
    extent = float(np.ptp(template, axis=0).max())
    problem = unit_problem(extent)
    if problem:
        raise ValueError(f"A body's template extends over {extent:.4g}; {problem}.")
    joint = dict(zip(JOINT_NAMES, joint_regressor @ template, strict=True))
    _check_directions(joint)


def _check_directions(joint: dict[str, np.ndarray]) -> None:
    """Raises ValueError where a rest pose stands on its head, or left and right are swapped."""
    ankles = (joint["left_ankle"] + joint["right_ankle"]) / 2
    down = ankles - joint["head"]
    if down[1] < 0.7 * np.linalg.norm(down):
        raise ValueError(
            f"A body's head lies at {joint['head'].round(2).tolist()} and its ankles at {ankles.round(2).tolist()}, but "
            "the rest pose must stand upright along y, and y must grow downwards, as in images. Where y points up, change "
            "the signs of y and z; where z does, (x, y, z) becomes (x, -z, y)."
        )
    up = joint["head"] - joint["pelvis"]
    front = joint["nose"] - (joint["head"] + joint["neck"]) / 2
    left = np.cross(up, front)
    for name in ("shoulder", "hip"):
        if (joint[f"left_{name}"] - joint[f"right_{name}"]) @ left < 0:
            raise ValueError(
                f"A body's left {name} lies on the right of a person who looks where the nose points. The rows of the "
                f"joint regressor must be {', '.join(JOINT_NAMES)}; swap its left and right rows, or undo a mirroring "
                "of one axis."
            )
