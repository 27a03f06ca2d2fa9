"""Detection training from end to end, as a user runs it: train, resume, load elsewhere; and every bad input.

Runs that train in full are processes of their own. Bad input is tried in this process, to save the time of starting one.
"""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file
from transformers import AutoModelForObjectDetection, DetrForObjectDetection

from hf_dropkey import apply_dropkey
from hf_dropkey.detection.arguments import MODEL_TYPES
from hf_dropkey.detection.figures import detections
from hf_dropkey.detection.job import DetectionEvaluation, DetectionTrainer, choose_examples
from hf_dropkey.detection.metrics import COCO_METRICS, coco_package, package_version


ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "scripts" / "train_object_detection.py"
TINY = ("--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "32", "--num_queries", "6")
# eight images in batches of four: two steps an epoch, a checkpoint in the middle of the tenth
RUN = (
    *("--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--image_size", "64", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3", "--dropkey_ratio", "0.4"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` of coloured rectangles, `train.json` (8 images) and `validation.json` (4)."""
    folder = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        (folder / "images" / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            # of two shapes, so that batches are padded
            width, height = (64, 48) if number % 2 else (48, 64)
            image = Image.new("RGB", (width, height), "gray")
            draw = ImageDraw.Draw(image)
            for category, color in enumerate(("red", "blue")):
                x, y, w, h = (int(value) for value in generator.integers((0, 0, 10, 10), (20, 20, 28, 28)))
                draw.rectangle((x, y, x + w - 1, y + h - 1), fill=color)
                annotations.append({"id": len(annotations), "image_id": number, "category_id": 5 + category})
                annotations[-1] |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            name = f"{split}/{number}.png"
            image.save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def data(folder: Path) -> tuple[str, ...]:
    """The arguments that name the data."""
    names = {"train_images": "images", "train_annotations": "train.json"}
    names |= {"validation_images": "images", "validation_annotations": "validation.json"}
    return tuple(part for name, file in names.items() for part in (f"--{name}", str(folder / file)))


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TRAIN), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> None:
    """Runs the script in this process."""
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(TRAIN), run_name="__main__")


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


DETR = (*RUN, *TINY, "--model_type", "detr", "--backbone_learning_rate", "0.001", "--learning_rate", "0.005")
EPOCHS = ("--max_steps", "40", "--save_steps", "19", "--save_strategy", "steps")


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twenty epochs."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(*DETR, *EPOCHS, *data(shapes), "--output_dir", "run", "--eval_strategy", "epoch", folder=folder)
    assert "the first decoder layer's queries start at zero" in done.stderr
    assert "training on" in done.stderr and "8 images, 16 boxes" in done.stderr
    return folder / "run"


@pytest.mark.slow
def test_training_saves_a_plain_model_metrics_and_a_figure(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "checkpoint-40"} <= names
    assert not [name for name in names if name.endswith(".py")]
    results = json.loads((trained / "all_results.json").read_text())
    assert {f"eval_{name}" for name in COCO_METRICS} <= set(results)
    counted = package_version(coco_package())
    assert results["eval_counted_by"] == counted
    assert f"| detections counted by | {counted} |" in (trained / "README.md").read_text()
    assert results["parameters"] == sum(array.size for array in load_file(trained / "model.safetensors").values())
    found = losses(trained)
    assert len(found) == 40 and np.mean(found[-8:]) < 0.9 * np.mean(found[:8])
    with Image.open(trained / "predictions.png") as figure:
        assert min(figure.size) > 300
    assert "object-detection" in (trained / "README.md").read_text()


@pytest.mark.slow
def test_resuming_in_the_middle_of_an_epoch_ends_in_the_same_bits(trained, shapes, tmp_path):
    shutil.copytree(trained / "checkpoint-19", tmp_path / "run" / "checkpoint-19")
    arguments = (*DETR, *EPOCHS, *data(shapes), "--output_dir", "run", "--resume_from_checkpoint", "true")
    run(*arguments, "--eval_strategy", "epoch", folder=tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    before = load_file(trained / "checkpoint-19" / "model.safetensors")
    assert any(not np.array_equal(before[key], found[key]) for key in found)
    assert losses(tmp_path / "run") == losses(trained)


@pytest.mark.slow
def test_resuming_with_other_settings_is_refused(trained, shapes, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoint-19", tmp_path / "run" / "checkpoint-19")
    arguments = (*DETR, *data(shapes), "--output_dir", "run", "--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match=r"another model: dropkey_ratio 0.4 there and 0.2 here"):
        here(monkeypatch, tmp_path, *arguments, "--dropkey_ratio", "0.2")


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_the_saved_folder_is_plain_transformers_and_remembers_dropkey(trained, shapes):
    code = """
import sys
from transformers import pipeline
found = pipeline("object-detection", model=sys.argv[1], threshold=0.0, device="cpu")(sys.argv[2])
assert "hf_dropkey" not in sys.modules
assert len(found) == 6 and {one["label"] for one in found} <= {"red", "blue"}, found
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(trained), str(shapes / "images" / "train" / "0.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=trained, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForObjectDetection.from_pretrained(trained)
    assert type(model) is DetrForObjectDetection
    pixels = torch.zeros(1, 3, 64, 64)
    before = model.eval()(pixels).logits
    report = apply_dropkey(model, verbose=False)
    assert max(site.ratio for site in report.sites) == 0.4
    assert torch.equal(model.eval()(pixels).logits, before)
    assert not torch.equal(model.train()(pixels).logits, model.train()(pixels).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_a_saved_model_is_evaluated_and_trained_on(trained, shapes, tmp_path, monkeypatch):
    start = ("--model_name_or_path", str(trained), "--use_cpu", "--report_to", "none", "--output_dir", "run")
    here(monkeypatch, tmp_path, *start, "--do_eval", *data(shapes)[4:], "--per_device_eval_batch_size", "3")
    found = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    expected = json.loads((trained / "eval_results.json").read_text())
    for name in ("loss", *COCO_METRICS):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)
    shutil.rmtree(tmp_path / "run")
    here(monkeypatch, tmp_path, *start, "--do_train", "--max_steps", "1", "--learning_rate", "0", *data(shapes)[:4])
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "a fine-tuned version of `run`" in card


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "detr"])
def test_every_family_learns(model_type, shapes, tmp_path, monkeypatch):
    steps: tuple[str, ...] = (
        "--max_steps",
        "40",
        "--learning_rate",
        "0.003",
        "--dropkey_ratio",
        "0.1",
        "--save_strategy",
        "no",
        "--draw_images",
        "2",
    )
    # with accumulation, the loss of a step is the mean of its batches
    steps += ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2")
    here(monkeypatch, tmp_path, *RUN, *TINY, *steps, "--model_type", model_type, *data(shapes), "--output_dir", "run")
    found = losses(tmp_path / "run")
    assert len(found) == 40 and np.mean(found[-8:]) < 0.9 * np.mean(found[:8])
    assert (tmp_path / "run" / "predictions.png").is_file()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(policy, shapes, tmp_path, monkeypatch, caplog):
    def third_is_nan(trainer: DetectionTrainer, *args: Any, **kwargs: Any) -> Any:
        found = loss_of(trainer, *args, **kwargs)
        return found * math.nan if trainer.model.training and trainer.state.global_step == 2 else found

    loss_of = DetectionTrainer.compute_loss
    monkeypatch.setattr(DetectionTrainer, "compute_loss", third_is_nan)
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", "--draw_images", "0")
    arguments = [*RUN, *TINY, *steps, "--model_type", "detr", *data(shapes), "--output_dir", "run"]
    arguments.remove("--do_eval")
    arguments += ["--on_nonfinite_loss", policy]
    if policy == "stop":
        with pytest.raises(FloatingPointError, match="the loss of step 3 is nan") as caught:
            here(monkeypatch, tmp_path, *arguments)
        assert "last whole checkpoint is run/checkpoint-2." in caught.value.__notes__[0]
        return
    here(monkeypatch, tmp_path, *arguments)
    assert "The step is skipped, 1 so far" in caplog.text
    second, third, fourth = (load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors") for step in (2, 3, 4))
    assert all(np.array_equal(second[name], third[name]) for name in second)
    assert any(not np.array_equal(third[name], fourth[name]) for name in third)
    assert all(np.isfinite(array).all() for array in fourth.values())


def test_the_figure_has_each_box_where_it_was_given():
    image = Image.new("RGB", (40, 30))
    boxes = [("cat", [1.0, 2.0, 11.0, 22.0]), ("dog", [20.0, 5.0, 39.0, 29.0])]
    figure = detections([image], [boxes], [[("dog", [20.0, 5.0, 38.0, 28.0], 0.75)]], title="two and one")
    upper, lower = figure.axes
    # each box is drawn twice, dark and light
    assert [patch.get_bbox().extents.tolist() for patch in upper.patches[::2]] == [box for _, box in boxes]
    assert [patch.get_bbox().extents.tolist() for patch in lower.patches[::2]] == [[20.0, 5.0, 38.0, 28.0]]
    assert [text.get_text() for text in (*upper.texts, *lower.texts)] == ["cat", "dog", "dog 0.75"]
    assert upper.patches[3].get_edgecolor() == lower.patches[1].get_edgecolor() != upper.patches[1].get_edgecolor()
    assert upper.get_title() == "annotated: 2" and lower.get_title() == "predicted: 1"
    with pytest.raises(ValueError, match="1 images, 1 lists of annotated boxes and 0 of predicted ones"):
        detections([image], [boxes], [], title="none")


def test_the_recipe_names_only_arguments_and_says_what_to_expect(monkeypatch, tmp_path, shapes):
    recipe = ROOT / "hf_dropkey" / "recipes" / "detection_overfit.json"
    about = json.loads(recipe.read_text())["about"]
    assert "recipe:detection_overfit" in about and "AP50" in about and "CPU" in about
    short = ("--max_steps", "1", "--image_size", "64", "--use_cpu", "--output_dir", "run")
    here(monkeypatch, tmp_path, str(recipe), *data(shapes), *short)
    assert (tmp_path / "run" / "predictions.png").is_file()


BAD_ARGUMENTS = {
    "no job": (("--model_type", "detr"), r"nothing to do; pass --do_train, --do_eval or both"),
    "no model": (("--do_train",), r"give one of them, --model_name_or_path to start from a model or --model_type"),
    "no data": (("--do_train", "--model_type", "detr"), r"no data for the train split; give --train_images"),
    "token": (("--do_train", "--model_type", "detr", "--hub_token", "x"), r"--hub_token would be saved"),
    "flip": (("--do_train", "--model_type", "detr", "--flip_probability", "2"), "--flip_probability 2.0 is outside"),
    "draw": (
        ("--do_train", "--model_type", "detr", "--draw_threshold", "2"),
        r"draw_threshold=2.0 is outside \[0, 1\]",
    ),
    "draw count": (("--do_train", "--model_type", "detr", "--draw_images", "-1"), r"draw_images=-1 is below 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_stop_the_run_at_once(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        here(monkeypatch, tmp_path, *arguments, "--output_dir", "run", "--report_to", "none", "--use_cpu")


def test_a_bad_ratio_stops_the_run_before_training(monkeypatch, tmp_path, shapes):
    arguments = (*RUN, *TINY, "--model_type", "detr", *data(shapes), "--output_dir", "run", "--dropkey_ratio", "1")
    with pytest.raises(ValueError, match=r"dropkey_ratio.*1\.0"):
        here(monkeypatch, tmp_path, *arguments)


def test_a_backbone_rate_without_a_backbone_is_named(monkeypatch, tmp_path, shapes):
    arguments = (*RUN, *TINY, "--model_type", "yolos", *data(shapes), "--output_dir", "run")
    with pytest.raises(ValueError, match=r"YolosForObjectDetection has no backbone that learns"):
        here(monkeypatch, tmp_path, *arguments, "--backbone_learning_rate", "0.1")


def test_another_run_is_not_overwritten(monkeypatch, tmp_path, shapes):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    arguments = (*RUN, *TINY, "--model_type", "detr", *data(shapes), "--output_dir", "run")
    with pytest.raises(FileExistsError, match=r"is not empty, .*--overwrite_output_dir"):
        here(monkeypatch, tmp_path, *arguments)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1 lacks config.json"):
        here(monkeypatch, tmp_path, *arguments, "--resume_from_checkpoint", "true")


def test_annotations_are_checked_before_training(monkeypatch, tmp_path, shapes):
    content = json.loads((shapes / "train.json").read_text())
    content["annotations"][3]["bbox"][2] = 0
    (tmp_path / "train.json").write_text(json.dumps(content))
    arguments = [*RUN, *TINY, "--model_type", "detr", *data(shapes), "--output_dir", "run"]
    arguments[arguments.index("--train_annotations") + 1] = "train.json"
    with pytest.raises(ValueError, match=r"annotation 3 of image 1: bbox .* has width 0"):
        here(monkeypatch, tmp_path, *arguments)
    assert not (tmp_path / "run").exists()


def test_examples_are_images_with_a_box_above_the_threshold() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    scored = [[(0.2, 0, box)], [(0.9, 1, box), (0.1, 0, box)], [], [(0.6, 0, box)]]
    assert choose_examples(scored, count=2, threshold=0.5) == ([1, 3], [[(0.9, 1, box)], [(0.6, 0, box)]])
    rows, shown = choose_examples(scored, count=3, threshold=0.5)
    assert rows == [0, 1, 3] and shown[0] == []
    # a model that is sure of nothing shows what it is surest of
    rows, shown = choose_examples(scored, count=2, threshold=0.95)
    assert rows == [0, 1] and shown[1] == [(0.9, 1, box), (0.1, 0, box)]


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_a_saved_model_is_evaluated_alone(trained: Path, shapes: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    command = ["--model_name_or_path", str(trained), "--use_cpu", "--report_to", "none", "--output_dir", str(scores)]
    DetectionEvaluation.parse([*command, *data(shapes)[4:]]).execute(command)
    found, expected = (json.loads((folder / "eval_results.json").read_text()) for folder in (scores, trained))
    assert found["eval_AP"] == pytest.approx(expected["eval_AP"], abs=1e-6)
    assert not (scores / "config.json").exists()


def test_evaluation_of_a_detector_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the model to measure"):
        DetectionEvaluation.parse(["--model_type", "detr", "--output_dir", str(tmp_path), "--use_cpu"])
