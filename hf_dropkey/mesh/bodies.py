"""Body models: what makes a mesh from pose and shape. The procedural body is built in and free for any use.

Coordinates are metres: x to the right of the image, y down, z away from the camera. The rest pose faces the camera.
"""

from functools import cache
from typing import Any, Protocol

import numpy as np

from ..extras import needed
from .surface import Cone, body_surface, edges_of, smoothed


with needed("train"):
    from scipy.optimize import nnls
    from scipy.spatial import cKDTree

# rows of a joint regressor, in the order that METRO takes from Human3.6M
JOINT_NAMES = (
    "pelvis", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "torso", "neck", "nose",
    "head", "left_shoulder", "left_elbow", "left_wrist", "right_shoulder", "right_elbow", "right_wrist",
)  # fmt: skip
# the 14 that are predicted and evaluated, as rows of the regressor
JOINT_ROWS = (3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10)


# what vertices of a body may belong to, for clothes
PARTS = ("skin", "shirt", "trousers", "shoes", "hair")


Point = tuple[float, float, float]


class Body(Protocol):
    """What a body model must have. All arrays are NumPy's, in metres, y down.

    Attributes:
        faces: Triangles `[F, 3]`.
        template: The mesh in rest pose `[V, 3]`.
        joint_regressor: `[17, V]`, rows as `JOINT_NAMES`.
    """

    faces: np.ndarray
    template: np.ndarray
    joint_regressor: np.ndarray

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random poses and shapes of `count` persons."""

    def __call__(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]` and joints `[N, 17, 3]`."""


# --- rotations -------------------------------------------------------------------------------------------------------


def rotation_matrices(vectors: np.ndarray) -> np.ndarray:
    """Rotations by the length of each vector `[..., 3]` (radians) about its direction, `[..., 3, 3]` (Rodrigues)."""
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)
    safe = np.where(angle > 1e-8, angle, 1.0)
    sine = np.where(angle > 1e-8, np.sin(safe) / safe, 1.0)
    cosine = np.where(angle > 1e-8, (1 - np.cos(safe)) / safe**2, 0.5)
    return np.eye(3) + sine * cross + cosine * (cross @ cross)


