"""Anny (NAVER, Apache-2.0, assets CC0) as a body, and a user's own SMPL-like layer. Needs `hf_dropkey[body]` for Anny.

Anny: Brégier et al., "Human Mesh Modeling for Anny Body", 2025.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from ..extras import needed
from .bodies import JOINT_NAMES, nearby_regressor, procedural_body, rotation_matrices


logger = logging.getLogger(__name__)

# topologies of few vertices, whose caches are small and which need no download
ANNY_TOPOLOGIES = ("notoes_collapse3pc", "notoes_collapse5pc", "notoes_collapse10pc")
ANNY_DEFAULT = "notoes_collapse3pc"


class LayerBody:
    """A body made from a layer of the user's: anything whose result has `.vertices`, such as SMPL, SMPL-X or MHR layers.

    Nothing is read or downloaded here: the user makes the layer, under whatever licence its files have. That licence may
    reach networks trained with it.

    Args:
        layer: `layer(pose, shape)` with tensors `[N, ...]`; its result has `.vertices` `[N, V, 3]`.
        faces: Triangles `[F, 3]`.
        joint_regressor: `[17, V]`, rows as `JOINT_NAMES`.
        sample: `sample(count, generator)` gives arrays (pose, shape).
        rest: Pose and shape of the template, each `[1, ...]`.
        up: "y" or "z" for layers whose y or z points up, "-y" for layers in image axes.
        unit: Metres in a unit of the layer: 0.01 for centimetres.
    """

    # from each layer's axes to x right, y down, z away from the camera
    AXES = {
        "-y": np.eye(3),
        "y": np.diag([1.0, -1.0, -1.0]),
        "z": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]),
    }

    def __init__(
        self,
        layer: Callable[[torch.Tensor, torch.Tensor], Any],
        *,
        faces: Any,
        joint_regressor: Any,
        sample: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]],
        rest: tuple[np.ndarray, np.ndarray],
        up: str = "y",
        unit: float = 1.0,
    ):
        if up not in self.AXES:
            raise ValueError(f"up must be one of {', '.join(self.AXES)}, got {up!r}.")
        self.layer, self.sample = layer, sample
        self.turn, self.unit = self.AXES[up], unit
        self.faces = np.asarray(faces)
        self.joint_regressor = np.asarray(joint_regressor, dtype=np.float64)
        self.template = self.vertices(*rest)[0]

    @torch.no_grad()
    def vertices(self, pose: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """Meshes `[N, V, 3]` in metres, y down.

        Raises:
            ValueError: The layer's result has no vertices.
        """
        result = self.layer(torch.as_tensor(pose, dtype=torch.float32), torch.as_tensor(shape, dtype=torch.float32))
        found = getattr(result, "vertices", None)
        if found is None:
            raise ValueError(
                f"The layer returned {type(result).__name__}, which has no `.vertices` [N, V, 3]. Wrap it in a function "
                "that returns an object with them."
            )
        return np.asarray(found, dtype=np.float64) * self.unit @ self.turn.T

    def __call__(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]` and joints `[N, 17, 3]`."""
        vertices = self.vertices(pose, shape)
        return vertices, self.joint_regressor @ vertices


# --- Anny ------------------------------------------------------------------------------------------------------------

# Anny's bone for each bone of the procedural body, whose poses it takes; the person's left is Anny's L
ANNY_BONES = {
    "pelvis": "root", "spine": "spine03", "chest": "spine01", "neck": "neck01", "head": "head", "thigh": "upperleg01",
    "calf": "lowerleg01", "foot": "foot", "upper_arm": "upperarm01", "forearm": "lowerarm01", "hand": "wrist",
}  # fmt: skip
# adults: lowest and highest of each phenotype
PHENOTYPES = {
    "gender": (0.0, 1.0), "age": (0.55, 0.9), "muscle": (0.25, 0.75), "weight": (0.25, 0.75), "height": (0.25, 0.75),
    "proportions": (0.3, 0.8),
}  # fmt: skip
REST_PHENOTYPE = 0.6


