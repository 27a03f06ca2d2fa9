"""The z-buffer draws silhouettes of the right area, nearer things in front, and the same picture each time."""

import numpy as np
import pytest

from hf_dropkey.mesh.bodies import procedural_body
from hf_dropkey.mesh.renderer import crop_camera, project_points, render, vertex_normals
from hf_dropkey.mesh.surface import Cone, body_surface


BOX_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 7, 5], [4, 6, 7], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4],
     [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


def box(width: float, height: float, depth: float) -> np.ndarray:
    corners = [[x, y, z] for z in (-0.5, 0.5) for y in (-0.5, 0.5) for x in (-0.5, 0.5)]
    return np.array(corners) * [width, height, depth]


@pytest.mark.parametrize("size", [64, 200])
def test_the_silhouette_of_a_ball_has_its_area(size: int) -> None:
    vertices, faces = body_surface([Cone((0.0, 0.0, 0.0), (0.0, 1e-6, 0.0), (0.2, 0.2))], 0.01, 0.015)
    scale = size * 2.0
    drawn = render(vertices, faces, np.array([scale, size / 2, size / 2]), (size, size), antialias=4)
    assert drawn.coverage.sum() == pytest.approx(np.pi * (0.2 * scale) ** 2, rel=0.01)


@pytest.mark.parametrize("antialias", [1, 3])
def test_the_silhouette_of_a_box_is_exact(antialias: int) -> None:
    # edges on pixel borders
    drawn = render(box(0.5, 0.3, 0.2), BOX_FACES, np.array([40.0, 32.0, 32.0]), (64, 64), antialias=antialias)
    assert drawn.coverage.sum() == 20 * 12
    assert drawn.coverage[26:38, 22:42].min() == 1.0
    # its front, nearest to the camera
    assert np.allclose(drawn.depth[26:38, 22:42], -0.1)
    assert np.isinf(drawn.depth).sum() == 64 * 64 - 240


def test_a_turned_box_has_the_area_of_its_shadow() -> None:
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    drawn = render(box(0.5, 0.3, 0.2) @ turn.T, BOX_FACES, np.array([200.0, 100.0, 100.0]), (200, 200), antialias=4)
    width = 0.5 * np.cos(angle) + 0.2 * np.sin(angle)
    assert drawn.coverage.sum() == pytest.approx(width * 0.3 * 200**2, rel=0.005)


def test_nearer_things_hide_farther_ones_whatever_their_order() -> None:
    near, far = box(0.2, 0.2, 0.1) - np.array([0, 0, 0.5]), box(0.6, 0.6, 0.1) + np.array([0, 0, 0.5])
    red, blue = np.tile([1.0, 0, 0], (8, 1)), np.tile([0, 0, 1.0], (8, 1))
    pictures = []
    for first, second, colors in ((near, far, (red, blue)), (far, near, (blue, red))):
        drawn = render(
            np.concatenate((first, second)),
            np.concatenate((BOX_FACES, BOX_FACES + 8)),
            np.array([50.0, 32.0, 32.0]),
            (64, 64),
            colors=np.concatenate(colors),
        )
        assert drawn.color[32, 32, 0] > 0 and drawn.color[32, 32, 2] == 0
        assert drawn.color[20, 20, 2] > 0 and drawn.color[20, 20, 0] == 0
        pictures.append(drawn.color)
    assert np.allclose(pictures[0], pictures[1])


def test_triangles_of_all_sizes_and_outside_the_image() -> None:
    # one triangle over everything, one outside, one of no area
    vertices = np.array(
        [[-9, -9, 0], [30, -9, 0], [-9, 30, 0], [5, 5, 1], [6, 5, 1], [5, 6, 1], [0, 0, 0]], dtype=float
    )
    faces = np.array([[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    drawn = render(vertices, faces, np.array([4.0, 0.0, 0.0]), (16, 12))
    assert drawn.coverage.shape == (16, 12) and drawn.coverage.min() == 1.0
    empty = render(vertices + np.array([100, 0, 0]), faces[1:], np.array([4.0, 0.0, 0.0]), (16, 12))
    assert empty.coverage.max() == 0.0


def test_neighbours_leave_no_gap_and_overlap_nowhere() -> None:
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0), [0.0], indexing="ij"), -1).reshape(-1, 3)
    inner = (grid[:, :2] > 0).all(1) & (grid[:, :2] < 8).all(1)
    grid[inner, :2] += generator.uniform(-0.3, 0.3, (inner.sum(), 2))
    cell = np.arange(81).reshape(9, 9)
    a, b, c, d = (cell[i : 8 + i, j : 8 + j].ravel() for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)))
    faces = np.concatenate((np.stack((a, b, c), 1), np.stack((b, d, c), 1)))
    drawn = render(grid, faces, np.array([5.3, 4.0, 4.0]), (48, 48))
    ys, xs = np.mgrid[:48, :48] + 0.5
    inside = (xs > 4) & (xs < 4 + 8 * 5.3) & (ys > 4) & (ys < 4 + 8 * 5.3)
    assert np.array_equal(drawn.coverage > 0, inside)


def test_it_is_the_same_each_time() -> None:
    body = procedural_body()
    camera = np.array([60.0, 64.0, 64.0])
    first, second = (render(body.template, body.faces, camera, (128, 128), antialias=2) for _ in range(2))
    assert np.array_equal(first.color, second.color) and np.array_equal(first.depth, second.depth)


def test_turning_camera_and_body_together_changes_nothing() -> None:
    """A half turn of the image plane: the picture turns, the numbers stay."""
    body = procedural_body()
    camera = np.array([60.0, 64.0, 64.0])
    plain = render(body.template, body.faces, camera, (128, 128), light=(0.3, -0.5, -0.8))
    turned = render(body.template * [-1, -1, 1], body.faces, camera, (128, 128), light=(-0.3, 0.5, -0.8))
    assert np.allclose(turned.coverage[::-1, ::-1], plain.coverage)
    seen = plain.coverage > 0
    assert np.allclose(turned.depth[::-1, ::-1][seen], plain.depth[seen])
    assert np.allclose(turned.color[::-1, ::-1], plain.color, atol=1e-6)


def test_normals_point_outwards() -> None:
    vertices, faces = body_surface([Cone((0.0, 0.0, 0.0), (0.0, 1e-6, 0.0), (0.2, 0.2))], 0.01, 0.02)
    normals = vertex_normals(vertices, faces)
    assert ((normals * vertices).sum(1) / 0.2).min() > 0.97


def test_a_mesh_covers_an_image_where_it_is() -> None:
    background = np.full((64, 64, 3), 0.25)
    picture = render(box(0.5, 0.3, 0.2), BOX_FACES, np.array([40.0, 32.0, 32.0]), (64, 64)).over(background)
    assert np.array_equal(picture[0, 0], [0.25] * 3) and (picture[32, 32] != 0.25).all()


def test_cameras_of_crops() -> None:
    camera, points = np.array([0.8, 0.1, -0.2]), np.array([[0.3, -0.4, 0.5]])
    expected = (0.8 * (points[:, :2] + camera[1:]) + 1) * 64 / 2
    assert np.allclose(project_points(points, crop_camera(camera, 64)), expected)


def test_meshes_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        render(box(1, 1, np.nan), BOX_FACES, np.array([1.0, 0, 0]), (8, 8))
    with pytest.raises(ValueError, match="from 0 to 8, but there are 8"):
        render(box(1, 1, 1), np.array([[0, 1, 8]]), np.array([1.0, 0, 0]), (8, 8))
