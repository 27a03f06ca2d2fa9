"""Bodies: closed surfaces that move as people do, exact joints, and clear errors for bodies that cannot be right."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_dropkey.mesh.anny_body import LayerBody
from hf_dropkey.mesh.bodies import (
    JOINT_NAMES,
    JOINT_ROWS,
    PARTS,
    ProceduralBody,
    mirror_of,
    procedural_body,
    rotation_matrices,
    rotation_vectors,
)
from hf_dropkey.mesh.data import SWAPPED_JOINTS
from hf_dropkey.mesh.model import make_body
from hf_dropkey.mesh.surface import Cone, body_surface, edges_of
from hf_dropkey.mesh.topology import (
    check_body,
    farthest_points,
    fitted_map,
    interpolation,
    make_topology,
    unit_problem,
)


@pytest.fixture(scope="module")
def body() -> ProceduralBody:
    return procedural_body()


def edge_counts(faces: np.ndarray) -> np.ndarray:
    pairs = np.sort(np.stack((faces, np.roll(faces, -1, axis=1)), -1).reshape(-1, 2), axis=1)
    return np.unique(pairs, axis=0, return_counts=True)[1]


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    return float((a * np.cross(b, c)).sum() / 6)


# --- surfaces --------------------------------------------------------------------------------------------------------


def test_a_ball_is_a_ball() -> None:
    vertices, faces = body_surface([Cone((0.0, 0.0, 0.0), (0.0, 1e-6, 0.0), (0.2, 0.2))], 0.01, 0.02)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.2).max() < 0.002
    assert volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * 0.2**3, rel=0.02)
    assert set(edge_counts(faces)) == {2}
    assert len(vertices) - len(edges_of(faces)) + len(faces) == 2


def test_the_body_is_one_closed_surface(body: ProceduralBody) -> None:
    assert set(edge_counts(body.faces)) == {2}
    assert len(body.template) - len(edges_of(body.faces)) + len(body.faces) == 2
    # an adult's volume in litres; positive: triangles turn outwards
    assert 0.03 < volume(body.template, body.faces) < 0.09
    lengths = np.linalg.norm(np.diff(body.template[edges_of(body.faces)], axis=1), axis=-1)
    assert lengths.max() < 0.09 and lengths.min() > 0.003


def test_the_body_is_the_same_each_time(body: ProceduralBody) -> None:
    again = ProceduralBody()
    for name in ("template", "faces", "weights", "joint_regressor", "mirror"):
        assert np.array_equal(getattr(again, name), getattr(body, name)), name
    # what checkpoints hold: another number is another topology
    assert body.template.shape == (1914, 3) and body.faces.shape == (3824, 3)


def test_the_body_is_symmetric(body: ProceduralBody) -> None:
    assert np.array_equal(body.mirror[body.mirror], np.arange(len(body.template)))
    assert np.abs(body.template[body.mirror] * [-1, 1, 1] - body.template).max() < 1e-12
    assert np.abs(body.weights.sum(1) - 1).max() < 1e-12 and body.weights.min() >= 0


def test_widths_that_lose_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0.02, 0.04\] metres, got 0.1"):
        ProceduralBody(0.1)


# --- poses -----------------------------------------------------------------------------------------------------------


def test_the_rest_pose_is_the_template(body: ProceduralBody) -> None:
    vertices, _ = body(np.zeros((1, 17, 3)), np.zeros((1, 5)))
    assert np.abs(vertices[0] - body.template).max() < 1e-12
    check_body(body.template, body.faces, body.joint_regressor)


def test_regressed_joints_are_the_true_ones(body: ProceduralBody) -> None:
    pose, shape = body.sample(40, np.random.default_rng(5))
    _, joints = body(pose, shape)
    _, true = body.pose_bodies(pose, shape)
    assert np.abs(body.joint_regressor.sum(1) - 1).max() < 1e-6 and body.joint_regressor.min() >= 0
    distance = np.linalg.norm(joints - true, axis=-1).mean(0)
    # no vertices lie beyond the top of the head
    assert dict(zip(JOINT_NAMES, distance, strict=True))["head"] < 0.01
    assert np.delete(distance, JOINT_NAMES.index("head")).max() < 0.006


def test_no_joint_rests_on_a_few_vertices(body: ProceduralBody) -> None:
    # the loss of a joint would pull them out of the surface
    effective = 1 / (body.joint_regressor**2).sum(1)
    assert effective.min() > 8 and np.delete(effective, JOINT_NAMES.index("head")).min() > 30


def test_turning_the_root_turns_everything(body: ProceduralBody) -> None:
    pose, shape = body.sample(3, np.random.default_rng(1))
    turned = pose.copy()
    turn = rotation_matrices(np.array([0.3, -0.8, 0.2]))
    turned[:, 0] = rotation_vectors(turn @ rotation_matrices(pose[:, 0]))
    before, after = body(pose, shape)[0], body(turned, shape)[0]
    assert np.abs(before @ turn.T - after).max() < 1e-9


def test_a_mirrored_pose_is_the_mirrored_body(body: ProceduralBody) -> None:
    pose, shape = body.sample(2, np.random.default_rng(2))
    other = pose[:, body._other_side()] * np.array([1.0, -1.0, -1.0])
    vertices, joints = body(pose, shape)
    mirrored, mirrored_joints = body(other, shape)
    flip = np.array([-1.0, 1.0, 1.0])
    assert np.abs(vertices[:, body.mirror] * flip - mirrored).max() < 1e-9
    chosen = joints[:, JOINT_ROWS][:, SWAPPED_JOINTS] * flip
    assert np.abs(chosen - mirrored_joints[:, JOINT_ROWS]).max() < 0.01


def test_samples_are_people(body: ProceduralBody) -> None:
    pose, shape = body.sample(200, np.random.default_rng(3))
    vertices, joints = body(pose, shape)
    assert np.isfinite(vertices).all()
    extents = np.ptp(vertices, axis=1).max(1)
    assert extents.min() > 0.9 and extents.max() < 2.4
    # people do not stand on their heads, and knees bend backwards only
    assert (joints[:, JOINT_NAMES.index("head"), 1] < joints[:, JOINT_NAMES.index("left_ankle"), 1]).all()
    calf = body.bones.index("left_calf")
    assert pose[:, calf, 0].min() >= 0
    # heights spread by a few per cent
    heights = np.ptp(body(np.zeros_like(pose), shape)[0][..., 1], axis=1)
    assert heights.min() > 1.4 and heights.max() < 2.1 and heights.std() > 0.05


def test_volume_hardly_changes_at_joints(body: ProceduralBody) -> None:
    pose, _ = body.sample(20, np.random.default_rng(4))
    vertices, _ = body(pose, np.zeros((20, 5)))
    rest = volume(body.template, body.faces)
    for mesh in vertices:
        assert volume(mesh, body.faces) == pytest.approx(rest, rel=0.12)


def test_parts_are_where_they_belong(body: ProceduralBody) -> None:
    names = np.array(PARTS)[body.parts]
    y = body.template[:, 1]
    assert set(names) == set(PARTS)
    assert y[names == "shoes"].min() > y[names == "trousers"].mean() > y[names == "shirt"].mean()
    assert y[names == "hair"].max() < y[names == "shirt"].min()


def test_rotation_vectors_come_back() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((500, 3))
    vectors *= (generator.uniform(0, np.pi - 1e-3, 500) / np.linalg.norm(vectors, axis=1))[:, None]
    vectors[0] = 0
    matrices = rotation_matrices(vectors)
    assert np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max() < 1e-12
    assert np.abs(np.linalg.det(matrices) - 1).max() < 1e-12
    assert np.abs(rotation_vectors(matrices) - vectors).max() < 1e-6
    # a quarter turn about x takes y to z
    assert np.allclose(rotation_matrices(np.array([np.pi / 2, 0, 0])) @ [0, 1, 0], [0, 0, 1])


# --- resolutions -----------------------------------------------------------------------------------------------------


def test_resolutions_of_a_body(body: ProceduralBody) -> None:
    topology = make_topology(body, (48, 240))
    assert topology.num_vertices == [48, 240, 1914]
    coarse, middle = topology.downsampling[1] @ topology.downsampling[0] @ body.template, topology.downsampling[0]
    assert middle.shape == (240, 1914)
    for matrix in (*topology.downsampling, topology.adjacency):
        assert np.abs(matrix.sum(1) - 1).max() < 1e-9 and matrix.min() >= 0
    # coarse points are spread over the whole body
    assert np.abs(np.ptp(coarse, axis=0) - np.ptp(body.template, axis=0)).max() < 0.1
    assert np.array_equal(topology.adjacency > 0, (topology.adjacency > 0).T)
    assert 3 < (topology.adjacency > 0).sum(1).mean() < 9


def test_maps_to_finer_meshes_give_smooth_bodies(body: ProceduralBody) -> None:
    topology = make_topology(body, (48, 240))
    # other bodies than those of the fit
    true, _ = body(*body.sample(20, np.random.default_rng(8)))
    true = true - topology.joint_regressor[:1] @ true
    middle = topology.downsampling[0] @ true
    from_middle = topology.upsampling[1] @ middle
    from_coarse = topology.upsampling[1] @ topology.upsampling[0] @ (topology.downsampling[1] @ middle)
    # a mean of the three nearest points misses by 17 and 44 mm
    assert np.linalg.norm(from_middle - true, axis=-1).mean() < 0.002
    assert np.linalg.norm(from_coarse - true, axis=-1).mean() < 0.008
    edges = edges_of(body.faces)
    found, wanted = (np.linalg.norm(np.diff(meshes[:, edges], axis=2), axis=-1) for meshes in (from_coarse, true))
    # a vertex that sticks out has long edges
    assert (found > 2 * wanted).mean() < 1e-3


def test_a_fitted_map_changes_what_bodies_tell_only() -> None:
    generator = np.random.default_rng(0)
    start, true = generator.random((2, 9, 4))
    # bodies of any shape, but for the last point, which is at 0
    sources = generator.standard_normal((50, 4, 3))
    sources[:, 3] = 0
    found = fitted_map(start, sources, true @ sources)
    assert np.abs(found[:, :3] - true[:, :3]).max() < 1e-3
    assert np.abs(found[:, 3] - start[:, 3]).max() < 1e-12


def test_the_model_takes_a_body(body: ProceduralBody) -> None:
    tensors = make_topology(body, (48, 240)).tensors()
    assert tensors["template"].dtype == torch.float32 and tensors["faces"].dtype == torch.int64


def test_farthest_points_are_spread() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 2, [0.0]), -1).reshape(-1, 3)
    chosen = farthest_points(grid, 4)
    assert {tuple(point) for point in grid[chosen]} == {(0, 0, 0), (5, 0, 0), (0, 5, 0), (5, 5, 0)}
    assert len(set(farthest_points(grid, 36).tolist())) == 36


def test_interpolation_is_exact_at_its_sources() -> None:
    points = np.random.default_rng(0).random((20, 3))
    assert np.abs(interpolation(points, points) @ points - points).max() < 1e-3


@pytest.mark.parametrize("levels", [(0, 10), (20, 10), (10, 5000)])
def test_levels_that_do_not_fit_are_refused(body: ProceduralBody, levels: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="--mesh_levels .* at most the 1914 vertices"):
        make_topology(body, levels)


# --- bodies that cannot be right -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extent", "message"),
    [(1.7, None), (170.0, "centimetres. Divide by 100"), (1700.0, "millimetres. Divide by 1000"), (0.01, "between")],
)
def test_units(extent: float, message: str | None) -> None:
    found = unit_problem(extent)
    assert found is None if message is None else message in str(found)


def wrong(body: ProceduralBody, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    template, faces, regressor = body.template.copy(), body.faces.copy(), body.joint_regressor.copy()
    if kind == "millimetres":
        template *= 1000
    elif kind == "y up":
        template *= [1, -1, -1]
    elif kind == "sides":
        swap = [
            JOINT_NAMES.index(name.replace("left", "?").replace("right", "left").replace("?", "right"))
            for name in JOINT_NAMES
        ]
        regressor = regressor[swap]
    elif kind == "mirrored":
        template *= [-1, 1, 1]
    elif kind == "nan":
        template[3] = np.nan
    elif kind == "faces":
        faces[0, 0] = len(template)
    elif kind == "rows":
        regressor = regressor[:14]
    elif kind == "sums":
        regressor[4] *= 2
    return template, faces, regressor


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("millimetres", "looks like millimetres"),
        ("y up", "y must grow downwards"),
        ("sides", "swap its left and right rows"),
        ("mirrored", "undo a mirroring"),
        ("nan", "must be finite"),
        ("faces", "triangles .* of vertices 0 to 1913"),
        ("rows", r"must be \[17, 1914\]"),
        ("sums", "row of left_hip sums to 2"),
    ],
)
def test_bodies_that_cannot_be_right_are_refused(body: ProceduralBody, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_body(*wrong(body, kind))


def test_a_template_without_symmetry_has_no_mirror_image(body: ProceduralBody) -> None:
    bent, _ = body(*body.sample(1, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="--flip_probability 0"):
        mirror_of(bent[0])


# --- a user's layer --------------------------------------------------------------------------------------------------


def layer_body(body: ProceduralBody, result: Any = None, **kwargs: Any) -> LayerBody:
    """The procedural body behind a layer in centimetres with z up."""

    def layer(pose: torch.Tensor, shape: torch.Tensor) -> Any:
        vertices = torch.from_numpy(body(pose.numpy(), shape.numpy())[0] * 100)
        x, y, z = vertices.unbind(-1)
        return SimpleNamespace(vertices=torch.stack((x, z, -y), -1)) if result is None else result

    settings: dict[str, Any] = {"up": "z", "unit": 0.01, **kwargs}
    return LayerBody(
        layer,
        faces=body.faces,
        joint_regressor=body.joint_regressor,
        sample=body.sample,
        rest=(np.zeros((1, 17, 3)), np.zeros((1, 5))),
        **settings,
    )


def test_a_layer_of_a_user_is_a_body(body: ProceduralBody) -> None:
    own = layer_body(body)
    assert np.abs(own.template - body.template).max() < 1e-5
    pose, shape = own.sample(2, np.random.default_rng(0))
    for found, expected in zip(own(pose, shape), body(pose, shape), strict=True):
        assert np.abs(found - expected).max() < 1e-5
    make_topology(own, (48, 240))


def test_layers_that_cannot_be_right_are_refused(body: ProceduralBody) -> None:
    with pytest.raises(ValueError, match="SimpleNamespace, which has no `.vertices`"):
        layer_body(body, SimpleNamespace(joints=1))
    with pytest.raises(ValueError, match="up must be one of"):
        layer_body(body, up="x")
    with pytest.raises(ValueError, match="y must grow downwards"):
        make_topology(layer_body(body, up="-y", unit=0.01), (48, 240))
    with pytest.raises(ValueError, match="centimetres"):
        make_topology(layer_body(body, unit=1.0), (48, 240))


# --- Anny ------------------------------------------------------------------------------------------------------------


def test_anny_is_a_body() -> None:
    pytest.importorskip("anny", reason="needs the extra [body]")
    own = make_body("anny")
    assert own.template.shape == (369, 3) and own.faces.shape == (734, 3)
    make_topology(own, (24, 92))
    mirror_of(own.template)
    pose, shape = own.sample(20, np.random.default_rng(0))
    vertices, joints = own(pose, shape)
    assert vertices.shape == (20, 369, 3) and np.isfinite(vertices).all()
    assert (joints[:, JOINT_NAMES.index("head"), 1] < joints[:, JOINT_NAMES.index("left_ankle"), 1]).all()
    # a turn of the root turns everything
    turned = pose.copy()
    turn = rotation_matrices(np.array([0.0, 0.7, 0.0]))
    turned[:, 0] = rotation_vectors(turn @ rotation_matrices(pose[:, 0]))
    assert np.abs(own(turned, shape)[0] - vertices @ turn.T).max() < 1e-4


def test_annys_large_meshes_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="anny:smplx is not offered. Choose anny:notoes_collapse3pc"):
        make_body("anny:smplx")
    monkeypatch.setitem(sys.modules, "anny", None)
    with pytest.raises(ImportError, match="hf_dropkey\\[body\\]"):
        make_body("anny:notoes_collapse5pc")
