"""What a run keeps of itself in its checkpoints: a resumed run notices other data and other weights, and logs as one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import SHAPE
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.training.checkpoints import check_resumable, damage, prepare_output_folder
from hf_dropkey.training.record import STATE, RunRecord, data_changes, recorded, run_settings, tell_changes
from hf_dropkey.training.trainer import GuardedTrainer


FINGERPRINT = {
    "train": {"rows": 100, "labels": "aa", "names": "bb", "sizes": "cc"},
    "validation": {"rows": 20, "labels": "dd", "names": "ee", "sizes": "ff"},
}


class Rows(Dataset):
    """Sixteen random images of two classes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, Any]:
        pixel_values = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(row))
        return {"pixel_values": pixel_values, "labels": row % 2}


def trainer_of(output: Path, **settings: Any) -> GuardedTrainer:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "save_steps": 3,
        "logging_steps": 4,
        "use_cpu": True,
    }
    usual |= {"save_strategy": "steps", "report_to": "none", "disable_tqdm": True, "learning_rate": 0.01, **settings}
    torch.manual_seed(0)
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE, dropkey_ratio=0.4))
    return GuardedTrainer(model=model, args=TrainingArguments(str(output), **usual), train_dataset=Rows())


TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in log]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"logging_steps": 1}])
def test_the_log_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path: Path, settings: dict) -> None:
    whole = trainer_of(tmp_path, **settings)
    expected = whole.train()
    # of a run that was resumed at step 3 and at step 6, and of one that had nothing left to train
    checkpoint = tmp_path / "checkpoint-6"
    state = json.loads((checkpoint / STATE).read_text())
    state["stateful_callbacks"]["RunRecord"]["attributes"]["progress"]["seconds"] = 1000.0
    state["stateful_callbacks"]["RunRecord"]["attributes"]["resumed"] = [3]
    (checkpoint / STATE).write_text(json.dumps(state))
    for start, steps in ((checkpoint, 4), (tmp_path / "checkpoint-9", 1), (tmp_path / "checkpoint-10", 0)):
        resumed = trainer_of(tmp_path, **settings)
        taken = Count()
        resumed.add_callback(taken)
        found = resumed.train(resume_from_checkpoint=str(start))
        assert taken.steps == steps
        assert without_times(resumed.state.log_history) == without_times(whole.state.log_history)
        assert found.training_loss == expected.training_loss == found.metrics["train_loss"]
        if start == checkpoint:
            assert 1000 < found.metrics["train_runtime"] < 1100
            runtime = found.metrics["train_runtime"]
            assert found.metrics["train_steps_per_second"] == pytest.approx(10 / runtime, abs=2e-3)
            images = 40 * settings.get("gradient_accumulation_steps", 1)
            assert found.metrics["train_samples_per_second"] == pytest.approx(images / runtime, abs=2e-3)
            callbacks: Any = resumed.state.stateful_callbacks
            kept = callbacks["RunRecord"]
            assert kept["attributes"]["resumed"] == [3, 6]


class Count(TrainerCallback):
    """Counts the steps."""

    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def test_a_checkpoint_past_the_end_of_the_run_is_told(tmp_path: Path) -> None:
    trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match=r"of step 10, and this run ends at step 5; raise --max_steps"):
        trainer_of(tmp_path, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("run")
    trainer_of(output, max_steps=4, save_steps=2).train()
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip(weights: Path) -> None:
    content = bytearray(weights.read_bytes())
    content[-200] ^= 1
    weights.write_bytes(content)


def fewer(weights: Path) -> None:
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in sorted(tensors)[::3]}, weights, metadata={"format": "pt"})


