"""The job of human-object interaction detection from end to end, as a user runs it; and bad input."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hoi_models import tiny_model
from PIL import Image
from safetensors.torch import load_file
from transformers import DetrImageProcessorPil, pipeline

from hf_dropkey.cli import main as hf_dropkey
from hf_dropkey.hoi.figures import interactions
from hf_dropkey.hoi.job import HoiEvaluation, HoiJob
from hf_dropkey.hoi.scenes import SCENE_OBJECTS, SCENE_VERBS


ROOT = Path(__file__).resolve().parents[1]
TINY = ("--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "32", "--encoder_layers", "1")
RUN = (
    *("--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--logging_steps", "1", "--dataset", "scenes"),
    *("--train_scenes", "8", "--validation_scenes", "5", "--scene_size", "64", "--per_device_train_batch_size", "4"),
    *("--per_device_eval_batch_size", "3", "--decoder_layers", "2", "--num_queries", "4", "--dropkey_ratio", "0.4"),
    *("--dropkey_cross_attention", "true", "--learning_rate", "0.003", "--crop_scale", "0.6", "--show_data"),
)
EPOCHS = ("--max_steps", "8", "--save_steps", "3", "--save_strategy", "steps")


def run(script: str, *arguments: str, folder: Path, seconds: int = 400) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def here(script: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    """Runs a script in this process."""
    file = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    monkeypatch.chdir(folder)
    runpy.run_path(str(file), run_name="__main__")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four epochs."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("train_hoi", *RUN, *TINY, *EPOCHS, "--output_dir", "run", folder=folder)
    assert "8 images (0 without interactions)" in done.stderr
    assert "5 images (0 without interactions)" in done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_leaves_a_model_scores_figures_and_a_card(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "checkpoint-8"} <= names
    assert {"pipeline_dropkey_hoi.py", "modeling_dropkey_hoi.py", "per_class.txt"} <= names
    results = json.loads((trained / "all_results.json").read_text())
    assert {"eval_mAP", "eval_mAP_known_object", "eval_mean_max_recall"} <= set(results)
    for name in ("predictions.png", "ground_truth.png"):
        with Image.open(trained / name) as figure:
            assert min(figure.size) > 300
    card = (trained / "README.md").read_text()
    assert "human-object-interaction" in card
    assert "model-index" in card
    assert 'pipeline("human-object-interaction"' in card
    config = json.loads((trained / "config.json").read_text())
    assert config["verbs"] == list(SCENE_VERBS)
    assert list(config["id2label"].values()) == list(SCENE_OBJECTS)
    assert config["dropkey_ratio"] == 0.4


@pytest.mark.slow
def test_resuming_in_the_middle_of_an_epoch_ends_in_the_same_bits(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    run("train_hoi", *RUN, *TINY, *EPOCHS, "--output_dir", "run", "--resume_from_checkpoint", "auto", folder=tmp_path)
    expected, found = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_saved_run_is_evaluated_predicted_and_described(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (
        "--dataset",
        "scenes",
        "--validation_scenes",
        "5",
        "--scene_size",
        "64",
        "--use_cpu",
        "--report_to",
        "none",
    )
    arguments = ("--model_name_or_path", str(trained), *data, "--output_dir", "scores", "--qpic_vcoco")
    here("evaluate_hoi", monkeypatch, tmp_path, *arguments, "--per_device_eval_batch_size", "3")
    again = json.loads((tmp_path / "scores" / "eval_results.json").read_text())
    before = json.loads((trained / "eval_results.json").read_text())
    assert again["eval_mAP"] == pytest.approx(before["eval_mAP"])
    assert "eval_qpic_vcoco_mAP_all" in again
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photo.png")
    here(
        "predict_hoi",
        monkeypatch,
        tmp_path,
        "--model",
        str(trained),
        "--images",
        "photo.png",
        "--out",
        "found",
        "--threshold",
        "0",
    )
    found = json.loads((tmp_path / "found" / "pairs.json").read_text())["photo.png"]
    assert 0 < len(found) <= 4
    with Image.open(tmp_path / "found" / "photo_pairs.png") as drawing:
        assert min(drawing.size) > 300
    capsys.readouterr()
    assert hf_dropkey(["info", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "model.encoder.layers.0.self_attn" in told
    assert "queries start at zero" in told
    assert hf_dropkey(["check", str(trained)]) in (0, 1)
    checked = capsys.readouterr().out
    assert "pipelines" not in checked
    assert hf_dropkey(["export", str(trained), str(tmp_path / "plain")]) == 2
    assert "the DETR inside is" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_overfits_photographs(shared_data: Path, tmp_path: Path) -> None:
    mini = shared_data / "hoi_vcoco_mini"
    if not mini.is_dir():
        pytest.skip("no hoi_vcoco_mini")
    images = [image for image in json.loads((mini / "test_qpic_style.json").read_text()) if image["hoi_annotation"]][
        :6
    ]
    (tmp_path / "four.json").write_text(json.dumps(images))
    # the verbs of these files are F. Zhang's
    verbs = json.loads((mini / "instances_vcoco_test.json").read_text())["classes"]
    (tmp_path / "names.json").write_text(json.dumps({"verbs": verbs}))
    data = (
        [f"--{role}_images" for role in ("train", "validation")],
        [f"--{r}_annotations" for r in ("train", "validation")],
    )
    words = [word for name in data[0] for word in (name, str(mini / "images"))]
    words += [word for name in data[1] for word in (name, str(tmp_path / "four.json"))]
    words += ["--names_file", str(tmp_path / "names.json"), "--image_size", "128", "--max_steps", "250"]
    words += ["--warmup_steps", "25", "--draw_images", "0", "--output_dir", str(tmp_path / "run")]
    recipe = str(ROOT / "scripts" / "recipes" / "hoi_overfit.json")
    # twenty seconds on an idle core
    run("train_hoi", recipe, *words, folder=tmp_path, seconds=1500)
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_mAP"] >= 0.95, results


# --- what needs no training ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the scenes' names."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(id2label=dict(enumerate(SCENE_OBJECTS)), verbs=list(SCENE_VERBS), num_queries=4).save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def evaluate(saved: Path, out: Path, *more: str) -> dict[str, Any]:
    """Scores a saved model on a few scenes in this process."""
    command = [
        *("--model_name_or_path", str(saved), "--output_dir", str(out), "--dataset", "scenes", "--scene_size", "64"),
        *("--validation_scenes", "4", "--use_cpu", "--report_to", "none", "--draw_images", "2", *more),
    ]
    HoiEvaluation.parse(command).execute(command)
    scores: dict[str, Any] = json.loads((out / "eval_results.json").read_text())
    return scores


@pytest.mark.usefixtures("auto_image_processor")
def test_evaluation_alone(saved: Path, tmp_path: Path) -> None:
    scores = evaluate(saved, tmp_path / "scores", "--qpic_vcoco")
    assert 0 <= scores["eval_mAP"] <= 1
    assert scores["eval_loss"] > 0
    # without training data nobody knows which classes are rare
    assert "eval_mAP_rare" not in scores
    assert "ball" in (tmp_path / "scores" / "per_class.txt").read_text()
    assert (tmp_path / "scores" / "predictions.png").is_file()


@pytest.mark.usefixtures("auto_image_processor")
def test_names_in_another_order_score_the_same(saved: Path, tmp_path: Path) -> None:
    expected = evaluate(saved, tmp_path / "first")
    model = tiny_model(id2label=dict(enumerate(SCENE_OBJECTS)), verbs=list(SCENE_VERBS), num_queries=4)
    order = [3, 1, 4, 0, 2]
    model.config.verbs = [SCENE_VERBS[verb] for verb in order]
    with torch.no_grad():
        model.verb_classifier.weight.copy_(model.verb_classifier.weight[order])
        model.verb_classifier.bias.copy_(model.verb_classifier.bias[order])
    model.save_pretrained(tmp_path / "model")
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(tmp_path / "model")
    scores = evaluate(tmp_path / "model", tmp_path / "second")
    assert scores["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert scores["eval_mAP"] == pytest.approx(expected["eval_mAP"])


@pytest.mark.usefixtures("auto_image_processor")
def test_a_model_of_other_verbs_is_refused(tmp_path: Path) -> None:
    tiny_model(id2label=dict(enumerate(SCENE_OBJECTS)), verbs=["hold", "fly"]).save_pretrained(tmp_path / "model")
    DetrImageProcessorPil().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="verbs that the model does not know"):
        evaluate(tmp_path / "model", tmp_path / "scores")


def test_evaluation_needs_a_model_and_does_not_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model_name_or_path"):
        HoiEvaluation.parse(["--output_dir", str(tmp_path), "--use_cpu"])
    with pytest.raises(ValueError, match="--do_train is of"):
        HoiEvaluation.parse(["--output_dir", str(tmp_path), "--do_train", "--model_name_or_path", "x", "--use_cpu"])


def test_more_pairs_than_queries_are_found_before_training(tmp_path: Path) -> None:
    command = ["--output_dir", str(tmp_path / "run"), *RUN, *TINY, "--max_steps", "1", "--num_queries", "1"]
    job = HoiJob.parse([*command, "--train_scenes", "40"])
    job.begin()
    with pytest.raises(ValueError, match="has 2 pairs, and the model 1 queries"):
        job.prepare(None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--draw_threshold", "1.5"), "draw_threshold=1.5 is outside"),
        (("--draw_images", "-1"), "draw_images=-1 is below 0"),
        (("--vcoco_file", "x.json"), "need --vcoco_file and --coco_file"),
        (("--flip_probability", "2"), "--flip_probability 2.0 is outside"),
        (("--dropkey_ratio", "1.0"), r"\[0, 1\)"),
        (("--attention_dropout", "0.1"), "DropKey replaces dropout"),
    ],
)
def test_arguments_that_make_no_sense_stop_before_any_data(
    tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    command = ["--output_dir", str(tmp_path / "run"), "--dataset", "scenes", "--use_cpu", "--do_train", *more]
    with pytest.raises(Exception, match=message):
        HoiJob.parse(command).begin()


def test_predictions_of_no_image(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, message in ((("--images", "no.png"), "no image file or folder"), (("--images", "."), "no image in")):
        with pytest.raises(FileNotFoundError, match=message):
            here("predict_hoi", monkeypatch, tmp_path, "--model", str(saved), "--out", "found", *more)
    with pytest.raises(ValueError, match="--threshold 2.0 is outside"):
        here(
            "predict_hoi",
            monkeypatch,
            tmp_path,
            "--model",
            str(saved),
            "--out",
            "found",
            "--images",
            ".",
            "--threshold",
            "2",
        )


@pytest.mark.usefixtures("auto_image_processor")
def test_images_of_one_name_get_files_of_their_own(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "a.tif")
    here("predict_hoi", monkeypatch, tmp_path, "--model", str(saved), "--out", "found", "--images", "one", "two")
    assert {file.name for file in (tmp_path / "found").glob("*.png")} == {"a_pairs.png", "a_2_pairs.png"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "other" / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has model_type 'vit' and finds no pairs"):
        here("predict_hoi", monkeypatch, tmp_path, "--model", "other", "--out", "found", "--images", "one")


def test_the_saved_model_runs_in_the_pipeline(saved: Path) -> None:
    make: Any = pipeline
    found = make("human-object-interaction", model=str(saved), trust_remote_code=True)
    assert len(found(Image.new("RGB", (64, 48)), threshold=0.0)) == 4


def test_figures_of_many_pairs() -> None:
    pair = {"person_box": [1, 1, 20, 30], "object_box": None, "object": None, "verbs": {"walk": 0.5}}
    other = {**pair, "object_box": [10, 10, 30, 30], "object": "ball", "verbs": ["hold", "look_at"]}
    image = Image.new("RGB", (40, 32))
    figure = interactions(
        [image, image], [("annotated", [[pair] * 12, [other]]), ("found", [[], [other]])], title="many"
    )
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert "and 4 more" in texts
    assert "1 walk 0.50: no object" in texts
    assert "1 hold, look_at: ball" in texts
    with pytest.raises(ValueError, match="at least one image"):
        interactions([], [("found", [])], title="none")
    with pytest.raises(ValueError, match="give pairs for every image"):
        interactions([image], [("found", [])], title="none")
