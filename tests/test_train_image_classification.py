"""The main job from end to end, as a user runs it: train, resume, evaluate, load elsewhere; and every bad input.

Runs that train are processes of their own. Bad input is tried in this process, to save the time of starting one.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_runs
import torch
from PIL import Image
from safetensors.numpy import load_file
from small_runs import TINY
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_dropkey import DropKeyViTForImageClassification, export_plain


ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "scripts" / "train_image_classification.py"
# 96 images in batches of 16: six steps an epoch, a checkpoint in the middle of the second
RECIPE = {
    **small_runs.RECIPE,
    "max_eval_samples": 40,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "logging_steps": 3,
    "save_steps": 4,
}


def run(script: str, *arguments: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=1500)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, script: Path = TRAIN) -> None:
    """Runs a script in this process."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


def recipe_in(folder: Path, **changes: Any) -> str:
    file = folder / "recipe.json"
    file.write_text(json.dumps({**RECIPE, "output_dir": str(folder / "run"), **changes}))
    return str(file)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a few digits."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_image_classification.py", recipe_in(folder), folder=folder)
    return folder / "run"


def test_training_saves_all_that_is_needed_to_use_the_model(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_dropkey_vit.py"} <= names
    assert {"trainer_state.json", "train_results.json", "eval_results.json", "README.md", "checkpoint-12"} <= names
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {str(number): str(number) for number in range(10)}
    assert (config["dropkey_ratio"], config["hidden_size"]) == (0.4, 16)
    metrics = results(trained)
    assert {"eval_accuracy", "eval_top5_accuracy", "eval_ece", "train_runtime", "train_samples_per_second"} <= set(
        metrics
    )
    assert metrics["parameters"] == sum(array.size for array in load_file(trained / "model.safetensors").values())
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert "trained from scratch on the digits dataset" in (trained / "README.md").read_text()


def assert_resumed_run_ends_in_the_same_bits(whole: Path, resumed: Path) -> None:
    """Compares a run that went on from `checkpoint-8` with the run that wrote it."""
    for name in ("model.safetensors", "checkpoint-12/model.safetensors"):
        expected, found = load_file(whole / name), load_file(resumed / name)
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[key], found[key]) for key in expected)
    before = load_file(whole / "checkpoint-8" / "model.safetensors")
    assert any(not np.array_equal(before[key], found[key]) for key in found)
    assert results(resumed)["eval_loss"] == results(whole)["eval_loss"]


