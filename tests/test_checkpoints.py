"""Folders that lack something, are damaged or belong to another run are told before training."""

import json
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.checkpoints import (
    TRAINER_FILES,
    check_model_folder,
    check_resumable,
    check_same_model,
    prepare_output_folder,
)


SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def checkpoint_in(folder: Path, **shards: str) -> Path:
    """A checkpoint with empty stand-ins for the trainer's files."""
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(folder, **shards)
    for name in (*TRAINER_FILES, "rng_state.pth"):
        (folder / name).touch()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 10):
        checkpoint_in(tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def test_whole_folders_pass(tmp_path, run):
    check_resumable(run / "checkpoint-2")
    ViTForImageClassification(ViTConfig(**SHAPE)).save_pretrained(tmp_path / "stock")
    check_model_folder(tmp_path / "stock")
    check_model_folder(checkpoint_in(tmp_path / "shards", max_shard_size="5KB"))


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "modeling_dropkey_vit.py", "dropkey.py", *TRAINER_FILES, "rng_state.pth"],
)
def test_a_missing_file_is_named(run, name):
    (run / "checkpoint-2" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-2 lacks .*{name}"):
        check_resumable(run / "checkpoint-2")


def test_all_missing_files_are_named_at_once(run):
    for name in ("model.safetensors", "optimizer.pt"):
        (run / "checkpoint-2" / name).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors, optimizer.pt;"):
        check_resumable(run / "checkpoint-2")


def test_a_missing_shard_is_named(tmp_path):
    folder = checkpoint_in(tmp_path / "shards", max_shard_size="5KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        check_model_folder(folder)


def test_weights_that_are_cut_off_are_named(run):
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors are damaged"):
        check_resumable(run / "checkpoint-2")


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone is not a folder"):
        check_resumable(tmp_path / "gone")


def test_code_in_another_repository_is_not_missing(run):
    file = run / "checkpoint-2" / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {"AutoConfig": "somebody/code--elsewhere.Config"}
    file.write_text(json.dumps(config))
    check_model_folder(run / "checkpoint-2")


def test_a_new_run_needs_an_empty_folder(tmp_path, run):
    assert prepare_output_folder(tmp_path / "new", resume=None, overwrite=False) is None
    (tmp_path / "empty").mkdir()
    assert prepare_output_folder(tmp_path / "empty", resume=None, overwrite=False) is None
    with pytest.raises(FileExistsError, match=r"run is not empty.*--resume_from_checkpoint true.*--overwrite"):
        prepare_output_folder(run, resume=None, overwrite=False)
    with pytest.raises(FileExistsError):
        prepare_output_folder(run, resume="false", overwrite=False)


def test_overwriting_deletes_checkpoints_and_nothing_else(run):
    (run / "notes.txt").touch()
    assert prepare_output_folder(run, resume=None, overwrite=True) is None
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_resuming_takes_the_last_checkpoint_or_the_one_asked_for(run):
    assert prepare_output_folder(run, resume="true", overwrite=False) == run / "checkpoint-10"
    asked = str(run / "checkpoint-2")
    assert prepare_output_folder(run, resume=asked, overwrite=False) == run / "checkpoint-2"


def test_resuming_from_nothing_or_with_overwriting_is_an_error(tmp_path, run):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint-\* folder to resume from"):
        prepare_output_folder(tmp_path / "new", resume="True", overwrite=False)
    with pytest.raises(ValueError, match="would delete what --resume_from_checkpoint true needs"):
        prepare_output_folder(run, resume="true", overwrite=True)
    assert (run / "checkpoint-10").is_dir()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dropkey_ratio": 0.5}, "dropkey_ratio 0.1 there and 0.5 here"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 1 there and 2 here"),
        ({"id2label": {0: "cat", 1: "dog"}}, "id2label"),
    ],
)
def test_a_checkpoint_of_another_model_is_told(run, changes, told):
    check_same_model(DropKeyViTConfig(**SHAPE), run / "checkpoint-2")
    with pytest.raises(ValueError, match=f"another model: .*{told}"):
        check_same_model(DropKeyViTConfig(**{**SHAPE, **changes}), run / "checkpoint-2")