class AnnyBody:
    """Anny as a body: 369 to 1,229 vertices, poses of the procedural body's 17 bones, six phenotypes as shape.

    The first build reads more than a thousand text files, which takes a minute, and writes 550 MB to `~/.cache/anny` or
    `ANNY_CACHE_DIR`; later ones take seconds. Nothing is downloaded: the assets (CC0) are in Anny's wheel.

    Args:
        topology: One of `ANNY_TOPOLOGIES`; the full mesh and SMPL-X's are not offered.

    Raises:
        ImportError: Anny is not installed.
        ValueError: The topology is none of the low ones.
    """

    def __init__(self, topology: str = ANNY_DEFAULT):
        if topology not in ANNY_TOPOLOGIES:
            raise ValueError(
                f"--body anny:{topology} is not offered. Choose anny:{' or anny:'.join(ANNY_TOPOLOGIES)}."
            )
        with needed("body"):
            import anny  # type: ignore[import-not-found,unused-ignore]  # optional, ships no types
        self.name = f"anny:{topology}"
        logger.info("making Anny's body; the first time it writes 550 MB to ANNY_CACHE_DIR or ~/.cache/anny")
        self.model = anny.Anny(topology=topology)
        # plain torch; the default compiles a kernel on first use
        self.model.set_skinning_method("lbs")
        self.poses = procedural_body()
        self.bones = [self.model.bone_labels.index(self._anny_name(name)) for name in self.poses.bones]
        self.faces = np.asarray(
            self.model.get_triangular_faces() if self.model.faces.shape[1] != 3 else self.model.faces
        )
        rest = self.pose_bodies(np.zeros((1, len(self.bones), 3)), np.full((1, len(PHENOTYPES)), REST_PHENOTYPE))
        self.template = rest[0][0]
        self.joint_regressor = self._fit_regressor(rest[1][0])

    @staticmethod
    def _anny_name(bone: str) -> str:
        """Anny's bone for one of the procedural body's."""
        side, _, rest = bone.partition("_")
        return f"{ANNY_BONES[rest]}.{side[0].upper()}" if side in ("left", "right") else ANNY_BONES[bone]

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random poses `[N, 17, 3]` and phenotypes `[N, 6]` of adults."""
        pose, _ = self.poses.sample(count, generator)
        low, high = np.array(list(PHENOTYPES.values())).T
        return pose, generator.uniform(low, high, (count, len(PHENOTYPES)))

    @torch.no_grad()
    def pose_bodies(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]` and heads of the bones `[N, B, 3]`, in metres, y down."""
        turn = LayerBody.AXES["z"]
        own = rotation_matrices(np.asarray(pose, dtype=np.float64) @ turn)
        matrices = np.tile(np.eye(4), (len(own), len(self.model.bone_labels), 1, 1))
        matrices[:, self.bones, :3, :3] = own
        phenotypes = {name: torch.from_numpy(np.ascontiguousarray(shape[:, i])) for i, name in enumerate(PHENOTYPES)}
        # the body is made in the precision of its template
        dtype = self.model.template_vertices.dtype
        found = self.model(
            pose_parameters=torch.from_numpy(matrices).to(dtype),
            phenotype_kwargs={name: value.to(dtype) for name, value in phenotypes.items()},
        )
        heads = found["bone_poses"][..., :3, 3]
        return found["vertices"].double().numpy() @ turn.T, heads.double().numpy() @ turn.T

    def __call__(self, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `[N, V, 3]`, and joints `[N, 17, 3]` as the regressor sees them."""
        vertices, _ = self.pose_bodies(pose, np.asarray(shape, dtype=np.float64))
        return vertices, self.joint_regressor @ vertices

    def _fit_regressor(self, rest: np.ndarray) -> np.ndarray:
        """Weights of vertices for each joint: of the bones' heads, and near the nose and the top of the head."""
        pose, shape = self.sample(48, np.random.default_rng(0))
        pose[:, 0] = 0.0
        vertices, heads = self.pose_bodies(pose, shape)
        of_bone = {
            "pelvis": "pelvis", "torso": "chest", "neck": "neck", "hip": "thigh", "knee": "calf", "ankle": "foot",
            "shoulder": "upper_arm", "elbow": "forearm", "wrist": "hand",
        }  # fmt: skip
        rows = []
        for name in JOINT_NAMES:
            if name in ("nose", "head"):
                vertex = self._vertex_of_head(0.0 if name == "head" else 1.0)
                target, place = vertices[:, vertex], self.template[vertex]
                rows.append(nearby_regressor(vertices, target, self.template, place, count=40))
                continue
            side, _, part = name.partition("_")
            bone = f"{side}_{of_bone[part]}" if part else of_bone[name]
            number = self.bones[self.poses.bones.index(bone)]
            rows.append(nearby_regressor(vertices, heads[:, number], self.template, rest[number], count=40))
        return np.stack(rows)

    def _vertex_of_head(self, forward: float) -> int:
        """The highest vertex of the head, or with `forward` 1 the one farthest in front."""
        above = self.template[:, 1] - self.template[:, 1].min() < 0.22
        score = forward * self.template[:, 2] + (1 - forward) * self.template[:, 1] + np.abs(self.template[:, 0])
        return int(np.where(above, score, np.inf).argmin())


@cache
def anny_body(topology: str = ANNY_DEFAULT) -> AnnyBody:
    """The one body of a topology in a process."""
    return AnnyBody(topology)
