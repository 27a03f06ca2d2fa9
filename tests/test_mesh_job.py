"""The job for body meshes: trains, measures, draws, resumes to the bit; figures and files of predictions."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_parity import REPOSITORY
from PIL import Image
from safetensors.torch import load_file
from transformers import EvalPrediction

from hf_dropkey.hub.cards import model_card
from hf_dropkey.mesh import prediction
from hf_dropkey.mesh.arguments import FIGURE, MeshModelArguments
from hf_dropkey.mesh.bodies import procedural_body
from hf_dropkey.mesh.figures import alone, overlay, sheet, with_joints, write_glb, write_obj
from hf_dropkey.mesh.job import MeshJob, mesh_metrics
from hf_dropkey.mesh.metrics import METRICS
from hf_dropkey.mesh.model import check_same_body, make_body, make_config, make_model, published_levels
from hf_dropkey.mesh.prediction import PredictionArguments, person_boxes, read_boxes
from hf_dropkey.models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh
from hf_dropkey.training.arguments import DropKeyArguments


COMMAND = [
    "--model_size",
    "nano",
    "--image_size",
    "32",
    "--mesh_levels",
    "12",
    "60",
    "--do_train",
    "--do_eval",
    "--max_train_samples",
    "4",
    "--max_eval_samples",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--per_device_eval_batch_size",
    "2",
    "--learning_rate",
    "0.001",
    "--report_to",
    "none",
    "--dropkey_ratio",
    "0.2",
    "--draw_images",
    "1",
    "--save_steps",
    "1",
    "--disable_tqdm",
    "true",
]


def train(folder: Path, *more: str) -> None:
    MeshJob.parse([*COMMAND, "--output_dir", str(folder), *more]).execute(["train"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "people"
    train(folder, "--max_steps", "2")
    return folder


def test_a_run_leaves_everything(trained: Path) -> None:
    results = json.loads((trained / "eval_results.json").read_text())
    for name in METRICS:
        assert np.isfinite(results[f"eval_{name}"]) and results[f"eval_mean_body_{name}"] > 0
    assert results["eval_mpvpe_to_mean_body"] == pytest.approx(results["eval_mpvpe"] / results["eval_mean_body_mpvpe"])
    assert Image.open(trained / FIGURE).size[0] > 500
    card = (trained / "README.md").read_text()
    assert "MPVPE" in card and "body-mesh" in card and "human-mesh-recovery" in card
    model = DropKeyMeshForBodyMesh.from_pretrained(trained)
    body = procedural_body()
    assert model.config.num_vertices == [12, 60, 1914] and model.config.feature_grid == [2, 2]
    assert np.allclose(model.mesh.body.template.numpy(), body.template, atol=1e-6)
    assert model.config.dropkey_ratio == 0.2


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "half", "--max_steps", "2", "--resume_from_checkpoint", str(trained / "checkpoint-1"))
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "half"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.slow
def test_training_goes_on_from_a_trained_model(trained: Path, tmp_path: Path) -> None:
    job = MeshJob.parse(["--do_eval", "--model_name_or_path", str(trained), "--max_eval_samples", "2", "--report_to", "none",
                         "--output_dir", str(tmp_path / "evaluated"), "--draw_images", "0"])  # fmt: skip
    job.execute(["evaluate"])
    again = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())
    first = json.loads((trained / "eval_results.json").read_text())
    assert again["eval_mpvpe"] == pytest.approx(first["eval_mpvpe"], rel=1e-5)
    assert not (tmp_path / "evaluated" / FIGURE).exists()


def test_recipes_are_arguments() -> None:
    for recipe in (REPOSITORY / "hf_dropkey" / "recipes").glob("mesh_*.json"):
        job = MeshJob.parse([str(recipe)])
        assert job.model.model_size == "nano" and job.training.do_eval


# --- models and bodies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["metro", "graphormer"])
def test_models_from_scratch(system: Any) -> None:
    arguments = MeshModelArguments(system=system, model_size="nano", image_size=32)
    config, topology = make_config(arguments, DropKeyArguments(dropkey_ratio=0.1), procedural_body())
    model = make_model(config, topology, arguments, procedural_body())
    assert config.graph_stages == ([2] if system == "graphormer" else [])
    assert config.max_position_embeddings == config.num_tokens == 14 + 48 + 4 * (system == "graphormer")
    with torch.no_grad():
        found = model.eval()(torch.zeros(1, 3, 32, 32))
    # it starts near the template
    reach = np.abs(procedural_body().template).max()
    assert (
        np.abs(found.coarse_vertices[0].numpy() - model.mesh.body.reference_tokens()[14:].numpy()).max() < 0.1 * reach
    )
    check_same_body(model, procedural_body())


def test_sizes_of_meshes() -> None:
    assert published_levels(6890) == (431, 1723)
    assert published_levels(1914) == (119, 478)


def test_bodies_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_body("procedural") is procedural_body()
    (tmp_path / "my_bodies.py").write_text(
        "from hf_dropkey.mesh.bodies import procedural_body as make\ndef wrong():\n    return object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_body("my_bodies:make") is procedural_body()
    with pytest.raises(ValueError, match="returned object, which has no `faces`"):
        make_body("my_bodies:wrong")
    with pytest.raises(ValueError, match="cannot be made: No module named 'absent'"):
        make_body("absent:make")
    with pytest.raises(ValueError, match="--body smpl is not a body"):
        make_body("smpl")


def test_a_checkpoint_of_another_body_is_refused(trained: Path) -> None:
    model = DropKeyMeshForBodyMesh.from_pretrained(trained)
    model.mesh.body.template[0] += 0.1
    with pytest.raises(ValueError, match="template differs from the body's by up to 100 mm"):
        check_same_body(model, procedural_body())
    model.mesh.body.faces[0] = 0
    with pytest.raises(ValueError, match="connects them otherwise"):
        check_same_body(model, procedural_body())


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="--dropkey_exclude is for models that apply_dropkey patches"):
        make_config(MeshModelArguments(), DropKeyArguments(dropkey_exclude=["*"]), procedural_body())
    with pytest.raises(ValueError, match="fixes the shape of the model; leave out --model_size, --mesh_levels"):
        MeshModelArguments(model_name_or_path="runs/people", model_size="nano", mesh_levels=[3, 4])


def test_metrics_leave_out_what_is_missing() -> None:
    table = np.array([[10.0, np.nan, 5.0, np.nan], [20.0, 30.0, 7.0, np.nan]])
    found = mesh_metrics(EvalPrediction(predictions=table, label_ids=2 * table))
    assert found["mpvpe"] == 15 and found["mpjpe"] == 30 and found["mean_body_pa_mpjpe"] == 12
    assert "pa_mpvpe" not in found and found["mpvpe_to_mean_body"] == 0.5


# --- predictions -----------------------------------------------------------------------------------------------------


def photograph(folder: Path, name: str = "a.png") -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    return folder / name


def test_predictions_of_images(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photograph(tmp_path), photograph(tmp_path, "b.png")
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [[5, 5, 30, 50], [40, 10, 20, 40]], "b.png": []}))
    arguments = PredictionArguments(str(trained), [tmp_path], tmp_path / "out", boxes=tmp_path / "boxes.json")
    with caplog.at_level(logging.WARNING):
        counts = prediction.predict(arguments)
    assert counts == {"images": 2, "persons": 2, "images_without_persons": 1}
    assert "b.png: no person" in caplog.text
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"a_mesh.png", "a_joints.png", "a_0.obj", "a_1.obj", "a_0_side.png", "a_1_side.png"}
    lines = (tmp_path / "out" / "a_0.obj").read_text().splitlines()
    assert (
        sum(line.startswith("v ") for line in lines) == 1914 and sum(line.startswith("f ") for line in lines) == 3824
    )
    assert Image.open(tmp_path / "out" / "a_mesh.png").size == (90, 60)


def test_boxes_from_a_detector() -> None:
    found = [
        {"label": "person", "score": 0.6, "box": {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 22}},
        {"label": "dog", "score": 0.9, "box": {"xmin": 0, "ymin": 0, "xmax": 5, "ymax": 5}},
        {"label": "Person", "score": 0.9, "box": {"xmin": 3, "ymin": 4, "xmax": 5, "ymax": 8}},
        {"label": "person", "score": 0.2, "box": {"xmin": 0, "ymin": 0, "xmax": 5, "ymax": 5}},
    ]
    assert person_boxes(found, 0.5) == [[3, 4, 2, 4], [1, 2, 10, 20]]


def test_images_of_one_name_get_files_of_their_own(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [photograph(tmp_path), photograph(tmp_path / "b")]
    prediction.predict(PredictionArguments(str(trained), files, tmp_path / "out"))
    assert {file.name for file in (tmp_path / "out").glob("*.obj")} == {"a_0.obj", "a_2_0.obj"}
    (tmp_path / "boxes.json").write_text('{"a.png": [[5, 5, 30, 50]]}')
    with pytest.raises(ValueError, match="which several of --images share"):
        prediction.predict(PredictionArguments(str(trained), files, tmp_path / "out", boxes=tmp_path / "boxes.json"))


def test_predictions_that_cannot_be_made(trained: Path, tmp_path: Path) -> None:
    file = photograph(tmp_path)
    with pytest.raises(ValueError, match="outside the image of 90 x 60"):
        prediction.predict(PredictionArguments(str(trained), [file], tmp_path / "out", box=[200, 0, 10, 10]))
    (tmp_path / "c.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="c.png \\(not an image file\\)"):
        prediction.predict(PredictionArguments(str(trained), [tmp_path / "c.png"], tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="no image file or folder .*absent.png"):
        prediction.predict(PredictionArguments(str(trained), [tmp_path / "absent.png"], tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="--boxes .*gone.json is not there"):
        prediction.predict(PredictionArguments(str(trained), [file], tmp_path / "out", boxes=tmp_path / "gone.json"))
    with pytest.raises(NotADirectoryError, match="--out .*c.png cannot be a folder"):
        prediction.predict(PredictionArguments(str(trained), [file], tmp_path / "c.png"))
    with pytest.raises(ValueError, match="--detector .* is not an object detector of Transformers") as error:
        prediction.predict(PredictionArguments(str(trained), [file], tmp_path / "out", detector=str(trained)))
    assert "\n" not in str(error.value)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be of the form"):
        read_boxes(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"box": [1.0, 2.0, 3.0]}, "--box takes four numbers"),
        ({"box": [1.0, 2.0, 3.0, 4.0], "detector": "x"}, "--box and --detector both say"),
        ({"detector_threshold": 2.0}, "outside"),
    ],
)
def test_prediction_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionArguments("runs/people", [Path("a.png")], **given)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_pictures_of_a_body(tmp_path: Path) -> None:
    body = procedural_body()
    image = Image.new("RGB", (80, 80), (10, 200, 10))
    near, far = np.array([40.0, 30.0, 40.0]), np.array([20.0, 60.0, 40.0])
    drawn = overlay(image, [body.template, body.template], body.faces, [near, far])
    changed = (np.asarray(drawn) != np.asarray(image)).any(-1)
    assert 0.02 < changed.mean() < 0.3 and not changed[:, -1].any()
    side, front = (np.asarray(alone(body.template, body.faces, 96, turn=turn, reach=1.1)) for turn in (90.0, 0.0))
    # a person with open arms is wider from the front
    assert (front < 250).any(-1).sum() > 1.2 * (side < 250).any(-1).sum()
    joints = with_joints(image, np.random.default_rng(0).uniform(5, 75, (14, 2)))
    assert (np.asarray(joints) != np.asarray(image)).any()
    assert sheet([[image, drawn]], ["one", "two"], side=32).size == (82, 60)
    write_obj(tmp_path / "body.obj", body.template, body.faces)
    first = (tmp_path / "body.obj").read_text().splitlines()[1].split()
    # y up in the file
    assert float(first[2]) == pytest.approx(-body.template[0, 1], abs=1e-4)


def test_cards_show_the_pipeline(trained: Path) -> None:
    assert 'pipeline("body-mesh"' in str(model_card(trained))


def test_glb_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = procedural_body()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trimesh", None)
        with pytest.raises(ImportError, match="hf_dropkey\\[body\\]"):
            write_glb(tmp_path / "body.glb", body.template, body.faces)
    trimesh = pytest.importorskip("trimesh", reason="needs the extra [body]")
    write_glb(tmp_path / "body.glb", body.template, body.faces)
    assert trimesh.load(tmp_path / "body.glb", force="mesh").is_watertight
