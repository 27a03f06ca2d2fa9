"""Errors of meshes: those of the official code, blind to what they should be blind to, and clear about bad input."""

from typing import Any

import numpy as np
import pytest
from architecture_parity import Fixture

from hf_dropkey.mesh.metrics import (
    METRICS,
    aligned,
    body_mesh_errors,
    check_metric,
    mean_body,
    mean_errors,
    point_errors,
)


ROWS = [3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10]
HIPS = [2, 3]


def regressor(generator: np.random.Generator, vertices: int = 60) -> np.ndarray:
    drawn = generator.random((17, vertices)) ** 8
    return drawn / drawn.sum(axis=1, keepdims=True)


def bodies(count: int = 5, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    matrix = regressor(generator)
    true = generator.normal(size=(count, 60, 3))
    return {
        "vertices": true + 0.1 * generator.normal(size=true.shape),
        "true_vertices": true,
        "true_joints": matrix[ROWS] @ true,
        "has_vertices": np.ones(count),
        "has_joints_3d": np.ones(count),
        "joint_regressor": matrix,
        "joint_rows": ROWS,
        "hips": HIPS,
    }


def rotations(count: int, seed: int = 0) -> np.ndarray:
    found = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, 3, 3)))[0]
    return found * np.sign(np.linalg.det(found))[:, None, None]


def test_they_are_those_of_the_official_code() -> None:
    fixture = Fixture("metro_body_tiny")
    given = {name: value.double().numpy() for name, value in fixture.below("input/").items()}
    every = np.ones(3)
    settings: dict[str, Any] = {
        "vertices": fixture.tensors["f64/vertices_full"].numpy(),
        "true_vertices": given["gt_vertices"],
        "true_joints": given["gt_joints24_3d"][:, [*range(13), 18], :3],
        "joint_regressor": given["joint_regressor_h36m17"],
        "joint_rows": ROWS,
        "hips": HIPS,
    }
    found = body_mesh_errors(**settings, has_vertices=given["has_smpl"], has_joints_3d=given["has_3d_joints"])
    # the official alignment counts all samples
    alignment = body_mesh_errors(**settings, has_vertices=every, has_joints_3d=every)
    for name, values in (("mpvpe", found), ("mpjpe", found), ("pa_mpjpe", alignment)):
        expected = np.array(fixture.about["metrics_f64"][name]) * 1000
        assert values[name].shape == expected.shape
        assert np.abs(values[name] / expected - 1).max() <= 1e-12, name


def test_a_perfect_prediction_has_no_error() -> None:
    given = bodies()
    given["vertices"] = given["true_vertices"] + np.array([3.0, -2.0, 0.5])
    for name, values in body_mesh_errors(**given).items():
        assert np.abs(values).max() < 1e-9, name


def test_aligned_errors_are_blind_to_similarity_transforms() -> None:
    given = bodies()
    plain = body_mesh_errors(**given)
    moved = given["vertices"] @ rotations(5) * np.array([0.5, 1.0, 2.0, 3.0, 0.1])[:, None, None] + 7.0
    found = body_mesh_errors(**{**given, "vertices": moved})
    for name in ("pa_mpjpe", "pa_mpvpe"):
        assert np.allclose(found[name], plain[name], rtol=1e-10)
    for name in ("mpjpe", "mpvpe"):
        assert not np.allclose(found[name], plain[name], rtol=0.01)


def test_errors_do_not_change_when_camera_and_body_turn_together() -> None:
    given, turn = bodies(), rotations(1)[0]
    plain = body_mesh_errors(**given)
    turned = {name: given[name] @ turn for name in ("vertices", "true_vertices", "true_joints")}
    for name, values in body_mesh_errors(**{**given, **turned}).items():
        assert np.allclose(values, plain[name], rtol=1e-10)


