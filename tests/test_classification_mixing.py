"""Mixing, erasing, RandAugment, stochastic depth and patch dropout from the command line, in a run that resumes to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import job, saved

from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.models.modeling_dropkey import DropPath
from hf_dropkey.patching import dropkey_disabled
from hf_dropkey.patching.sites import transformers_model


EVERYTHING: tuple[str, ...] = (
    "--mixup",
    "0.4",
    "--cutmix",
    "1.0",
    "--random_erasing",
    "0.5",
    "--augment",
    "randaugment",
)
EVERYTHING += (
    "--drop_path_rate",
    "0.3",
    "--patch_dropout",
    "0.5",
    "--label_smoothing_factor",
    "0.1",
    "--gradient_accumulation_steps",
    "2",
)
EVERYTHING += ("--per_device_train_batch_size", "4")


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize("lora", [(), ("--lora_r", "2", "--lora_dropout", "0.1")], ids=["whole", "lora"])
def test_a_run_with_everything_resumes_to_the_same_bits(lora: tuple[str, ...], tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    source = saved("dinov2", tmp_path / "source")
    words = (*EVERYTHING, *lora, "--layer_decay", "0.8", "--dataloader_num_workers", "1")
    job(source, tmp_path / "whole", *words).execute(["train"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    job(source, tmp_path / "run", *words, "--resume_from_checkpoint", "auto").execute(["train"])
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "run"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    # evaluation is of whole images and their labels
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(results["eval_nll"], rel=0.1)

    other = [word if word != "randaugment" else "trivialaugment" for word in words]
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "other" / "checkpoint-1")
    training = job(source, tmp_path / "other", *other, "--resume_from_checkpoint", "auto")
    with pytest.raises(ValueError, match="--augment randaugment there and trivialaugment here"):
        training.execute(["train"])


@pytest.mark.usefixtures("auto_image_processor")
def test_batches_to_train_on_are_mixed_and_those_to_evaluate_on_are_not(tmp_path: Path) -> None:
    training = job(saved("vit", tmp_path / "source"), tmp_path / "run", "--mixup", "1.0")
    training.check()
    data = training.load()
    trainer = training.trainer(training.make_model(data), data)
    mixed, plain = next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))
    assert mixed["labels"].shape == (8, 10) and torch.allclose(mixed["labels"].sum(dim=1), torch.ones(8))
    assert ((mixed["labels"] > 0).sum(dim=1) == 2).any() and "row" not in mixed
    assert plain["labels"].dtype == torch.int64 and plain["labels"].ndim == 1


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize("name", ["dinov2", "beit", "swin", "dinov3"])
def test_stochastic_depth_reaches_the_layers_of_models_that_have_it(name: str, tmp_path: Path) -> None:
    training = job(saved(name, tmp_path / "source"), tmp_path / "run", "--drop_path_rate", "0.4")
    training.check()
    model = training.make_model(training.load())
    rates = [getattr(part, "drop_prob", 0) for part in model.modules() if "DropPath" in type(part).__name__]
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize("words", [(), ("--lora_r", "2")], ids=["whole", "lora"])
def test_stochastic_depth_is_added_where_there_is_none(words: tuple[str, ...], tmp_path: Path) -> None:
    source = saved("vit", tmp_path / "source")
    training = job(source, tmp_path / "run", "--drop_path_rate", "0.4", *words)
    training.check()
    model = training.make_model(training.load())
    assert transformers_model(model).config.dropkey_drop_path_rate == 0.4
    images = torch.randn(64, 3, 32, 32)
    with dropkey_disabled(model):
        dropped = (model.train()(pixel_values=images).logits != model.eval()(pixel_values=images).logits).any(dim=1)
    assert dropped.sum() > 16
    with pytest.raises(ValueError, match=r"--drop_path_rate 1.0 is outside \[0, 1\)"):
        job(source, tmp_path / "run", "--drop_path_rate", "1.0").check()


@pytest.mark.usefixtures("auto_image_processor")
def test_a_run_with_added_stochastic_depth_is_saved_and_taken_up(tmp_path: Path) -> None:
    source = saved("vit", tmp_path / "source")
    job(source, tmp_path / "run", "--drop_path_rate", "0.4").execute(["train"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dropkey_drop_path_rate"] == 0.4
    assert "drop path: largest rate of a layer" in (tmp_path / "run" / "README.md").read_text()
    # the saved model remembers it; an argument changes it
    for words, expected in (((), 0.4), (("--drop_path_rate", "0.1"), 0.1), (("--drop_path_rate", "0"), None)):
        again = job(tmp_path / "run", tmp_path / "again", *words)
        again.check()
        model = again.make_model(again.load())
        assert getattr(model.config, "dropkey_drop_path_rate", None) == expected


@pytest.mark.usefixtures("auto_image_processor")
def test_a_run_with_patch_dropout_is_saved_and_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = saved("vit", tmp_path / "source")
    caplog.set_level("INFO")
    job(source, tmp_path / "run", "--patch_dropout", "0.5").execute(["train"])
    assert "patch dropout on ViTForImageClassification: a fraction 0.5 of the patches" in caplog.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dropkey_patch_dropout_rate"] == 0.5
    assert "patch dropout: fraction of the patches" in (tmp_path / "run" / "README.md").read_text()
    for words, expected in (((), 0.5), (("--patch_dropout", "0.25"), 0.25), (("--patch_dropout", "0"), None)):
        again = job(tmp_path / "run", tmp_path / "again", *words)
        again.check()
        model = again.make_model(again.load())
        assert getattr(model.config, "dropkey_patch_dropout_rate", None) == expected
    with pytest.raises(ValueError, match=r"--patch_dropout 1.0 is outside \[0, 1\); choose"):
        job(source, tmp_path / "run", "--patch_dropout", "1.0")
    swin = job(saved("swin", tmp_path / "swin"), tmp_path / "run", "--patch_dropout", "0.5")
    swin.check()
    with pytest.raises(ValueError, match=r"--patch_dropout 0.5 cannot be had: .* windows of the grid"):
        swin.make_model(swin.load())


def test_families_from_scratch_take_the_same_arguments(tmp_path: Path) -> None:
    words = ["--do_train", "--output_dir", str(tmp_path / "run"), "--use_cpu", "--model_family"]
    training = ClassificationJob.parse([*words, "ceit", "--drop_path_rate", "0.2"])
    training.check()
    model = training.make_model(training.load())
    assert max(part.ratio for part in model.modules() if isinstance(part, DropPath)) == pytest.approx(0.2)
    vit = ClassificationJob.parse([*words, "vit", "--drop_path_rate", "0.2"])
    vit.check()
    assert vit.make_model(vit.load()).config.dropkey_drop_path_rate == 0.2
    with pytest.raises(ValueError, match="--mixup and --cutmix replace the model's loss, and this one has dense_head"):
        ClassificationJob.parse([*words, "volo", "--cutmix", "1"]).check()
    without = '{"dense_head": false, "mix_token": false}'
    ClassificationJob.parse([*words, "volo", "--cutmix", "1", "--config_overrides", without]).check()
