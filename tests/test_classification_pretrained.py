"""Any pretrained vision model of Transformers trains with DropKey: new classifiers, other image sizes, clear refusals."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from stock_models import MODELS, SIDE, SMALL, SWIN, VIT, job, saved, words_of
from transformers import AutoModelForImageClassification

from hf_dropkey import apply_dropkey, layer_ratios
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.classification.pretrained import resized_bias_table, resized_table
from hf_dropkey.inspection.analysis import drop_schedule, measured_drops


# where Transformers (5.13) reads no image processor without torchvision, the file is skipped
pytestmark = pytest.mark.usefixtures("auto_image_processor")


def check_measured(model: Any, ratios: list[float]) -> None:
    """The attentions of a model drop the fractions of keys that the schedule gives them."""
    drops = [
        drop
        for drop in measured_drops(model, {"pixel_values": torch.randn(4, 3, SIDE, SIDE)}, passes=4)
        if drop.fractions
    ]
    assert [drop.ratio for drop in drop_schedule(model)] == pytest.approx(ratios)
    # a mask says nothing of an attention at ratio 0
    assert [drop.ratio for drop in drops if drop.ratio] == pytest.approx([ratio for ratio in ratios if ratio])
    for drop in drops:
        deviation = (drop.ratio * (1 - drop.ratio) / (drop.scores * len(drop.fractions))) ** 0.5
        mean = sum(drop.fractions) / len(drop.fractions)
        assert abs(mean - drop.ratio) <= 4 * deviation + 0.02, (drop.name, mean)


@pytest.mark.parametrize("name", MODELS)
def test_a_pretrained_model_trains_with_dropkey_and_is_saved_for_others(name: str, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ("--dropkey_ratio", "0.6", "--head_learning_rate", "0.01")
    source = saved(name, tmp_path / "source")
    job(source, run, *words).execute(["python", "train.py"])
    config = json.loads((run / "config.json").read_text())
    assert config["dropkey_ratio"] == 0.6 and len(config["id2label"]) == 10
    assert (run / "README.md").is_file() and (run / "preprocessor_config.json").is_file()

    # a run that was stopped after the first step
    shutil.copytree(run / "checkpoint-1", tmp_path / "stopped" / "checkpoint-1")
    job(source, tmp_path / "stopped", *words, "--resume_from_checkpoint", "auto").execute(["python", "train.py"])
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "stopped"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)

    # reloaded, it is evaluated as it was at the end, and classifies
    again = AutoModelForImageClassification.from_pretrained(run).eval()
    data = evaluation_rows(source, tmp_path / "other")
    with torch.no_grad():
        logits = again(pixel_values=data["pixel_values"]).logits
    results = json.loads((run / "eval_results.json").read_text())
    assert float(torch.nn.functional.cross_entropy(logits, data["labels"])) == pytest.approx(
        results["eval_nll"], abs=1e-4
    )
    classify = hf.pipeline("image-classification", str(run), device="cpu")
    found = classify(Image.new("RGB", (40, 40), (200, 30, 30)), top_k=10)
    assert len(found) == 10 and sum(one["score"] for one in found) == pytest.approx(1, abs=1e-3)

    report = apply_dropkey(again)
    assert len(report.sites) == (4 if "swin" in name else 3)
    check_measured(again, layer_ratios(len(report.sites), 0.6))


def kill_after(checkpoint: Path, process: Any) -> None:
    """Kills a run, as `kill -9` does, once a checkpoint is whole; fails if it ended before."""
    deadline = time.monotonic() + forked.SECONDS
    # written last
    while not (checkpoint / "trainer_state.json").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert forked.kill(process), "the run ended before it was killed; give it more steps"
    assert (checkpoint / "trainer_state.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "extra"),
    [("deit", ()), ("beit", ()), ("dinov2 with registers", ("--lora_r", "4")), ("swin", ())],
)
def test_a_run_whose_process_is_killed_ends_in_the_same_bits(
    name: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    source, log = saved(name, tmp_path / "source"), tmp_path / "log"
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(output: Path) -> Any:
        # the same command starts the run and goes on with it
        words = ("--max_steps", "12", "--save_steps", "2", "--logging_steps", "1", "--report", "False", *extra)
        return forked.start(
            "train_image_classification.py",
            *words_of(source, output, *words, "--resume_from_checkpoint", "auto"),
            log=log,
        )

    forked.finish(start(whole), log=log)
    kill_after(killed / "checkpoint-4", start(killed))
    weights = "adapter_model.safetensors" if extra else "model.safetensors"
    assert not (killed / weights).exists()
    forked.finish(start(killed), log=log)
    assert "going on from" in log.read_text()
    found, expected = (load_file(folder / weights) for folder in (killed, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (killed, whole)]
    again, once = ([one["loss"] for one in entries if "loss" in one] for entries in logs)
    assert again == once and len(once) == 12


def evaluation_rows(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The images that a run evaluates on, and their labels."""
    training = job(source, folder)
    training.check()
    data = training.load()
    training.transform(data)
    rows = [data.evaluation[place] for place in range(len(data.evaluation))]
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "dinov2", "siglip", "siglip vision", "clip vision", "dinov3"])
def test_another_image_size_resizes_the_positions_once(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    training = job(source, tmp_path / "run", "--image_size", "48")
    training.check()
    model = training.make_model(training.load())
    with torch.no_grad():
        assert model.eval()(pixel_values=torch.randn(2, 3, 48, 48)).logits.shape == (2, 10)
    model.save_pretrained(tmp_path / "bigger")
    training.processor.save_pretrained(tmp_path / "bigger")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "bigger")
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(again.eval()(pixel_values=images).logits, model(pixel_values=images).logits)
    # the tables hold the old values at another resolution, none is new
    before = MODELS[name][0].from_pretrained(source).state_dict()
    for key, value in model.state_dict().items():
        old = before.get(key.removeprefix("features.") if key not in before else key)
        if "position" in key and old is not None and old.shape != value.shape:
            assert torch.isclose(value.mean(), old.mean(), atol=0.02) and value.std() < 1.5 * old.std()


