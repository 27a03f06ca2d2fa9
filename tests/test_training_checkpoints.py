"""Folders that lack something, are damaged or belong to another run are told before training."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SHAPE
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.saved import check_model_folder
from hf_dropkey.training.checkpoints import (
    check_resumable,
    check_same_model,
    checkpoints_in,
    damage,
    last_whole,
    prepare_output_folder,
    step_of,
)
from hf_dropkey.training.record import run_settings, tell_changes


ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoint_in(folder: Path, **shards: str) -> Path:
    """A checkpoint with small stand-ins for the trainer's files."""
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(folder, **shards)
    for name in ARCHIVES:
        torch.save({"step": torch.arange(100)}, folder / name)
    write_state(folder)
    return folder


def write_state(folder: Path, **settings: Any) -> None:
    """The trainer's state, as a run with these settings writes it."""
    record = {"RunRecord": {"args": {"settings": settings}, "attributes": {}}} if settings else {}
    step = step_of(folder) or 2
    state = {"global_step": step, "max_steps": 20, "stateful_callbacks": record}
    (folder / "trainer_state.json").write_text(json.dumps(state))


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
    ["config.json", "model.safetensors", "modeling_dropkey_vit.py", "dropkey.py", "trainer_state.json", *ARCHIVES],
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


def cut(file: Path) -> None:
    """Leaves the first half of a file, as a process does that is killed while it writes."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil(file: Path) -> None:
    """Changes bytes in the middle of a file, as a disk does."""
    content = bytearray(file.read_bytes())
    # the numbers of the tensor in it, past which only the directory of the archive comes
    place = content.index(bytes(torch.arange(100).numpy())) + 80
    content[place : place + 4] = b"\xff" * 4
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trainer_state.json", *ARCHIVES])
def test_a_file_that_is_cut_off_is_named(run, name):
    cut(run / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} .*damaged"):
        check_resumable(run / "checkpoint-2")


@pytest.mark.parametrize("name", ARCHIVES)
def test_other_bytes_in_the_middle_of_a_file_are_named(run, name):
    spoil(run / "checkpoint-2" / name)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        check_resumable(run / "checkpoint-2")


def test_a_random_state_of_each_process_is_needed(run):
    folder = run / "checkpoint-2"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    write_state(folder, world_size=2)
    with pytest.raises(FileNotFoundError, match="checkpoint-2 lacks 1 of 2 rng_state"):
        check_resumable(folder)
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    check_resumable(folder)


def test_a_sharded_state_is_whole_with_its_last_file(tmp_path):
    folder = tmp_path / "checkpoint-2"
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / part).mkdir(parents=True)
        (folder / part / ".metadata").touch()
    for name in ("scheduler.pt", "rng_state_0.pth"):
        torch.save({}, folder / name)
    write_state(folder)
    check_resumable(folder)
    (folder / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match="lacks optimizer_0/.metadata"):
        check_resumable(folder)


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
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint to resume from: no checkpoint-\* folder"):
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


@pytest.mark.parametrize("resume", ["true", "auto"])
def test_a_torn_checkpoint_is_passed_over_reported_and_kept(run, resume, caplog):
    cut(run / "checkpoint-10" / "optimizer.pt")
    expected = (run / "checkpoint-10" / "optimizer.pt").read_bytes()
    assert prepare_output_folder(run, resume=resume, overwrite=False) == run / "checkpoint-2"
    assert "checkpoint-10 is not whole" in caplog.text and "left to you as aside-checkpoint-10" in caplog.text
    assert (run / "aside-checkpoint-10" / "optimizer.pt").read_bytes() == expected
    # another one of the same step
    checkpoint_in(run / "checkpoint-10")
    (run / "checkpoint-10" / "trainer_state.json").unlink()
    assert prepare_output_folder(run, resume=resume, overwrite=False) == run / "checkpoint-2"
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "aside-checkpoint-10"}
    assert not (run / "aside-checkpoint-10" / "trainer_state.json").exists()


def test_a_torn_checkpoint_before_a_whole_one_stays_where_it_is(run):
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert prepare_output_folder(run, resume="true", overwrite=False) == run / "checkpoint-10"
    assert (run / "checkpoint-2").is_dir()
    assert last_whole(run) == (run / "checkpoint-10", {})
    assert [damage(one) is None for one in checkpoints_in(run)] == [False, True]


def test_later_checkpoints_are_kept_apart_from_a_run_that_writes_their_steps_again(run, caplog):
    assert prepare_output_folder(run, resume=str(run / "checkpoint-2"), overwrite=False) == run / "checkpoint-2"
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "aside-checkpoint-10"}
    assert "checkpoint-10 is of a later step" in caplog.text


def test_nothing_but_torn_checkpoints_starts_anew_only_with_auto(run):
    for step in (2, 10):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2 lacks trainer_state\.json.*checkpoint-10 lacks"):
        prepare_output_folder(run, resume="true", overwrite=False)
    assert prepare_output_folder(run, resume="auto", overwrite=False) is None
    assert {path.name for path in run.iterdir()} == {"aside-checkpoint-10"}


def test_auto_starts_a_run_and_does_not_write_over_a_finished_model(tmp_path):
    assert prepare_output_folder(tmp_path / "new", resume="auto", overwrite=False) is None
    # what was stopped before its first checkpoint has left its log
    (tmp_path / "log" / "runs").mkdir(parents=True)
    assert prepare_output_folder(tmp_path / "log", resume="auto", overwrite=False) is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(FileExistsError, match="it may hold another run"):
        prepare_output_folder(tmp_path / "model", resume="auto", overwrite=False)


@pytest.mark.parametrize("resume", [None, "true", "auto"])
def test_an_output_folder_that_is_a_file_or_cannot_be_written_is_told(tmp_path, monkeypatch, resume):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="file is a file; choose another one"):
            prepare_output_folder(output, resume=resume, overwrite=False)

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"nothing can be written to .*new \(Read-only file system\)"):
        prepare_output_folder(tmp_path / "new", resume=resume, overwrite=False)


SETTINGS = {
    "world_size": 1,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "learning_rate": 0.1,
    "max_steps": 4,
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}, "16 images a step as before"),
        ({"per_device_train_batch_size": 32}, "32 images a step, 16 before: step 2 came after 32 .* now counts as 64"),
        ({"world_size": 2}, "world_size 1 there and 2 here: .* DropKey draws other masks"),
        ({"seed": 1}, "seed 0 there and 1 here: the images of an epoch come in another order"),
        ({"learning_rate": 0.2}, "learning_rate 0.1 there and 0.2 here: .* the old value, which stays in force"),
        ({"max_steps": 9}, "max_steps 4 there and 9 here: the schedule"),
    ],
)
def test_changed_settings_of_the_run_are_told_with_what_they_mean(run, changes, told, caplog):
    write_state(run / "checkpoint-2", **SETTINGS)
    found = tell_changes(run / "checkpoint-2", {**SETTINGS, **changes})
    assert len(found) == (told is not None)
    if told is not None:
        assert re.search(told, found[0]) and re.search(told, caplog.text)


def test_a_checkpoint_that_tells_nothing_of_its_run_is_told(run, tmp_path):
    settings = run_settings(TrainingArguments(str(tmp_path / "new"), use_cpu=True))
    assert "cannot be compared" in tell_changes(run / "checkpoint-2", settings)[0]
