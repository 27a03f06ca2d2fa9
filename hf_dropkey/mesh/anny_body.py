"""Anny (NAVER, Apache-2.0, assets CC0) as a body, and a user's own SMPL-like layer. Needs `hf_dropkey[body]` for Anny.

Anny: Brégier et al., "Human Mesh Modeling for Anny Body", 2025.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch


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


@cache
def anny_body(topology: str = ANNY_DEFAULT) -> Any:
    raise NotImplementedError