def forget_checksum(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    del state["stateful_callbacks"]["RunRecord"]["attributes"]["weights"]
    (checkpoint / STATE).write_text(json.dumps(state))


@pytest.mark.parametrize("harm", [flip, fewer])
def test_other_weights_are_noticed_before_training(run: Path, harm: Any, caplog: pytest.LogCaptureFixture) -> None:
    harm(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-4/model\.safetensors are damaged \(their checksum"):
        prepare_output_folder(run, resume=str(run / "checkpoint-4"), overwrite=False)
    assert prepare_output_folder(run, resume="auto", overwrite=False) == run / "checkpoint-2"
    assert "their checksum" in caplog.text and (run / "aside-checkpoint-4").is_dir()


def test_without_a_checksum_missing_weights_are_noticed(run: Path) -> None:
    # as an earlier release left it
    forget_checksum(run / "checkpoint-4")
    check_resumable(run / "checkpoint-4")
    fewer(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-4 lack \d+ of the model's, such as"):
        check_resumable(run / "checkpoint-4")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (STATE, []),
        (STATE, None),
        (STATE, {}),
        (STATE, {"global_step": "4"}),
        (STATE, {"global_step": 9, "max_steps": 12}),
        (STATE, {"global_step": 4, "max_steps": 3}),
        (STATE, {"global_step": -4}),
        (STATE, {"global_step": 4, "stateful_callbacks": {"RunRecord": {"args": {"settings": {"world_size": "2"}}}}}),
        (STATE, {"global_step": 4, "stateful_callbacks": {"RunRecord": {"attributes": {"progress": {"losses": 1}}}}}),
        ("config.json", []),
        ("config.json", "vit"),
        ("config.json", {}),
        ("config.json", {"model_type": ["vit"]}),
        ("model.safetensors.index.json", []),
        ("model.safetensors.index.json", {"weight_map": []}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}),
    ],
)
def test_json_of_another_kind_is_damage(run: Path, file: str, content: Any) -> None:
    forget_checksum(run / "checkpoint-4")
    (run / "checkpoint-4" / file).write_text(json.dumps(content))
    assert damage(run / "checkpoint-4") is not None
    assert prepare_output_folder(run, resume="true", overwrite=False) == run / "checkpoint-2"


@pytest.mark.parametrize("stateful", [[], {"RunRecord": []}, {"RunRecord": {"args": 3, "attributes": None}}])
def test_a_state_that_keeps_nothing_of_the_run_is_no_damage(run: Path, stateful: Any) -> None:
    (run / "checkpoint-4" / STATE).write_text(json.dumps({"global_step": 4, "stateful_callbacks": stateful}))
    assert damage(run / "checkpoint-4") is None
    assert "cannot be compared" in tell_changes(run / "checkpoint-4", run_settings(trainer_of(run).args))[0]


def test_a_deep_json_file_is_damage(run: Path) -> None:
    (run / "checkpoint-4" / STATE).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "is damaged" in str(damage(run / "checkpoint-4"))


@pytest.mark.parametrize(
    ("split", "change", "told"),
    [
        (
            "train",
            {"rows": 90},
            ["'train' is not what the checkpoint saw .90 images instead of 100.: the run goes on"],
        ),
        ("train", {"rows": 90, "labels": "x", "sizes": "x"}, ["100; other labels; files of other sizes"]),
        ("validation", {"names": "x"}, ["'validation' is not .*other file names"]),
        ("test", {"rows": 1}, ["there is a split 'test' here, unlike there"]),
        ("train", {}, []),
    ],
)
def test_other_data_is_told_in_words(split: str, change: dict, told: list[str]) -> None:
    here = {**FINGERPRINT, **({split: {**FINGERPRINT.get(split, {}), **change}} if change else {})}
    found = data_changes(FINGERPRINT, here)
    assert len(found) == len(told)
    for sentence, expected in zip(found, told, strict=True):
        assert re.search(expected, sentence)


def test_the_fingerprint_is_kept_in_checkpoints_and_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, max_steps=2, save_steps=2)
    trainer.record.data = FINGERPRINT
    trainer.train()
    checkpoint, settings = tmp_path / "checkpoint-2", run_settings(trainer.args)
    assert recorded(checkpoint, "data") == FINGERPRINT
    assert tell_changes(checkpoint, settings, FINGERPRINT) == []
    other = {"train": {**FINGERPRINT["train"], "names": "other"}}
    assert len(tell_changes(checkpoint, settings, other)) == 2
    assert "other file names" in caplog.text and "no split 'validation' here" in caplog.text


def test_a_stock_trainer_resumes_a_guarded_checkpoint(run: Path) -> None:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE, dropkey_ratio=0.4))
    arguments = TrainingArguments(str(run), max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.state.global_step == 6


def test_a_record_keeps_what_it_is_given() -> None:
    record = RunRecord({"seed": 1}, FINGERPRINT)
    assert record.state()["args"] == {"settings": {"seed": 1}, "data": FINGERPRINT}
    assert record.state()["attributes"] == {"progress": {}, "resumed": [], "weights": {}}