def rotation_vectors(matrices: np.ndarray) -> np.ndarray:
    """The vectors of rotations `[..., 3, 3]`, lengths in [0, pi], `[..., 3]`; the inverse of `rotation_matrices`."""
    trace = np.trace(matrices, axis1=-2, axis2=-1)
    # the quaternion's largest element is never small; Shepperd's method
    diagonal = np.diagonal(matrices, axis1=-2, axis2=-1)
    squares = np.concatenate((trace[..., None], diagonal), -1)
    choice = squares.argmax(-1)
    m = matrices
    quaternions = np.stack(
        (
            np.stack((1 + trace, m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]), -1),
            np.stack((m[..., 2, 1] - m[..., 1, 2], 1 - trace + 2 * m[..., 0, 0], m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0]), -1),
            np.stack((m[..., 0, 2] - m[..., 2, 0], m[..., 0, 1] + m[..., 1, 0], 1 - trace + 2 * m[..., 1, 1], m[..., 1, 2] + m[..., 2, 1]), -1),
            np.stack((m[..., 1, 0] - m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1], 1 - trace + 2 * m[..., 2, 2]), -1),
        ),
        -2,
    )  # fmt: skip
    quaternion = np.take_along_axis(quaternions, choice[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    quaternion = np.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    sine = np.linalg.norm(quaternion[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., :1])
    return quaternion[..., 1:] * np.where(sine > 1e-12, angle / np.where(sine > 1e-12, sine, 1.0), 2.0)


# --- the procedural body ---------------------------------------------------------------------------------------------

# name, parent, joint, tip; x to the person's left, y up, z to the front, metres from the pelvis. Sides: left only
_CENTRE_BONES = (
    ("pelvis", "", (0.0, 0.0, 0.0), (0.0, 0.12, 0.0)),
    ("spine", "pelvis", (0.0, 0.12, 0.0), (0.0, 0.27, -0.01)),
    ("chest", "spine", (0.0, 0.27, -0.01), (0.0, 0.49, -0.015)),
    ("neck", "chest", (0.0, 0.49, -0.015), (0.0, 0.575, 0.0)),
    ("head", "neck", (0.0, 0.575, 0.0), (0.0, 0.79, 0.01)),
)
_SIDE_BONES = (
    ("thigh", "pelvis", (0.088, -0.05, 0.0), (0.105, -0.47, 0.005)),
    ("calf", "thigh", (0.105, -0.47, 0.005), (0.12, -0.875, -0.02)),
    ("foot", "calf", (0.12, -0.875, -0.02), (0.14, -0.93, 0.15)),
    ("upper_arm", "chest", (0.165, 0.435, -0.015), (0.365, 0.25, -0.02)),
    ("forearm", "upper_arm", (0.365, 0.25, -0.02), (0.55, 0.085, 0.005)),
    ("hand", "forearm", (0.55, 0.085, 0.005), (0.66, -0.015, 0.015)),
)
# left side and middle of the flesh, in the same frame: start, end, radii, depth
_FLESH = (
    ((-0.07, 0.0, -0.01), (0.07, 0.0, -0.01), (0.105, 0.105), 1.0),
    ((0.0, 0.04, -0.005), (0.0, 0.26, -0.005), (0.138, 0.138), 0.74),
    ((-0.055, 0.31, -0.01), (0.055, 0.31, -0.01), (0.112, 0.112), 0.88),
    ((-0.12, 0.42, -0.015), (0.12, 0.42, -0.015), (0.074, 0.074), 0.95),
    ((0.0, 0.44, -0.015), (0.0, 0.58, 0.0), (0.062, 0.054), 1.0),
    ((0.0, 0.615, 0.022), (0.0, 0.69, 0.0), (0.07, 0.092), 1.1),
    ((0.0, 0.625, 0.085), (0.0, 0.655, 0.085), (0.03, 0.024), 1.0),
    ((0.09, -0.05, -0.005), (0.105, -0.46, 0.005), (0.095, 0.058), 1.05),
    ((0.105, -0.46, 0.005), (0.12, -0.87, -0.02), (0.057, 0.038), 1.0),
    ((0.11, -0.53, -0.012), (0.113, -0.66, -0.012), (0.056, 0.05), 1.0),
    ((0.12, -0.89, -0.045), (0.145, -0.915, 0.15), (0.043, 0.036), 1.0),
    ((0.165, 0.435, -0.015), (0.365, 0.25, -0.02), (0.056, 0.043), 1.0),
    ((0.365, 0.25, -0.02), (0.55, 0.085, 0.005), (0.043, 0.031), 1.0),
    ((0.55, 0.085, 0.005), (0.645, 0.0, 0.015), (0.033, 0.034), 0.8),
)
BLEND = 0.045
# metres by which a joint may miss, against the length of its vector of weights; 0 leaves three vertices to a joint
SPREAD = 0.02
# degrees: mean, standard deviation, lowest, highest of a turn about x, y and z of the frame above, for the left side
_MOTION = {
    "pelvis": ((0, 8, -20, 20), (0, 40, -90, 90), (0, 7, -20, 20)),
    "spine": ((4, 8, -12, 30), (0, 8, -20, 20), (0, 6, -15, 15)),
    "chest": ((3, 6, -10, 20), (0, 8, -20, 20), (0, 5, -12, 12)),
    "neck": ((4, 8, -15, 25), (0, 12, -30, 30), (0, 6, -15, 15)),
    "head": ((2, 8, -15, 20), (0, 12, -30, 30), (0, 6, -12, 12)),
    "thigh": ((-14, 22, -85, 25), (0, 10, -25, 25), (4, 8, -8, 35)),
    "calf": ((22, 24, 0, 110), (0, 0, 0, 0), (0, 0, 0, 0)),
    "foot": ((0, 8, -20, 25), (0, 6, -15, 15), (0, 0, 0, 0)),
    "upper_arm": ((-8, 22, -80, 30), (-15, 25, -90, 30), (-22, 28, -46, 75)),
    "forearm": ((-20, 22, -100, 0), (-22, 22, -80, 0), (0, 0, 0, 0)),
    "hand": ((0, 8, -20, 20), (0, 8, -20, 20), (0, 8, -20, 20)),
}
# how much each bone follows a factor of the shape: length and girth
SHAPE_NAMES = ("height", "legs", "arms", "girth", "shoulders")
_SHAPE_SPREAD = (0.06, 0.04, 0.04, 0.11, 0.06)


def _to_camera(points: Any) -> np.ndarray:
    """From x left of the person, y up, z front to x right of the image, y down, z away: a half turn about x."""
    return np.asarray(points, dtype=np.float64) * np.array([1.0, -1.0, -1.0])


def _same(point: Point) -> Point:
    """The left side."""
    return point


def _mirrored(point: Point) -> Point:
    """The other side."""
    return -point[0], point[1], point[2]


class ProceduralBody:
    """An adult made of melted cones on 17 bones: a closed surface, linear blend skinning, no file, no licence.

    Pose: a rotation vector (radians) for each bone, `[N, 17, 3]`, the first one turning the whole body. Shape: five
    numbers `[N, 5]` around 0 (`SHAPE_NAMES`), each the logarithm of a factor.

    Args:
        step: About the length of an edge in metres; 0.036 gives 1,914 vertices.
    """

    name = "procedural"

    def __init__(self, step: float = 0.036):
        if not 0.02 <= step <= 0.04:
            raise ValueError(f"step must lie in [0.02, 0.04] metres, got {step}. Wider ones lose the wrists.")
        self._read_bones()
        vertices, faces = body_surface(_cones(), BLEND, step)
        # a half turn keeps the orientation of triangles
        self.template = _to_camera(vertices)
        self.faces = faces
        self.mirror = mirror_of(self.template)
        flipped = self.template[self.mirror] * np.array([-1.0, 1.0, 1.0])
        self.template = (self.template + flipped) / 2
        self.weights = self._skinning()
        self.parts = self._parts()
        self.joint_regressor = self._fit_regressor()

    def _read_bones(self) -> None:
        """Sets `bones`, `parents`, `joints`, `tips` from the tables."""
        rows = list(_CENTRE_BONES)
        for side, turn in (("left", _same), ("right", _mirrored)):
            for name, parent, joint, tip in _SIDE_BONES:
                own = parent if parent in ("pelvis", "chest") else f"{side}_{parent}"
                rows.append((f"{side}_{name}", own, turn(joint), turn(tip)))
        self.bones = [row[0] for row in rows]
        self.parents = [self.bones.index(row[1]) if row[1] else -1 for row in rows]
        self.joints = _to_camera([row[2] for row in rows])
        self.tips = _to_camera([row[3] for row in rows])

    def _skinning(self) -> np.ndarray:
        """Weights `[V, 17]`: each vertex follows its nearest bone, and near joints the next ones too."""
        along = self.tips - self.joints
        relative = self.template[:, None] - self.joints
        share = ((relative * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
        distance = np.linalg.norm(relative - share[..., None] * along, axis=-1)
        # shoulders and hips are wider than the bones beside them, which would take their flesh
        reach = np.ones(len(self.bones))
        for name, factor in (("pelvis", 1.9), ("chest", 1.5), ("head", 1.2)):
            reach[self.bones.index(name)] = factor
        hard = np.eye(len(self.bones))[(distance / reach).argmin(1)]
        soft = smoothed(hard, edges_of(self.faces), 7)
        soft = (soft + soft[self.mirror][:, self._other_side()]) / 2
        return soft / soft.sum(1, keepdims=True)

    def _parts(self) -> np.ndarray:
        """The number in `PARTS` of each vertex, `[V]`."""
        of_bone = {"thigh": "trousers", "calf": "trousers", "pelvis": "trousers", "foot": "shoes", "spine": "shirt",
                   "chest": "shirt", "upper_arm": "shirt"}  # fmt: skip
        names = [of_bone.get(name.removeprefix("left_").removeprefix("right_"), "skin") for name in self.bones]
        parts = np.array([PARTS.index(name) for name in names])[self.weights.argmax(1)]
        # the back and the top of the head; y points down and z away from the face
        _, y, z = (self.template - self.joints[self.bones.index("head")]).T
        hair = (self.weights.argmax(1) == self.bones.index("head")) & (y < -0.03) & (y + 0.11 < 0.9 * z + 0.03)
        parts[hair] = PARTS.index("hair")
        return parts

    def _other_side(self) -> list[int]:
        """The bone of the other side for each bone."""
        swap = {"left": "right", "right": "left"}
        return [
            self.bones.index(f"{swap[name.split('_')[0]]}_{name.partition('_')[2]}")
            if name.split("_")[0] in swap
            else number
            for number, name in enumerate(self.bones)
        ]

    def _fit_regressor(self) -> np.ndarray:
        """Non-negative weights of vertices for each joint, fitted to random bodies; rows sum to 1."""
        pose, shape = self.sample(48, np.random.default_rng(0))
        pose[:, 0] = 0.0
        vertices, joints = self.pose_bodies(pose, shape)
        rest = self.pose_bodies(np.zeros((1, len(self.bones), 3)), np.zeros((1, len(SHAPE_NAMES))))[1][0]
        rows = [nearby_regressor(vertices, joints[:, row], self.template, rest[row]) for row in range(len(rest))]
        return np.stack(rows)

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random poses `[N, 17, 3]` within what joints can do, and shapes `[N, 5]`."""
        drawn = generator.standard_normal((count, len(self.bones), 3))
        angles = np.zeros((count, len(self.bones), 3))
        for number, name in enumerate(self.bones):
            right = name.startswith("right_")
            motion = _MOTION[name.partition("_")[2] if right or name.startswith("left_") else name]
            for axis, (mean, spread, low, high) in enumerate(motion):
                value = np.clip(mean + spread * drawn[:, number, axis], low, high)
                # turns about y and z change sides
                angles[:, number, axis] = -value if right and axis else value
        # the tables' frame is a half turn about x from the camera's
        vectors = np.radians(angles) * np.array([1.0, -1.0, -1.0])
        shape = np.clip(generator.standard_normal((count, len(SHAPE_NAMES))), -2.5, 2.5) * np.array(_SHAPE_SPREAD)
        return vectors, shape

    def _factors(self, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Length and girth of each bone, `[N, 17]`."""
        height, legs, arms, girth, shoulders = np.exp(shape).T
        length = np.repeat(height[:, None], len(self.bones), axis=1)
        wide = np.repeat((height * girth)[:, None], len(self.bones), axis=1)
        for number, name in enumerate(self.bones):
            if name.endswith(("thigh", "calf")):
                length[:, number] *= legs
            elif name.endswith("arm"):
                length[:, number] *= arms
            elif name == "chest":
                wide[:, number] *= shoulders
            elif name.endswith(("head", "neck", "hand", "foot")):
                # heads, hands and feet hardly grow with the belly
                wide[:, number] = height * girth**0.2
        return length, wide

    def pose_bodies(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]` and true joints `[N, 17, 3]`."""
        turn = rotation_matrices(np.asarray(pose, dtype=np.float64))
        length, girth = self._factors(np.asarray(shape, dtype=np.float64))
        direction = self.tips - self.joints
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        outer = direction[:, :, None] * direction[:, None]
        stretch = length[..., None, None] * outer + girth[..., None, None] * (np.eye(3) - outer)
        world = np.empty_like(turn)
        places = np.empty(turn.shape[:3])
        for number, parent in enumerate(self.parents):
            if parent < 0:
                world[:, number], places[:, number] = turn[:, number], self.joints[number]
                continue
            world[:, number] = world[:, parent] @ turn[:, number]
            offset = self.joints[number] - self.joints[parent]
            reach = np.einsum("nij,njk,k->ni", world[:, parent], stretch[:, parent], offset)
            places[:, number] = places[:, parent] + reach
        linear = world @ stretch
        shift = places - np.einsum("nbij,bj->nbi", linear, self.joints)
        blended = np.einsum("vb,nbij->nvij", self.weights, linear, optimize=True)
        vertices = np.einsum("nvij,vj->nvi", blended, self.template) + np.einsum("vb,nbi->nvi", self.weights, shift)
        return vertices, self._named_joints(places, linear)

    def _named_joints(self, places: np.ndarray, linear: np.ndarray) -> np.ndarray:
        """The joints in the order of `JOINT_NAMES`, `[N, 17, 3]`."""
        head = self.bones.index("head")

        def on_head(point: tuple[float, float, float]) -> np.ndarray:
            return places[:, head] + linear[:, head] @ (_to_camera(point) - self.joints[head])

        found = {
            "pelvis": places[:, 0],
            "torso": places[:, self.bones.index("chest")],
            "neck": places[:, self.bones.index("neck")],
            "nose": on_head((0.0, 0.637, 0.085)),
            "head": on_head((0.0, 0.78, 0.0)),
        }
        of_bone = {"hip": "thigh", "knee": "calf", "ankle": "foot", "shoulder": "upper_arm", "elbow": "forearm",
                   "wrist": "hand"}  # fmt: skip
        for name in JOINT_NAMES:
            side, _, part = name.partition("_")
            if part:
                found[name] = places[:, self.bones.index(f"{side}_{of_bone[part]}")]
        return np.stack([found[name] for name in JOINT_NAMES], axis=1)

    def __call__(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]`, and joints `[N, 17, 3]` as the regressor sees them."""
        vertices, _ = self.pose_bodies(pose, shape)
        return vertices, self.joint_regressor @ vertices


def _cones() -> list[Cone]:
    """The flesh of both sides."""
    cones = []
    for start, end, radii, depth in _FLESH:
        cones.append(Cone(start, end, radii, depth))
        if start[0] > 0:
            cones.append(Cone(_mirrored(start), _mirrored(end), radii, depth))
    return cones


def mirror_of(template: np.ndarray, tolerance: float = 0.005) -> np.ndarray:
    """The vertex of the other side for each vertex of a template that is symmetric in x, `[V]`.

    Raises:
        ValueError: Some vertex has no counterpart within `tolerance` metres.
    """
    distance, partner = cKDTree(template).query(template * np.array([-1.0, 1.0, 1.0]))
    if distance.max() > tolerance or len(set(partner.tolist())) != len(template):
        raise ValueError(
            f"The template is not symmetric in x: vertex {int(distance.argmax())} is {1000 * distance.max():.0f} mm from "
            "any mirrored vertex. Mirror images of meshes need a symmetric topology; train with --flip_probability 0."
        )
    return np.asarray(partner)


def nearby_regressor(
    vertices: np.ndarray, joints: np.ndarray, template: np.ndarray, rest: np.ndarray, count: int = 60
) -> np.ndarray:
    """Non-negative weights `[V]`, summing to 1, of the `count` vertices nearest to a joint, that nearly give it in all samples.

    Three vertices can give a joint exactly. But the loss of a model's joints moves the vertices that have weight, and a few
    alone would leave the surface as spikes. So `SPREAD` trades some millimetres for weights on tens of vertices.

    Args:
        vertices: Samples `[N, V, 3]`.
        joints: The joint in each, `[N, 3]`.
        template: Rest pose `[V, 3]`.
        rest: The joint there, `[3]`.
        count: How many vertices may take part.
    """
    near = np.argsort(np.linalg.norm(template - rest, axis=1), kind="stable")[:count]
    matrix = (vertices[:, near] - joints[:, None]).transpose(0, 2, 1).reshape(-1, count)
    # a heavy row of ones holds the sum
    heavy = 1000.0 * np.abs(matrix).mean() * len(matrix) ** 0.5
    ridge = SPREAD * len(matrix) ** 0.5 * np.eye(count)
    wanted = np.append(np.zeros(len(matrix) + count), heavy)
    found, _ = nnls(np.vstack((matrix, ridge, np.full((1, count), heavy))), wanted)
    row = np.zeros(len(template))
    row[near] = found / found.sum()
    return row


@cache
def procedural_body(step: float = 0.036) -> ProceduralBody:
    """The one procedural body of a process; making it takes a second."""
    return ProceduralBody(step)