def test_alignment_never_reflects() -> None:
    points = np.random.default_rng(0).normal(size=(4, 20, 3))
    mirrored = points * np.array([-1.0, 1.0, 1.0])
    assert point_errors(aligned(mirrored, points), points).min() > 0.1
    # of flat points a half turn is as good as a reflection
    flat = points * np.array([1.0, 1.0, 0.0])
    assert point_errors(aligned(flat * np.array([-1.0, 1.0, 1.0]), flat), flat).max() < 1e-12


def test_alignment_is_the_best_there_is() -> None:
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(2, 1, 12, 3))
    best = ((aligned(source, target) - target) ** 2).sum()
    found = aligned(source, target)
    for turn in rotations(50, seed=1):
        # small turns, scales and shifts of the best fit
        small = np.linalg.qr(np.eye(3) + 0.05 * turn)[0]
        small = small * np.sign(np.diag(small))
        other = (found - found.mean(1)) @ small * (1 + 0.02 * generator.normal()) + found.mean(1)
        assert ((other - target) ** 2).sum() >= best - 1e-9


def test_points_that_coincide_move_to_the_middle() -> None:
    target = np.random.default_rng(0).normal(size=(1, 5, 3))
    assert np.allclose(aligned(np.zeros((1, 5, 3)), target), target.mean(1, keepdims=True))


def test_millimetres() -> None:
    given = bodies()
    given["vertices"] = given["true_vertices"].copy()
    pelvis = given["joint_regressor"][0]
    # one vertex, which the pelvis hardly sees, is one metre off
    index = int(pelvis.argmin())
    given["vertices"][:, index, 0] += 1.0
    assert np.allclose(body_mesh_errors(**given)["mpvpe"], 1000 / 60, rtol=0.02)


def test_samples_count_where_they_have_something() -> None:
    given = bodies()
    given["has_vertices"], given["has_joints_3d"] = np.array([1, 0, 0, 1, 0]), np.array([0, 1, 1, 1, 0])
    given["true_vertices"][1], given["true_joints"][4] = np.nan, np.nan
    found = body_mesh_errors(**given)
    assert {name: len(values) for name, values in found.items()} == {
        "mpvpe": 2, "mpjpe": 3, "pa_mpjpe": 3, "pa_mpvpe": 2,
    }  # fmt: skip
    whole = body_mesh_errors(**bodies())
    assert np.allclose(found["mpvpe"], whole["mpvpe"][[0, 3]])
    none = body_mesh_errors(**{**given, "has_vertices": np.zeros(5)})
    assert set(mean_errors(none, prefix="test_")) == {"test_mpjpe", "test_pa_mpjpe"}


def test_the_mean_body() -> None:
    given = bodies()
    mean = mean_body(given["true_vertices"] + 5.0, given["joint_regressor"])
    assert np.allclose(given["joint_regressor"][0] @ mean, 0.0)
    found = body_mesh_errors(**{**given, "vertices": np.broadcast_to(mean, (5, 60, 3))})
    assert found["mpvpe"].mean() > body_mesh_errors(**given)["mpvpe"].mean()
    with pytest.raises(ValueError, match="one mesh at least"):
        mean_body(np.zeros((0, 60, 3)), given["joint_regressor"])


def test_bad_predictions_are_refused() -> None:
    given = bodies()
    given["vertices"][3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="Predicted vertices of sample 3 .of 1 such"):
        body_mesh_errors(**given)
    with pytest.raises(ValueError, match=r"must have the shape \[samples, 60, 3\], got \[5, 59, 3\]"):
        body_mesh_errors(**{**given, "vertices": given["vertices"][:, :59]})


def test_names_of_metrics() -> None:
    assert [check_metric(name) for name in ("MPVPE", "PVE", "MVE", "PA-MPJPE")] == ["mpvpe"] * 3 + ["pa_mpjpe"]
    assert all(check_metric(name) == name for name in METRICS)
    for name in ("PVE-T", "pve_t"):
        with pytest.raises(ValueError, match="no rest pose"):
            check_metric(name)
    with pytest.raises(ValueError, match="Unknown metric 'iou'.*mpvpe"):
        check_metric("iou")
