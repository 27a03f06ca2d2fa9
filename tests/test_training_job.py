"""What determines the weights of a run, and what happens when in a job."""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.training.arguments import RunArguments
from hf_dropkey.training.job import INDIFFERENT, TrainingJob, public_name
from hf_dropkey.training.lock import RunInProgressError, locked_output
from hf_dropkey.training.trainer import GuardedTrainer


class Rows(Dataset):
    """Eight random images of two classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixel_values = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row))
        return {"pixel_values": pixel_values, "labels": row % 2}


@dataclass
class TinyJob(TrainingJob[Rows]):
    """The smallest task there is; notes what it was called for."""

    TASK = "image-classification"

    run: RunArguments
    training: TrainingArguments

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def check(self) -> None:
        self.calls.append("check")

    def load(self) -> Rows:
        self.calls.append("load")
        return Rows()

    def make_model(self, data: Rows) -> Any:
        self.calls.append("make_model")
        shape: dict[str, Any] = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        }
        # what the first loss would set, and a checkpoint be compared with
        shape["problem_type"] = "single_label_classification"
        return DropKeyViTForImageClassification(DropKeyViTConfig(**shape, image_size=8, patch_size=4))

    def make_trainer(self, model: Any, data: Rows) -> GuardedTrainer:
        self.calls.append("make_trainer")
        return GuardedTrainer(model=model, args=self.training, train_dataset=data, eval_dataset=data)

    def describe(self, data: Rows) -> None:
        self.calls.append("describe")

    def draw(self, trainer: GuardedTrainer, data: Rows) -> None:
        self.calls.append("draw")

    def card(self, data: Rows) -> dict[str, Any]:
        self.calls.append("card")
        return {"dataset": "eight images"}


def job(folder: Path, *words: str) -> TinyJob:
    usual = [
        "--output_dir",
        str(folder),
        "--max_steps",
        "1",
        "--use_cpu",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
    ]
    return TinyJob.parse([*usual, *words])


def test_a_job_trains_evaluates_and_describes(tmp_path: Path) -> None:
    tiny = job(tmp_path / "run", "--do_train", "--do_eval")
    tiny.execute(["python", "tiny.py", "--output_dir", str(tmp_path / "run")])
    assert tiny.calls == ["check", "load", "make_model", "describe", "make_trainer", "draw", "card"]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "train_results.json", "eval_results.json", "README.md"} <= written
    card = (tmp_path / "run" / "README.md").read_text()
    # a local path is cut to its last part
    assert "eight images" in card and "--output_dir run" in card and str(tmp_path) not in card


def test_a_mistake_stops_the_job_before_any_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("somebody's")
    tiny = job(tmp_path, "--do_train")
    with pytest.raises(FileExistsError, match="is not empty"):
        tiny.execute([])
    assert tiny.calls == ["check"]
    with pytest.raises(ValueError, match="nothing to do; pass --do_train"):
        job(tmp_path).execute([])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run with its time and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


AUTO = ("--do_train", "--do_eval", "--resume_from_checkpoint", "auto", "--save_strategy", "steps", "--save_steps", "1")


def test_a_complete_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    job(tmp_path, *AUTO).execute([])
    before = contents(tmp_path)
    assert any(name.endswith("README.md") for name in before)
    for resume in ("auto", "true"):
        again = job(tmp_path, *AUTO, "--resume_from_checkpoint", resume, "--logging_steps", "7")
        again.execute([])
        assert again.calls == ["check"] and contents(tmp_path) == before
    assert f"the run in {tmp_path} is complete, nothing is left to do" in caplog.text
    # what it was not requested yet, it does
    with pytest.raises(ValueError, match=r"is complete, with other settings: learning_rate .* there and 0\.5 here"):
        job(tmp_path, *AUTO, "--learning_rate", "0.5").execute([])
    assert contents(tmp_path) == before
    longer = job(tmp_path, *AUTO, "--max_steps", "3")
    longer.execute([])
    assert "make_trainer" in longer.calls and f"going on from {tmp_path / 'checkpoint-1'}" in caplog.text
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_a_run_that_was_stopped_before_its_results_has_the_times_of_its_training(tmp_path: Path) -> None:
    job(tmp_path, *AUTO).execute([])
    results = json.loads((tmp_path / "train_results.json").read_text())
    (tmp_path / ".run" / "complete").unlink()
    (tmp_path / "train_results.json").unlink()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    state["stateful_callbacks"]["RunRecord"]["attributes"]["progress"]["seconds"] = 1000.0
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    job(tmp_path, *AUTO).execute([])
    again = json.loads((tmp_path / "train_results.json").read_text())
    assert again["train_loss"] == results["train_loss"]
    assert 1000 < again["train_runtime"] < 1100
    assert (tmp_path / ".run" / "complete").is_file()


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = job(tmp_path, *AUTO)
    with locked_output(first.training):
        second = job(tmp_path, "--do_train", "--overwrite_output_dir")
        with pytest.raises(RunInProgressError, match=f"another run writes to {tmp_path}"):
            second.execute([])
        assert second.calls == ["check"]
    first.execute([])


def test_a_local_model_is_shown_by_its_last_part(tmp_path: Path) -> None:
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert public_name(None) is None


@pytest.mark.parametrize("name", sorted(entry.name for entry in fields(TrainingArguments) if entry.init))
def test_every_argument_determines_the_weights_unless_it_is_listed(name: str, tmp_path: Path) -> None:
    tiny = job(tmp_path)
    before = tiny.settings()
    setattr(tiny.training, name, "another value")
    changed = {key for key, value in tiny.settings().items() if before[key] != value}
    assert changed == (set() if name in INDIFFERENT else {name})


def test_what_is_listed_is_an_argument() -> None:
    assert {entry.name for entry in fields(TrainingArguments)} >= INDIFFERENT


def test_the_run_and_the_processes_determine_the_weights(tmp_path: Path) -> None:
    values = job(tmp_path, "--on_nonfinite_loss", "skip").settings()
    assert values["on_nonfinite_loss"] == "skip" and values["world_size"] == "1"
    assert job(tmp_path).settings()["on_nonfinite_loss"] == "stop"