@pytest.mark.parametrize("side", ["0", "-48"])
def test_an_image_size_that_is_none_is_told(side: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--image_size {side} is below 1"):
        job(saved("dinov2", tmp_path / "source"), tmp_path / "run", "--image_size", side).check()


def test_a_native_vit_takes_another_image_size_too(tmp_path: Path) -> None:
    source = saved("vit", tmp_path / "source")
    words = ["--model_name_or_path", str(source), "--image_size", "48", "--output_dir", str(tmp_path / "run")]
    training = ClassificationJob.parse([*words, "--do_train", "--ignore_mismatched_sizes"])
    training.check()
    model = training.make_model(training.load())
    assert type(model).__name__ == "DropKeyViTForImageClassification" and model.config.image_size == 48
    old = MODELS["vit"][0].from_pretrained(source).vit.embeddings.position_embeddings
    new: Any = model.get_parameter("vit.embeddings.position_embeddings")
    assert new.shape == (1, 37, 32) and torch.equal(new[:, :1], old[:, :1])


def test_tables_at_the_same_grid_stay_as_they_are() -> None:
    table = torch.randn(1, 17, 4)
    assert torch.equal(resized_table(table, table, (4, 4), "t"), table)
    assert torch.equal(resized_table(table[0, 1:], table[0, 1:], (4, 4), "t"), table[0, 1:])
    with pytest.raises(ValueError, match="t has 18 positions, not 1 and a square; leave out --image_size"):
        resized_table(torch.randn(1, 18, 4), torch.randn(1, 10, 4), (3, 3), "t")
    biases = torch.randn(7 * 7 + 3, 2)
    assert torch.equal(resized_bias_table(biases, biases, (4, 4)), biases)
    assert torch.equal(resized_bias_table(biases, torch.empty(5 * 5 + 3, 2), (3, 3))[-3:], biases[-3:])


def refused(source: Path, folder: Path, match: str, *words: str) -> None:
    def start() -> None:
        training = job(source, folder / "run", *words)
        training.check()
        training.make_model(training.load())

    with pytest.raises(ValueError, match=match):
        start()


def test_what_cannot_be_trained_is_refused_before_training(tmp_path: Path) -> None:
    bert = hf.BertModel(hf.BertConfig(**SMALL, vocab_size=99, max_position_embeddings=16))
    bert.save_pretrained(tmp_path / "bert")
    refused(
        tmp_path / "bert", tmp_path, r"bert \(model_type 'bert'\) cannot classify images.*takes input_ids, not images"
    )
    mae = hf.ViTMAEModel(hf.ViTMAEConfig(**VIT, decoder_num_hidden_layers=1))
    mae.save_pretrained(tmp_path / "mae")
    refused(tmp_path / "mae", tmp_path, "masks random patches of every image")
    # convolutions only: nothing to drop
    shape: dict[str, Any] = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    hf.ConvNextForImageClassification(hf.ConvNextConfig(**shape)).save_pretrained(tmp_path / "convnext")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "convnext")
    refused(tmp_path / "convnext", tmp_path, "no attention")
    # windows by the head: an attention that Transformers' interface does not reach
    swinv2 = hf.Swinv2ForImageClassification(hf.Swinv2Config(**SWIN))
    swinv2.save_pretrained(tmp_path / "swinv2")
    hf.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "swinv2")
    refused(tmp_path / "swinv2", tmp_path, "Swinv2")


