"""Errors of body meshes in millimetres: MPVPE, MPJPE, PA-MPJPE and PA-MPVPE, beside those of the mean body.

All inputs are in metres. Sources: Lin et al., METRO, CVPR 2021, section 4.2; Gower, "Generalized Procrustes analysis",
Psychometrika 40, 1975, for the alignment.
"""

from collections.abc import Sequence

import numpy as np


MILLIMETRES = 1000.0
METRICS = ("mpvpe", "mpjpe", "pa_mpjpe", "pa_mpvpe")
PVE_T_REASON = (
    "PVE-T, the shape error in rest pose, needs a model that outputs the pose and shape parameters of a parametric body. "
    "METRO and MeshGraphormer output free vertices, which have no rest pose. Report MPVPE and PA-MPVPE instead."
)


def check_points(name: str, points: np.ndarray, count: int | None = None) -> np.ndarray:
    """`points` as float64.

    Raises:
        ValueError: They are not `[N, P, 3]`, or hold NaN or infinity.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 3 or points.shape[-1] != 3 or (count is not None and points.shape[1] != count):
        raise ValueError(f"{name} must have the shape [samples, {count or 'points'}, 3], got {list(points.shape)}.")
    bad = ~np.isfinite(points).all(axis=(1, 2))
    if bad.any():
        raise ValueError(
            f"{name} of sample {int(bad.argmax())} (of {int(bad.sum())} such samples) hold NaN or infinity. Errors of "
            "them would be meaningless; check the weights, or the data."
        )
    return points


def point_errors(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean distance of corresponding points of each sample, `[N]`, in the unit of the points `[N, P, 3]`."""
    return np.linalg.norm(predicted - true, axis=-1).mean(axis=-1)


def aligned(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """`predicted` moved onto `true` by the best rotation, scale and shift of each sample (Procrustes), `[N, P, 3]`.

    A reflection is never used. Where all predicted points of a sample coincide, they move to the middle of the true ones.
    """
    middles = [points.mean(axis=1, keepdims=True) for points in (predicted, true)]
    source, target = predicted - middles[0], true - middles[1]
    left, sizes, right = np.linalg.svd(source.transpose(0, 2, 1) @ target)
    # the last axis is turned over where the best orthogonal map would be a reflection
    signs = np.ones_like(sizes)
    signs[:, -1] = np.sign(np.linalg.det(left @ right))
    rotation = (left * signs[:, None]) @ right
    spread = (source**2).sum(axis=(1, 2))
    scale = np.divide((sizes * signs).sum(axis=-1), spread, out=np.zeros_like(spread), where=spread > 0)
    return scale[:, None, None] * source @ rotation + middles[1]


def relative_to(points: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """Points `[N, P, 3]` minus the mean of some joints `[N, J, 3]` of the same sample."""
    return points - joints.mean(axis=1, keepdims=True)


def body_mesh_errors(
    *,
    vertices: np.ndarray,
    true_vertices: np.ndarray,
    true_joints: np.ndarray,
    has_vertices: np.ndarray,
    has_joints_3d: np.ndarray,
    joint_regressor: np.ndarray,
    joint_rows: Sequence[int],
    hips: Sequence[int],
    pelvis_row: int = 0,
) -> dict[str, np.ndarray]:
    """Errors of each sample in millimetres.

    Predicted joints are regressed from the predicted mesh, as in METRO. The official PA-MPJPE counts all samples; here
    too it counts those without 3-D joints only where `has_joints_3d` says so, because their joints are zeros.

    Args:
        vertices: Predicted meshes `[N, V, 3]`.
        true_vertices: True meshes `[N, V, 3]`; of samples without one, anything.
        true_joints: True joints `[N, J, 3]`.
        has_vertices: `[N]`, nonzero where a sample has a mesh.
        has_joints_3d: `[N]`, nonzero where a sample has 3-D joints.
        joint_regressor: `[R, V]`.
        joint_rows: The rows of the J joints.
        hips: Positions of the two hips among the J joints.
        pelvis_row: The row at which meshes are centred.

    Returns:
        `mpvpe` and `pa_mpvpe` of the samples with a mesh, `mpjpe` and `pa_mpjpe` of those with 3-D joints, in order.

    Raises:
        ValueError: Arrays do not fit each other, or hold NaN.
    """
    regressor = np.asarray(joint_regressor, dtype=np.float64)
    vertices = check_points("Predicted vertices", vertices, regressor.shape[1])
    with_mesh, with_joints = np.asarray(has_vertices) != 0, np.asarray(has_joints_3d) != 0
    joints = regressor[list(joint_rows)] @ vertices
    wanted = check_points("True joints", np.asarray(true_joints)[with_joints], len(joint_rows))
    found = joints[with_joints]
    hips = list(hips)
    errors = {
        "mpjpe": point_errors(relative_to(found, found[:, hips]), relative_to(wanted, wanted[:, hips])),
        "pa_mpjpe": point_errors(aligned(found, wanted), wanted),
    }
    true = check_points("True vertices", np.asarray(true_vertices)[with_mesh], regressor.shape[1])
    meshes = vertices[with_mesh]
    pelvis = regressor[[pelvis_row]]
    errors["mpvpe"] = point_errors(relative_to(meshes, pelvis @ meshes), relative_to(true, pelvis @ true))
    errors["pa_mpvpe"] = point_errors(aligned(meshes, true), true)
    return {name: MILLIMETRES * errors[name] for name in METRICS}


def mean_errors(errors: dict[str, np.ndarray], prefix: str = "") -> dict[str, float]:
    """The mean of each error; a metric without a sample is left out."""
    return {f"{prefix}{name}": float(values.mean()) for name, values in errors.items() if len(values)}


def mean_body(vertices: np.ndarray, joint_regressor: np.ndarray, pelvis_row: int = 0) -> np.ndarray:
    """The mean of training meshes `[N, V, 3]` relative to their pelvises, `[V, 3]`: what any model must beat.

    Raises:
        ValueError: There is no mesh.
    """
    if not len(vertices):
        raise ValueError("The mean body needs one mesh at least, and no row of the training data has one.")
    vertices = np.asarray(vertices, dtype=np.float64)
    pelvis = np.asarray(joint_regressor, dtype=np.float64)[[pelvis_row]]
    return (vertices - pelvis @ vertices).mean(axis=0)


def check_metric(name: str) -> str:
    """`name`, a metric that can be computed.

    Raises:
        ValueError: It is unknown, or PVE-T, with the reason.
    """
    plain = name.lower().replace("-", "_")
    if plain in ("pve_t", "pvet"):
        raise ValueError(PVE_T_REASON)
    # two other names of the same error
    plain = {"pve": "mpvpe", "mve": "mpvpe"}.get(plain, plain)
    if plain not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. Known: {', '.join(METRICS)}.")
    return plain
