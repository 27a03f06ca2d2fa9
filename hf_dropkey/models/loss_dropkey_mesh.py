"""The losses of METRO and MeshGraphormer. This file travels with checkpoints.

Sources: Lin et al., "End-to-End Human Pose and Mesh Reconstruction with Transformers", CVPR 2021, section 3.4, and
"Mesh Graphormer", ICCV 2021, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MeshTargets:
    """What a batch is compared with.

    Attributes:
        joints_3d: `[B, J, 4]`, x, y, z in metres and confidence.
        joints_2d: `[B, J, 3]`, x, y in [-1, 1] across the crop and confidence.
        vertices: `[B, V, 3]` in metres.
        has_joints_3d: `[B]`, 1 where a sample has 3-D joints.
        has_vertices: `[B]`, 1 where a sample has a mesh.
    """

    joints_3d: torch.Tensor
    joints_2d: torch.Tensor
    vertices: torch.Tensor
    has_joints_3d: torch.Tensor
    has_vertices: torch.Tensor


def project(points: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
    """Weak perspective: `s * (xy + t)` of points `[B, N, 3]` with cameras (s, tx, ty) `[B, 3]`, `[B, N, 2]`."""
    return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])


def selected_mean(values: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """The mean of `values` `[B, ...]` over the samples where `selected` `[B]` is not 0.

    Without any it is 0, with a path for gradients of zero, which data-parallel training counts on.
    """
    chosen = (selected != 0).to(values.dtype)
    means = values.flatten(1).mean(1)
    return (means * chosen).sum() / chosen.sum().clamp(min=1)


def centred(joints: torch.Tensor, hips: Sequence[int]) -> torch.Tensor:
    """Joints `[B, J, 3]` relative to the middle of the two joints `hips`."""
    middle = (joints[:, hips[0]] + joints[:, hips[1]]) / 2
    return joints - middle[:, None]


def joint_loss(
    joints: torch.Tensor, targets: torch.Tensor, selected: torch.Tensor, hips: Sequence[int]
) -> torch.Tensor:
    """Mean of confidence times squared difference, both sides relative to the middle of the hips.

    Args:
        joints: Predicted, `[B, J, 3]`.
        targets: `[B, J, 4]`, the confidence last.
        selected: `[B]`, the samples that count.
        hips: Positions of the two hips.
    """
    targets = torch.where((selected != 0)[:, None, None], targets, torch.zeros_like(targets))
    difference = centred(joints, hips) - centred(targets[..., :3], hips)
    return selected_mean(targets[..., 3:] * difference.square(), selected)


def vertex_loss(vertices: torch.Tensor, targets: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of `[B, V, 3]`; the prediction is not centred."""
    targets = torch.where((selected != 0)[:, None, None], targets, torch.zeros_like(targets))
    return selected_mean((vertices - targets).abs(), selected)


def keypoint_loss(joints: torch.Tensor, camera: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of confidence times squared difference of projected joints, all samples.

    Args:
        joints: Predicted, `[B, J, 3]`, not centred.
        camera: Predicted (s, tx, ty), `[B, 3]`.
        targets: `[B, J, 3]`: x, y in [-1, 1] and confidence.
    """
    seen = targets[..., 2:]
    # what nobody saw may hold anything
    positions = torch.where(seen > 0, targets[..., :2], torch.zeros_like(targets[..., :2]))
    return (seen * (project(joints, camera) - positions).square()).mean()


def body_mesh_losses(
    *,
    joints: torch.Tensor,
    mesh_joints: torch.Tensor,
    vertices: Sequence[torch.Tensor],
    camera: torch.Tensor,
    targets: MeshTargets,
    target_vertices: Sequence[torch.Tensor],
    hips: Sequence[int],
) -> dict[str, torch.Tensor]:
    """The seven losses before they are weighted, in float32 at least.

    Args:
        joints: Joint tokens, `[B, J, 3]`.
        mesh_joints: Joints regressed from the predicted full mesh, `[B, J, 3]`.
        vertices: Predicted meshes, coarse, middle and full, `[B, V_i, 3]`.
        camera: `[B, 3]`.
        targets: Joints and which samples have what.
        target_vertices: True meshes relative to their pelvis, as `vertices`.
        hips: Positions of the two hips among the joints.
    """
    names = ("vertices_coarse", "vertices_mid", "vertices_full")
    precise = torch.promote_types(joints.dtype, torch.float32)
    joints, mesh_joints, camera = (tensor.to(precise) for tensor in (joints, mesh_joints, camera))
    joints_3d, joints_2d = targets.joints_3d.to(precise), targets.joints_2d.to(precise)
    return {
        "joints_3d": joint_loss(joints, joints_3d, targets.has_joints_3d, hips),
        "mesh_joints_3d": joint_loss(mesh_joints, joints_3d, targets.has_joints_3d, hips),
        **{
            name: vertex_loss(found.to(precise), true.to(precise), targets.has_vertices)
            for name, found, true in zip(names, vertices, target_vertices, strict=True)
        },
        "joints_2d": keypoint_loss(joints, camera, joints_2d),
        "mesh_joints_2d": keypoint_loss(mesh_joints, camera, joints_2d),
    }
