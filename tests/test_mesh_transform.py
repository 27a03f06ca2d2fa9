"""Crops, mirror images and rotations keep image, joints and mesh together."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_dropkey.mesh.bodies import JOINT_ROWS, procedural_body
from hf_dropkey.mesh.data import GeneratedPeople, Person
from hf_dropkey.mesh.metrics import body_mesh_errors
from hf_dropkey.mesh.transform import (
    MeshAugmentation,
    MeshDataset,
    SquareView,
    View,
    mirrored_person,
    targets,
)


VIEWS = [
    View(),
    View(flip=True),
    View(angle=35.0),
    View(angle=-70.0, flip=True, scale=1.3),
    View(scale=0.8),
]


def person() -> Person:
    return GeneratedPeople(procedural_body(), 1, 0, 64).person(0)


def dots(points: np.ndarray, size: int) -> Image.Image:
    """An image with one bright soft dot at each point."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    total = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8) for x, y in points)
    return Image.fromarray((255 * np.clip(total, 0, 1)).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("view", VIEWS)
def test_joints_stay_on_their_pixels(view: View) -> None:
    points = np.array([[60.0, 50.0], [100.0, 70.0], [90.0, 120.0]])
    square = SquareView((50.0, 40.0, 60.0, 90.0), view)
    crop = np.asarray(square.crop(dots(points, 160), 96))[..., 0].astype(float)
    for x, y in (square.positions(points) + 1) * 48:
        assert 0 < x < 96 and 0 < y < 96
        near = np.hypot(*(np.mgrid[:96, :96] + 0.5 - np.array([y, x])[:, None, None])) < 5
        weight = crop * near
        rows, columns = np.mgrid[:96, :96] + 0.5
        assert abs((weight * columns).sum() / weight.sum() - x) < 0.4
        assert abs((weight * rows).sum() / weight.sum() - y) < 0.4
    # nothing else is bright
    assert crop.max() > 150


@pytest.mark.parametrize("size", [24, 64])
def test_large_images_are_averaged(size: int) -> None:
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    crop = np.asarray(SquareView((100, 100, 400, 400), View()).crop(Image.fromarray(stripes), size))
    assert np.abs(crop.astype(int) - 127).max() < 20


@pytest.mark.parametrize("view", VIEWS)
def test_the_body_turns_with_its_image(view: View) -> None:
    """One camera draws the turned joints where the image has them."""
    one = person()
    square = SquareView(one.box, view)
    found = targets(one, square, len(procedural_body().template))
    flat, positions = found["joints_3d"][:, :2].double(), found["joints_2d"][:, :2].double()
    # least squares for s and t of s * (xy + t)
    centred, seen = flat - flat.mean(0), positions - positions.mean(0)
    scale = (centred * seen).sum() / centred.square().sum()
    assert scale > 0
    assert (scale * centred - seen).abs().max() < 1e-4
    regressor = torch.from_numpy(procedural_body().joint_regressor[list(JOINT_ROWS)]).float()
    assert (regressor @ found["vertices"] - found["joints_3d"][:, :3]).abs().max() < 1e-4


def test_a_flip_twice_is_the_identity() -> None:
    one, body = person(), procedural_body()
    twice = mirrored_person(mirrored_person(one, body.mirror), body.mirror)
    for name in ("vertices", "joints_3d", "joints_2d"):
        assert np.array_equal(getattr(twice, name), getattr(one, name)), name
    points = np.random.default_rng(0).normal(size=(5, 3))
    view = View(flip=True, angle=30.0)
    # a mirror image of a mirror image turns back: reflections undo themselves
    assert np.allclose(view.points(view.points(points)), points)


def test_a_mirrored_person_is_a_person() -> None:
    one, body = person(), procedural_body()
    mirrored = mirrored_person(one, body.mirror)
    assert mirrored.vertices is not None and mirrored.joints_3d is not None
    found = View(flip=True).points(mirrored.vertices)
    joints = (body.joint_regressor @ found)[list(JOINT_ROWS)]
    # left stays left: the joints of the mirrored mesh are the mirrored joints with their sides swapped
    assert np.abs(joints - View(flip=True).points(mirrored.joints_3d[:, :3])).max() < 0.01
    with pytest.raises(ValueError, match="--flip_probability 0"):
        mirrored_person(one, None)


def test_errors_are_blind_to_the_view() -> None:
    one, body = person(), procedural_body()
    assert one.vertices is not None and one.joints_3d is not None
    wrong = one.vertices + np.random.default_rng(0).normal(0, 0.02, one.vertices.shape)

    def errors(view: View) -> np.ndarray:
        found = body_mesh_errors(
            vertices=view.points(wrong)[None],
            true_vertices=view.points(one.vertices)[None],
            true_joints=view.points(one.joints_3d[:, :3])[None],
            has_vertices=np.ones(1),
            has_joints_3d=np.ones(1),
            joint_regressor=body.joint_regressor,
            joint_rows=JOINT_ROWS,
            hips=[2, 3],
        )
        return np.concatenate(list(found.values()))

    for view in VIEWS:
        assert np.allclose(errors(view), errors(View()), rtol=1e-3)


# --- the data set ----------------------------------------------------------------------------------------------------


def dataset(augmentation: MeshAugmentation | None = None, **kwargs: Any) -> MeshDataset:
    body = procedural_body()
    settings: dict[str, Any] = {"image_size": 32, "num_vertices": len(body.template), "mirror": body.mirror, **kwargs}
    return MeshDataset(
        GeneratedPeople(body, 3, 0, 32),
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        augmentation=augmentation,
        **settings,
    )


def test_what_a_model_gets() -> None:
    item = dataset()[1]
    assert {name: tuple(value.shape) for name, value in item.items()} == {
        "pixel_values": (3, 32, 32),
        "joints_3d": (14, 4),
        "joints_2d": (14, 3),
        "vertices": (1914, 3),
        "has_joints_3d": (),
        "has_vertices": (),
    }
    assert all(value.dtype == torch.float32 for value in item.values())
    assert item["joints_2d"][:, :2].abs().max() < 1


def test_views_follow_from_seed_epoch_and_row() -> None:
    data, again = dataset(MeshAugmentation(), seed=3), dataset(MeshAugmentation(), seed=3)
    first = data[0]
    assert torch.equal(first["pixel_values"], again[0]["pixel_values"])
    data.epoch.fill_(1)
    assert not torch.equal(data[0]["pixel_values"], first["pixel_values"])
    again.epoch.fill_(1)
    assert torch.equal(data[0]["vertices"], again[0]["vertices"])
    assert not torch.equal(dataset(MeshAugmentation(), seed=4)[0]["pixel_values"], first["pixel_values"])


def test_draws_have_their_distributions() -> None:
    augmentation = MeshAugmentation()
    generator = np.random.default_rng(0)
    views = [augmentation.draw(generator) for _ in range(4000)]
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 3 * 0.5 / 4000**0.5
    angles = np.array([view.angle for view in views])
    assert abs((angles != 0).mean() - 0.4) < 3 * 0.49 / 4000**0.5
    assert np.abs(angles).max() == 60 and 25 < angles[angles != 0].std() < 30
    scales, colors = np.array([view.scale for view in views]), np.array([view.colors for view in views])
    assert scales.min() == 0.75 and scales.max() == 1.25 and abs(scales.mean() - 1) < 0.02
    assert colors.min() >= 0.6 and colors.max() <= 1.4 and abs(colors.mean() - 1) < 0.02
    nothing = MeshAugmentation(0.0, 0.0, 0.0, 0.0, 0.0).draw(generator)
    assert nothing == View()


def test_rows_without_a_mesh_or_joints() -> None:
    flat = Person((5.0, 5.0, 20.0, 20.0), joints_2d=np.array([[10.0, 12.0, 1.0]] * 13 + [[np.nan, np.nan, 0.0]]))
    found = targets(flat, SquareView(flat.box, View()), 50)
    assert found["has_vertices"] == found["has_joints_3d"] == 0
    assert found["vertices"].shape == (50, 3) and found["joints_3d"].abs().max() == 0
    bare = targets(Person(flat.box), SquareView(flat.box, View()), 50)
    assert bare["joints_2d"].abs().max() == 0


def test_grey_images() -> None:
    body = procedural_body()
    data = MeshDataset(
        GeneratedPeople(body, 1, 0, 32),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5]),
        image_size=32,
        num_vertices=len(body.template),
        num_channels=1,
    )
    assert data[0]["pixel_values"].shape == (1, 32, 32)


@pytest.mark.parametrize(
    "given", [{"flip_probability": 1.5}, {"rotation_std": 100}, {"scale_std": 1.0}, {"color_noise": -0.1}]
)
def test_values_outside_their_range_are_refused(given: dict[str, float]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"--{name} .* is outside"):
        MeshAugmentation(**given)