def test_sizes_that_do_not_fit_are_refused_with_the_next_step(tmp_path: Path) -> None:
    source = saved("siglip", tmp_path / "siglip", side=48)
    refused(source, tmp_path, r"does not take the images of 48 x 48 pixels.*pass --image_size")
    refused(
        source,
        tmp_path,
        "--image_size 45 is not a multiple of the model's patches of 8 pixels; choose.* 40",
        "--image_size",
        "45",
    )
    hf.ViTImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False).save_pretrained(source)
    refused(source, tmp_path, "makes images of different sizes.*pass --image_size")


def test_arguments_for_patched_models_are_refused_for_others(tmp_path: Path) -> None:
    source = saved("vit", tmp_path / "vit")
    words = ["--model_name_or_path", str(source), "--output_dir", str(tmp_path / "run"), "--do_eval"]
    with pytest.raises(ValueError, match="--dropkey_include is for models that apply_dropkey patches"):
        ClassificationJob.parse([*words, "--dropkey_include", "*.0.*"]).check()
    training = job(
        source, tmp_path / "run", "--dropkey_exclude", "*layers.0*", "--config_overrides", '{"qkv_bias": true}'
    )
    training.check()
    model = training.make_model(training.load())
    assert len(drop_schedule(model)) == 2
    refused(source, tmp_path, r"ViTConfig has no fields \['mix_token'\]", "--config_overrides", '{"mix_token": true}')


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--dropkey_ratio", "1.0"], "ratio"),
        (["--dropkey_ratio", "0.1", "--dropkey_schedule", "linear"], "schedule"),
        (["--dropkey_ratio", "0.1", "--dropkey_pattern", "blok"], "pattern"),
        (["--image_size", "45"], "--image_size 45 is not a multiple of the model's patches of 8 pixels"),
    ],
)
def test_settings_are_checked_before_data_and_weights(tmp_path: Path, words: list[str], match: str) -> None:
    source = saved("siglip", tmp_path / "siglip")
    training = job(source, tmp_path / "run", *words)
    with pytest.raises(ValueError, match=match):
        training.check()