def test_resuming_in_the_middle_of_an_epoch_ends_in_the_same_bits(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    run("train_image_classification.py", recipe_in(tmp_path), "--resume_from_checkpoint", "true", folder=tmp_path)
    assert_resumed_run_ends_in_the_same_bits(trained, tmp_path / "run")


@pytest.mark.usefixtures("auto_image_processor")
def test_evaluation_repeats_what_training_measured(trained, tmp_path):
    arguments = ("--model_name_or_path", str(trained), "--max_eval_samples", "40", "--use_cpu", "True")
    done = run("evaluate_image_classification.py", *arguments, "--output_file", "out.json", folder=tmp_path)
    found, expected = json.loads((tmp_path / "out.json").read_text()), results(trained)
    for name in ("accuracy", "top5_accuracy", "nll", "ece"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)
    assert (found["images"], found["split"], found["parameters"]) == (40, "test", expected["parameters"])
    assert f"accuracy  {found['accuracy']:.4f}" in done.stdout


@pytest.mark.usefixtures("auto_image_processor")
def test_the_saved_folder_predicts_in_a_process_without_the_package(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "handed_over", ignore=shutil.ignore_patterns("checkpoint-*"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    code = """
import sys
from transformers import pipeline
found = pipeline("image-classification", model="handed_over", trust_remote_code=True, device="cpu")("a.png")
assert "hf_dropkey" not in sys.modules and len(found) == 5
print(found[0]["label"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    arguments = ["--model_name_or_path", "handed_over", "--trust_remote_code", "True", "--images", "a.png"]
    arguments += ["--output_file", "out.json", "--attention_file", "out.npz"]
    predicted = run("predict_images.py", *arguments, folder=tmp_path)
    assert "transformers_modules." in predicted.stdout and "package loaded: False" in predicted.stdout
    assert json.loads((tmp_path / "out.json").read_text())[0]["label"] == done.stdout.strip()
    attention = np.load(tmp_path / "out.npz")["attention"]
    assert attention.shape == (1, 4, 4)
    # what is left of the row went to the class token itself
    assert 0.5 < attention.sum() < 1


def stock_vit(folder: Path, classes: int = 10) -> ViTForImageClassification:
    names = {number: str(number) for number in range(classes)}
    model = ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=2, id2label=names))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


SHORT = ("--do_train", "--max_train_samples", "16", "--max_eval_samples", "8", "--max_steps", "1", "--use_cpu")


@pytest.mark.usefixtures("auto_image_processor")
def test_a_stock_vit_is_where_training_starts(monkeypatch, tmp_path):
    stock = stock_vit(tmp_path / "stock")
    arguments = (
        "--model_name_or_path",
        "stock",
        "--dropkey_ratio",
        "0.2",
        "--output_dir",
        "run",
        "--learning_rate",
        "0",
    )
    here(monkeypatch, tmp_path, *SHORT, *arguments)
    model = DropKeyViTForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.dropkey_ratio == 0.2
    assert all((stock.state_dict()[name] == value).all() for name, value in model.state_dict().items())
    assert model.config.id2label[3] == "3"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "fine-tuned version of `stock`" in card and str(tmp_path) not in card


@pytest.mark.usefixtures("auto_image_processor")
def test_another_number_of_classes_needs_a_word(monkeypatch, tmp_path):
    stock_vit(tmp_path / "stock", classes=4)
    arguments = (*SHORT, "--model_name_or_path", "stock", "--output_dir", "run")
    with pytest.raises(
        ValueError, match=r"stock: .*6 classes that the model does not know.*--ignore_mismatched_sizes"
    ):
        here(monkeypatch, tmp_path, *arguments)
    here(monkeypatch, tmp_path, *arguments, "--ignore_mismatched_sizes")
    assert DropKeyViTForImageClassification.from_pretrained(tmp_path / "run").classifier.out_features == 10


def test_an_image_folder_with_a_bad_file_runs_only_if_configured(monkeypatch, tmp_path):
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (9, 7), number + 200 * (label == "light")).save(tmp_path / f"images/{label}/{number}.jpg")
    (tmp_path / "images" / "dark" / "0.jpg").write_bytes(b"")
    arguments = ("--train_dir", "images", "--output_dir", "run", "--image_size", "8", "--patch_size", "4")
    with pytest.raises(ValueError, match=r"1 of 16 images in the train split cannot be used: .*0\.jpg \(empty file\)"):
        here(monkeypatch, tmp_path, "--do_train", "--max_steps", "1", "--use_cpu", *arguments)
    assert not (tmp_path / "run").exists()
    unchecked = ("--output_dir", "unchecked", "--check_images", "False", "--num_channels", "1")
    with pytest.raises(
        ValueError, match=r"an image cannot be used: .*0\.jpg \(empty file\)\. Repair or remove it"
    ) as caught:
        here(monkeypatch, tmp_path, "--do_train", "--num_train_epochs", "1", "--use_cpu", *arguments, *unchecked)
    assert "no whole checkpoint" in caught.value.__notes__[0]
    one_channel = ("--num_channels", "1", "--skip_bad_images")
    here(monkeypatch, tmp_path, "--do_train", "--max_steps", "1", "--use_cpu", *arguments, *one_channel)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label2id"] == {"dark": 0, "light": 1} and config["num_channels"] == 1


def test_photographs_from_parquet(monkeypatch, tmp_path, shared_data):
    flowers = shared_data / "flowers12"
    files = ("--train_file", f"{flowers}/train-*.parquet", "--validation_file", f"{flowers}/test-*.parquet")
    shape = ("--model_size", "nano", "--image_size", "32", "--patch_size", "8", "--output_dir", "run", "--do_eval")
    here(monkeypatch, tmp_path, *SHORT, *files, *shape, "--color_jitter", "0.2")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["id2label"]["0"] == "bluebell"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "on the train-*.parquet dataset" in card and str(shared_data) not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dropkey_ratio 1.0", r"1\.0"),
        ("--dropkey_ratio nan", "nan"),
        ("--dropkey_schedule sideways", "decreasing"),
        ("--dropkey_pattern rows", "score.*cross"),
        ("--dropkey_pattern block --dropkey_window 7", "7"),
        ("--attention_probs_dropout_prob 0.1", "attention_probs_dropout_prob"),
        ("--hub_token hf_secret", "--hub_token would be saved in training_args.bin"),
        ("--image_size 9", "--image_size 9 is not a multiple of --patch_size 2"),
        ("--model_family volo --image_size 40", "40 pixels is not a multiple of 16.* nearest sizes are 32 and 48"),
        ("--model_family ceit --model_size volo_d1", "--model_size volo_d1 is not a size of the family ceit"),
        ("--model_family volo --label_smoothing_factor 0.1", "the dense head of VOLO, .* would never be trained"),
        (
            "--model_name_or_path x --model_size tiny",
            r"fixes the shape of the model; leave out --model_size tiny",
        ),
        ("--rotation_degrees 200", "--rotation_degrees 200.0 is outside"),
        ("--label_column_name species", "no column 'species'; the data has"),
        ("--num_channels 2", "--num_channels 2"),
        ("--max_train_samples 0", "--max_train_samples 0 is below 1"),
        ("--resume_from_checkpoint true", "has no whole checkpoint to resume from"),
        ("--no_such_option 1", "no_such_option"),
    ],
)
def test_bad_arguments_are_reported_before_training(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(Exception, match=message) as caught:
        here(monkeypatch, tmp_path, "--do_train", "--use_cpu", "--output_dir", "run", *arguments.split())
    # the configuration's own error class is not a ValueError
    assert isinstance(caught.value, ValueError | FileNotFoundError) or "Strict" in type(caught.value).__name__
    assert not (tmp_path / "run").exists()


def test_a_run_with_nothing_to_do_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="nothing to do; pass --do_train, --do_eval or both"):
        here(monkeypatch, tmp_path, "--output_dir", "run")


def test_a_recipe_with_an_unknown_field_is_an_error(monkeypatch, tmp_path):
    recipe = recipe_in(tmp_path, dropkey_rate=0.1)
    with pytest.raises(ValueError, match=r"has fields that are not arguments: \['dropkey_rate'\]"):
        here(monkeypatch, tmp_path, recipe)


def test_a_word_where_a_number_belongs_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'recipe\.json has dropkey_ratio: "much", which must be a number or null'):
        here(monkeypatch, tmp_path, recipe_in(tmp_path, dropkey_ratio="much"))
    with pytest.raises(ValueError, match="argument --dropkey_ratio/--dropkey-ratio: invalid float value: 'much'"):
        here(monkeypatch, tmp_path, recipe_in(tmp_path), "--dropkey_ratio", "much")


def test_a_folder_with_another_run_is_not_written_to(monkeypatch, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")

    def times():
        # the lock of the folder aside
        written = [path for path in (tmp_path / "run").rglob("*") if ".run" not in path.parts]
        return {path: path.stat().st_mtime_ns for path in written}

    before = times()
    with pytest.raises(FileExistsError, match="is not empty, it may hold another run"):
        here(monkeypatch, tmp_path, recipe_in(tmp_path))
    assert before == times()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
def test_resuming_from_half_a_checkpoint_names_what_is_missing(monkeypatch, tmp_path, trained, name):
    shutil.copytree(trained / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / "checkpoint-8" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-8 lacks .*{name}"):
        here(monkeypatch, tmp_path, recipe_in(tmp_path), "--resume_from_checkpoint", "true")


def test_resuming_another_model_is_an_error(monkeypatch, tmp_path, trained):
    shutil.copytree(trained / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"another model: dropkey_ratio 0\.4 there and 0\.1 here"):
        here(monkeypatch, tmp_path, recipe_in(tmp_path, dropkey_ratio=0.1), "--resume_from_checkpoint", "true")


@pytest.mark.usefixtures("auto_image_processor")
def test_pretrained_folders_that_lack_something_or_are_not_a_vit_are_reported(monkeypatch, tmp_path):
    arguments = ("--do_train", "--use_cpu", "--model_name_or_path", "stock", "--output_dir", "run")
    stock_vit(tmp_path / "stock")
    (tmp_path / "stock" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="stock lacks preprocessor_config.json; .*--image_processor_name"):
        here(monkeypatch, tmp_path, *arguments)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"makes images of \(32, 32\) and the model takes \(8, 8\)"):
        here(monkeypatch, tmp_path, *arguments)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    (tmp_path / "stock" / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match=r"stock \(model_type 'bert'\) cannot classify images"):
        here(monkeypatch, tmp_path, *arguments)
    (tmp_path / "stock" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="stock lacks model.safetensors"):
        here(monkeypatch, tmp_path, *arguments)


@pytest.mark.usefixtures("auto_image_processor")
def test_evaluating_classes_the_model_does_not_know_is_an_error(monkeypatch, tmp_path, trained):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "7").mkdir()
    for label in ("cat", "7"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / "0.png")
    arguments = ("--model_name_or_path", str(trained), "--use_cpu", "--validation_dir", "images")
    script = ROOT / "scripts" / "evaluate_image_classification.py"
    with pytest.raises(ValueError, match="1 classes that the model does not know: cat"):
        here(monkeypatch, tmp_path, *arguments, script=script)
    shutil.rmtree(tmp_path / "images" / "cat")
    (tmp_path / "images" / "3").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "3" / "0.png")
    here(monkeypatch, tmp_path, *arguments, "--output_file", "out.json", script=script)
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 2


def test_a_token_never_reaches_the_saved_arguments(trained):
    assert b"hf_" not in (trained / "training_args.bin").read_bytes()


LOAD_FAMILIES = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from PIL import Image
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open("a.png").convert("RGB"), return_tensors="pt")
    torch.save(model(**pixels).logits, folder + ".pt")
assert "hf_dropkey" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_other_families_train_resume_and_load_elsewhere(monkeypatch, tmp_path):
    shape = dict.fromkeys((*TINY, "patch_size")) | {"image_size": 32, "model_size": "nano"}
    families = {"t2t_vit": {}, "volo": {"config_overrides": {"mix_token": True}}, "ceit": {}}
    for family, changes in families.items():
        folder = tmp_path / family
        folder.mkdir()
        recipe = recipe_in(folder, **shape, model_family=family, **changes)
        here(monkeypatch, folder, recipe)
        (folder / "run").rename(folder / "whole")
        shutil.copytree(folder / "whole" / "checkpoint-8", folder / "run" / "checkpoint-8")
        here(monkeypatch, folder, recipe, "--resume_from_checkpoint", "true")
        assert_resumed_run_ends_in_the_same_bits(folder / "whole", folder / "run")
        log = json.loads((folder / "whole" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        # with mixed labels, twelve steps are too few for the loss to fall
        assert family == "volo" or losses[-1] < losses[0]
        shutil.copytree(folder / "run", tmp_path / f"{family}_given", ignore=shutil.ignore_patterns("checkpoint-*"))
        with pytest.raises(ValueError, match="so there is no plain architecture to export it to"):
            export_plain(folder / "run", folder / "plain")
    # both heads of VOLO learn
    first, last = (load_file(tmp_path / f"volo/whole/checkpoint-{step}/model.safetensors") for step in (4, 12))
    assert not np.array_equal(first["token_classifier.weight"], last["token_classifier.weight"])

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", LOAD_FAMILIES, *(f"{family}_given" for family in families)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in families:
        model = AutoModelForImageClassification.from_pretrained(tmp_path / family / "run").eval()
        pixels = AutoImageProcessor.from_pretrained(tmp_path / family / "run")(
            Image.open(tmp_path / "a.png").convert("RGB"), return_tensors="pt"
        )
        assert torch.equal(model(**pixels).logits, torch.load(tmp_path / f"{family}_given.pt"))


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy_and_draws(tmp_path):
    """Of the quickstart that CI has run, in a folder with what it printed in `log`, or else of one of its own."""
    output = Path(os.environ.get("QUICKSTART", tmp_path / "out"))
    if output.parent == tmp_path:
        (tmp_path / "log").write_text(run("quickstart.py", "out", folder=tmp_path).stdout)
    found, log = json.loads((output / "results.json").read_text()), (output.parent / "log").read_text()
    assert set(found) == {"DropKey", "no dropout"}
    assert all(result["eval_accuracy"] >= 0.95 for result in found.values())
    assert found["DropKey"]["parameters"] == found["no dropout"]["parameters"]
    assert "package loaded: False" in log and "top-5 accuracy" in log
    assert Image.open(output / "predictions.png").width > 1000
    for name in ("config.json", "model.safetensors", "modeling_dropkey_vit.py", "preprocessor_config.json"):
        assert (output / "dropkey" / name).stat().st_size > 0
