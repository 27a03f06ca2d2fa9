"""The pipeline "body-mesh": crops, cameras in the whole image, and a process that does not have this package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mesh_models import random_body, tiny_config
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_dropkey.models.loss_dropkey_mesh import project
from hf_dropkey.models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh
from hf_dropkey.models.pipeline_dropkey_mesh import BodyMeshPipeline, check_box, crop_square, image_camera, square_of


REMOTE = """
import sys
sys.modules["hf_dropkey"] = None  # importing the package now fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, pipeline
folder, expected, again = sys.argv[1:]
expected = torch.load(expected, weights_only=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(model).__name__ == "DropKeyMeshForBodyMesh"
assert torch.equal(model(expected["pixels"]).vertices, expected["vertices"])
model.train()
assert not torch.equal(model(expected["pixels"]).vertices, model(expected["pixels"]).vertices)
bodies = pipeline("body-mesh", model=folder, trust_remote_code=True)
image = Image.new("RGB", (60, 40), (200, 30, 90))
found = bodies(image, boxes=[[10, 5, 20, 30], [0, 0, 60, 40]])
assert [one["box"] for one in found] == [[10.0, 5.0, 20.0, 30.0], [0.0, 0.0, 60.0, 40.0]]
assert torch.equal(torch.stack([one["vertices"] for one in found]), expected["bodies"])
assert bodies(image, boxes=[]) == []
bodies.model.save_pretrained(again)
assert type(AutoConfig.from_pretrained(again, trust_remote_code=True)).__name__ == "DropKeyMeshConfig"
bodies.image_processor.save_pretrained(again)
bodies = pipeline("body-mesh", model=again, trust_remote_code=True)
# alone it is rounded otherwise than in a batch
assert torch.allclose(bodies(image, boxes=[[10, 5, 20, 30]])[0]["vertices"], expected["bodies"][0], atol=1e-6)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bodies"
    torch.manual_seed(0)
    model = DropKeyMeshForBodyMesh(tiny_config())
    model.set_body(**random_body(model.config))
    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def bodies_of(folder: Path) -> BodyMeshPipeline:
    return BodyMeshPipeline(
        model=DropKeyMeshForBodyMesh.from_pretrained(folder),
        image_processor=ViTImageProcessorPil.from_pretrained(folder),
    )


@pytest.mark.slow
def test_model_and_pipeline_in_a_process_without_the_package(folder: Path, tmp_path: Path) -> None:
    model = DropKeyMeshForBodyMesh.from_pretrained(folder)
    pixels = torch.randn(2, 3, 32, 32)
    image = Image.new("RGB", (60, 40), (200, 30, 90))
    found = bodies_of(folder)(image, boxes=[[10, 5, 20, 30], [0, 0, 60, 40]])
    expected = {
        "pixels": pixels,
        "vertices": model(pixels).vertices.detach(),
        "bodies": torch.stack([one["vertices"] for one in found]),
    }
    torch.save(expected, tmp_path / "expected.pt")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own["HF_MODULES_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), str(tmp_path / "expected.pt"), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        env=own,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_results_of_an_image(folder: Path) -> None:
    bodies = bodies_of(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    boxes = [[10, 5, 30, 60], [70, 20, 40, 50]]
    results = bodies(image, boxes=boxes)
    assert [one["box"] for one in results] == boxes
    for one, box in zip(results, boxes, strict=True):
        assert one["vertices"].shape == (40, 3) and one["joints"].shape == (14, 3)
        scale, x, y = one["camera"]
        assert torch.allclose(one["joints_2d"], scale * one["joints"][:, :2] + torch.tensor([x, y]))
        # alone it is the same
        assert torch.allclose(bodies(image, boxes=[box])[0]["vertices"], one["vertices"], atol=1e-6)
    # without boxes the image is one person, and a list of images gives a list of results
    (whole,) = bodies(image)
    assert whole["box"] == [0.0, 0.0, 120.0, 80.0]
    assert [len(one) for one in bodies([image, image])] == [1, 1]
    assert bodies(image, boxes=[]) == []


def test_the_camera_in_the_whole_image_draws_where_the_crop_does() -> None:
    torch.manual_seed(0)
    points, camera = torch.randn(1, 20, 3), torch.tensor([[0.8, 0.1, -0.2]])
    square = square_of([30.0, 40.0, 50.0, 90.0])
    left, top, side = square
    expected = torch.tensor([left, top]) + (project(points, camera)[0] + 1) * side / 2
    scale, x, y = image_camera(camera[0].tolist(), square)
    torch.testing.assert_close(scale * points[0, :, :2] + torch.tensor([x, y]), expected)


def test_squares_hold_the_box() -> None:
    left, top, side = square_of([10.0, 20.0, 30.0, 60.0])
    assert side == pytest.approx(72.0)
    assert (left + side / 2, top + side / 2) == pytest.approx((25.0, 50.0))


@pytest.mark.parametrize("size", [16, 50, 200])
def test_crops_are_where_the_square_is(size: int) -> None:
    rows, columns = np.mgrid[:100, :100]
    image = Image.fromarray(np.stack((columns * 2, rows * 2, 0 * rows + 255), -1).astype(np.uint8))
    left, top, side = 20.0, 30.0, 50.0
    crop = np.asarray(crop_square(image, (left, top, side), size)).astype(float)
    assert crop.shape == (size, size, 3)
    centres = (np.arange(size) + 0.5) * side / size - 0.5
    inner = slice(1, -1)
    assert np.abs(crop[0, :, 0] / 2 - (left + centres))[inner].max() < 1.1
    assert np.abs(crop[:, 0, 1] / 2 - (top + centres))[inner].max() < 1.1
    # beyond the image it is black
    outside = np.asarray(crop_square(image, (-50.0, -50.0, 100.0), size))
    assert outside[: size // 2 - 2, : size // 2 - 2].max() == 0 and outside[-1, -1, 2] > 200


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, 0, 10], "has no area"),
        ([30, 30, 10, -5], "has no area.*corners"),
        ([100, 0, 10, 10], "outside the image of 60 x 40"),
        ([-20, 0, 20, 10], "outside the image"),
        ([0, 0, float("nan"), 10], "four finite numbers"),
        ([0, 0, 10], "four finite numbers"),
    ],
)
def test_bad_boxes_are_refused(box: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_box(box, (60, 40))


def test_boxes_of_several_images_are_refused(folder: Path) -> None:
    image: Any = Image.new("RGB", (20, 20))
    with pytest.raises(ValueError, match="belong to one image, but 2"):
        bodies_of(folder)([image, image], boxes=[[0, 0, 5, 5]])
