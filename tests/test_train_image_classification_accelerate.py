"""The explicit loop does what `Trainer` does: the same losses, resumed runs in the same bits; and it refuses the rest."""

import json
import runpy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import small_runs
from safetensors.numpy import load_file
from stock_models import saved
from transformers import AutoModelForImageClassification

from hf_dropkey import load_classifier


ROOT = Path(__file__).resolve().parents[1]
TRAINER, LOOP = "train_image_classification.py", "train_image_classification_accelerate.py"
# 96 images in batches of 2 x 8: six steps an epoch, a checkpoint in the middle of the second and one at the end of it
RECIPE = {
    **small_runs.RECIPE,
    "max_eval_samples": 41,
    "check_images": False,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.05,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_steps": 4,
    "disable_tqdm": True,
}


def run(
    script: str, folder: Path, name: str, *arguments: str, base: Mapping[str, Any] = RECIPE, **changes: Any
) -> Path:
    """The output folder of a run that ended well."""
    recipe, log, output = folder / f"{name}.json", folder / f"{name}.log", folder / name
    recipe.write_text(json.dumps({**base, **changes}))
    forked.finish(forked.start(script, str(recipe), "--output_dir", str(output), *arguments, log=log), log=log)
    return output


def history(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the loop."""
    return run(LOOP, tmp_path_factory.mktemp("trained"), "run")


def assert_same_weights(one: Path, other: Path, name: str = "model.safetensors") -> None:
    expected, found = load_file(one / name), load_file(other / name)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_the_losses_are_those_of_the_trainer(trained, tmp_path):
    other = run(TRAINER, tmp_path, "trainer")
    assert len(history(trained, "loss")) == 9
    for name in ("loss", "learning_rate", "eval_accuracy", "eval_nll"):
        assert history(trained, name) == history(other, name), name
    assert history(trained, "eval_loss") == pytest.approx(history(other, "eval_loss"), abs=1e-6)
    assert_same_weights(trained, other)


@pytest.mark.slow
def test_mixed_images_and_rates_by_layer_give_the_losses_of_the_trainer(tmp_path):
    changes = {"mixup": 0.4, "cutmix": 1.0, "random_erasing": 0.3, "augment": "trivialaugment"}
    changes |= {"layer_decay": 0.7, "head_learning_rate": 0.01, "max_steps": 6, "eval_strategy": "no"}
    loop, trainer = run(LOOP, tmp_path, "loop", **changes), run(TRAINER, tmp_path, "trainer", **changes)
    assert history(loop, "loss") == history(trainer, "loss") and len(history(loop, "loss")) == 3
    assert_same_weights(loop, trainer)


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_adapters_are_trained_resumed_and_merged_as_by_the_trainer(tmp_path):
    source = saved("dinov2", tmp_path / "source")
    # the shape is that of the pretrained model
    shape = {*small_runs.TINY, "image_size", "patch_size", "hidden_dropout_prob"}
    base = {name: value for name, value in RECIPE.items() if name not in shape}
    base |= {"model_name_or_path": str(source), "lora_r": 4, "lora_dropout": 0.1, "head_learning_rate": 0.01}
    base |= {"max_steps": 6, "save_steps": 4, "per_device_train_batch_size": 4}
    loop, trainer = (run(script, tmp_path, script, base=base) for script in (LOOP, TRAINER))
    for name in ("loss", "learning_rate", "eval_accuracy", "eval_nll"):
        assert history(loop, name) == history(trainer, name) and history(loop, name), name
    assert_same_weights(loop, trainer, "adapter_model.safetensors")
    names = {path.name for path in loop.iterdir()}
    assert {"adapter_config.json", "base_config.json", "preprocessor_config.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    assert load_classifier(loop).config.dropkey_ratio == 0.4
    assert "adapter of rank 4" in (loop / "README.md").read_text()
    assert not (loop / "checkpoint-4" / "README.md").exists()

    shutil.copytree(loop / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = run(LOOP, tmp_path, "resumed", "--resume_from_checkpoint", "auto", base=base)
    assert history(resumed, "loss") == history(loop, "loss")
    assert_same_weights(loop, resumed, "adapter_model.safetensors")

    shutil.copytree(loop / "checkpoint-4", tmp_path / "merged" / "checkpoint-4")
    whole = run(LOOP, tmp_path, "merged", "--resume_from_checkpoint", "auto", "--merge_adapter", base=base)
    assert (whole / "model.safetensors").is_file() and not (whole / "adapter_config.json").exists()
    measured = [json.loads((folder / "eval_results.json").read_text())["eval_nll"] for folder in (whole, loop)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)


@pytest.mark.slow
def test_another_seed_gives_other_losses(trained, tmp_path):
    """Without this, equal losses might come from a loop that does not train."""
    assert history(run(LOOP, tmp_path, "seed", seed=1), "loss") != history(trained, "loss")


# in the middle of an epoch, and at its end
@pytest.mark.parametrize("step", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_in_the_same_bits(trained, tmp_path, step):
    shutil.copytree(trained / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    resumed = run(LOOP, tmp_path, "run", "--resume_from_checkpoint", "auto")
    for name in ("loss", "eval_nll", "eval_ece"):
        assert history(resumed, name) == history(trained, name), name
    assert_same_weights(trained, resumed)
    assert f"resuming {tmp_path}" not in (tmp_path / "run.log").read_text()


def test_the_run_leaves_what_others_need(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"README.md", "model.safetensors", "preprocessor_config.json", "modeling_dropkey_vit.py"} <= names
    results = json.loads((trained / "all_results.json").read_text())
    assert results["eval_samples"] == 41 and results["train_samples_per_second"] > 0
    assert all(speed > 0 for speed in history(trained, "images_per_second"))
    for folder in (trained, trained / "checkpoint-18"):
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert model.config.dropkey_ratio == 0.4
    assert_same_weights(trained, trained / "checkpoint-18")


@pytest.mark.slow
def test_old_checkpoints_are_deleted_and_precision_is_mixed(tmp_path):
    output = run(LOOP, tmp_path, "run", save_total_limit=1, save_steps=2, max_steps=4, bf16=True, eval_strategy="no")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    full = run(LOOP, tmp_path, "full", max_steps=4, eval_strategy="no")
    assert history(output, "loss") != history(full, "loss")
    assert history(output, "loss") == pytest.approx(history(full, "loss"), abs=0.05)


@pytest.mark.slow
def test_a_changed_batch_is_reported_when_resuming(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    run(LOOP, tmp_path, "run", "--resume_from_checkpoint", "true", gradient_accumulation_steps=1, max_steps=12)
    log = (tmp_path / "run.log").read_text()
    assert "8 images a step, 16 before: step 8 came after 128 images and now counts as 64" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--label_smoothing_factor 0.1",
            "this loop has no label_smoothing_factor; leave out --label_smoothing_factor",
        ),
        ("--push_to_hub", "this loop has no push_to_hub"),
        ("--lora_r 8", "--lora_r 8 adapts a pretrained model, and this one starts from random weights"),
        ("--save_strategy best --metric_for_best_model accuracy", "this loop has no .*metric_for_best_model"),
        ("--report_to comet_ml", "--report_to comet_ml: not installed"),
        ("--resume_from_checkpoint true", "no whole checkpoint to resume from"),
        ("--dropkey_ratio 1.0", r"1\.0"),
    ],
)
def test_what_the_loop_does_not_have_is_an_error(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", [LOOP, "--do_train", "--use_cpu", "--output_dir", "run", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=message):
        runpy.run_path(str(ROOT / "scripts" / LOOP), run_name="__main__")
    assert not (tmp_path / "run").exists()
