"""Runs that are killed, filled, misled or split over processes: what is named, what is kept, and where they go on."""

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import small_runs
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from small_runs import FSDP, TINY
from transformers import TrainerCallback, TrainingArguments

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.training import guards as faults
from hf_dropkey.training.checkpoints import checkpoints_in, damage, last_whole
from hf_dropkey.training.guards import (
    SKIPS_IN_A_ROW,
    LossGuard,
    check_devices,
    check_engine,
    named_save,
    note_where_to_resume,
)
from hf_dropkey.training.trainer import GuardedTrainer


SCRIPTS = ("train_image_classification.py", "train_image_classification_accelerate.py")
RECIPE = {
    **small_runs.RECIPE,
    # no multiple of the batch, so that the last one is filled up
    "max_eval_samples": 41,
    "check_images": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def write_recipe(folder: Path, **changes: Any) -> str:
    file = folder / "recipe.json"
    file.write_text(json.dumps({**RECIPE, **changes}))
    return str(file)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def logged(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def metrics_of(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "eval_results.json").read_text())
    return {name: found[f"eval_{name}"] for name in ("accuracy", "loss", "nll", "ece")}


# --- in this process --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_or_skips() -> None:
    with pytest.raises(ValueError, match="on_nonfinite_loss='ignore'; choose stop or skip"):
        LossGuard("ignore")
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan on process 1: lower --learning_rate"):
        LossGuard().look_at([1.0, math.nan], step=3)
    guard = LossGuard("skip")
    guard.look_at([1.0], step=1)
    assert not guard.end_step()
    for step in range(SKIPS_IN_A_ROW):
        guard.look_at([math.inf], step=step)
        assert guard.end_step()
    with pytest.raises(FloatingPointError, match=f"after {SKIPS_IN_A_ROW} skipped steps in a row"):
        guard.look_at([math.inf], step=20)
    assert not guard.end_step() and guard.skipped == SKIPS_IN_A_ROW
    # a good step in between begins the count anew
    guard.look_at([math.inf], step=21)
    assert guard.end_step()


class Images(torch.utils.data.Dataset):
    """Noise in four classes; one image is broken, or ends the process that reads it."""

    def __init__(self, *, nan_at: int = -1, kill_at: int = -1) -> None:
        self.nan_at, self.kill_at = nan_at, kill_at

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.kill_at and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image * (math.nan if index == self.nan_at else 1), "labels": torch.tensor(index % 4)}


def trainer_of(output: Path, data: Images, *, policy: str = "stop", **kwargs: Any) -> GuardedTrainer:
    torch.manual_seed(0)
    config = DropKeyViTConfig(**TINY, image_size=8, patch_size=4, num_channels=1, num_labels=4, dropkey_ratio=0.3)
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 8, "report_to": "none"}
    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **{**settings, **kwargs}
    )
    return GuardedTrainer(
        DropKeyViTForImageClassification(config), arguments, train_dataset=data, on_nonfinite_loss=policy
    )


def test_a_nan_image_stops_the_training_and_the_error_says_where_to_go_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Images(nan_at=5))
    with pytest.raises(FloatingPointError, match="the loss of step [1-8] is nan on process 0") as caught:
        trainer.train()
    whole, _ = last_whole(tmp_path)
    expected = f"last whole checkpoint is {whole}" if whole else "There is no whole checkpoint"
    assert expected in caught.value.__notes__[0]
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("stop", "repair"), [(KeyboardInterrupt(), False), (ValueError("bad"), True)])
def test_who_stops_a_run_has_nothing_to_repair(stop: BaseException, repair: bool, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        """In the fifth step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise stop

    trainer = trainer_of(tmp_path, Images())
    trainer.add_callback(Stop())
    with pytest.raises(type(stop)) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert note.endswith("start the same command with --resume_from_checkpoint auto.")
    assert ("repair what the error names" in note) == repair


def test_a_step_with_a_nan_is_skipped_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Keep(TrainerCallback):
        """The weights after each step."""

        weights: list[torch.Tensor] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.weights.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters()]))

    trainer, keep = trainer_of(tmp_path, Images(nan_at=5), policy="skip", weight_decay=0.5), Keep()
    trainer.add_callback(keep)
    trainer.train()
    unchanged = [torch.equal(one, other) for one, other in zip(keep.weights, keep.weights[1:], strict=False)]
    assert len(keep.weights) == 8 and trainer.loss_guard.skipped == 1
    # all but the skipped one move the weights, by their decay if by nothing else
    assert sum(unchanged) == 1 and bool(keep.weights[-1].isfinite().all())
    assert "The step is skipped, 1 so far" in caplog.text


def test_a_dead_worker_is_named_and_the_checkpoint_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Images(kill_at=3), dataloader_num_workers=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* (Killed|exited unexpectedly)") as caught:
        trainer.train()
    assert "whole checkpoint" in caught.value.__notes__[0]


@contextlib.contextmanager
def doomed_worker() -> Iterator[Callable[[], None]]:
    """Gives what kills a data loader's worker; the signal of its death then raises wherever this process is."""
    loader: Any = iter(torch.utils.data.DataLoader(Images(), num_workers=1))
    try:
        yield loader._workers[0].kill
    finally:
        loader._shutdown_workers()


def test_a_worker_that_dies_during_a_save_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def save() -> None:
        with named_save(tmp_path):
            kill()
            time.sleep(60)

    with doomed_worker() as kill, pytest.raises(RuntimeError, match="DataLoader worker"):
        save()


def test_a_save_of_torch_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"), named_save(tmp_path):
        torch.save({}, tmp_path / "gone" / "optimizer.pt")


def test_a_worker_that_dies_while_another_error_is_handled_is_named_with_where_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(output_dir: Path) -> Any:
        if not interruptions:
            interruptions.append(output_dir)
            kill()
            time.sleep(60)
        return last_whole(output_dir)

    interruptions: list[Path] = []

    with doomed_worker() as kill:
        monkeypatch.setattr(faults, "last_whole", interrupted)
        with pytest.raises(RuntimeError, match="DataLoader worker") as caught, note_where_to_resume(tmp_path):
            raise KeyError("first")
    assert "whole checkpoint" in caught.value.__notes__[0]


def test_a_connection_that_breaks_because_a_worker_dies_is_put_down_to_the_worker(tmp_path: Path) -> None:
    with doomed_worker() as kill:
        # the connection breaks some time before the process is gone
        death = threading.Timer(0.3, kill)
        death.start()
        with pytest.raises(RuntimeError, match="DataLoader worker") as caught, note_where_to_resume(tmp_path):
            raise ConnectionResetError(104, "Connection reset by peer")
        death.join(60)
    assert "whole checkpoint" in caught.value.__notes__[0]


@contextlib.contextmanager
def changeable_file_size() -> Iterator[Any]:
    """Gives what sets the largest size of a file that this process may write, as a full disk does; puts it back.

    No fixture: pytest writes its own report before it ends those.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [2_000, 30_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_is_named_and_the_last_checkpoint_stays_whole(tmp_path: Path, size: int) -> None:
    class Fill(TrainerCallback):
        """From the fifth step on, no file may be longer."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                limit(size)

    trainer = trainer_of(tmp_path, Images(), save_total_limit=1)
    trainer.add_callback(Fill())
    message = r"checkpoint-6 could not be written .* MiB left"
    with pytest.raises(OSError, match=message) as caught, changeable_file_size() as limit:
        trainer.train()
    assert f"last whole checkpoint is {tmp_path / 'checkpoint-4'}." in caught.value.__notes__[0]
    whole, torn = last_whole(tmp_path)
    assert whole == tmp_path / "checkpoint-4" and list(torn) == [tmp_path / "checkpoint-6"]


def test_a_save_that_fails_for_other_reasons_is_named_too(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"gone could not be written \(.*Permission denied"),
        named_save(tmp_path / "gone"),
    ):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(KeyError) as caught, note_where_to_resume(tmp_path):
        raise KeyError("x")
    assert "the next start begins anew" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("environment", "command", "there", "told"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "no"}, "", 0, "4 processes were started"),
        ({"LOCAL_WORLD_SIZE": "4"}, "", 2, "4 processes were started here for one device each, and there are 2"),
        ({"LOCAL_WORLD_SIZE": "4"}, "--use_cpu False", 2, "4 processes"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "", 0, "CUDA_VISIBLE_DEVICES=0 names devices, and there are none"),
        ({"LOCAL_WORLD_SIZE": "4"}, "--use_cpu", 2, None),
        ({"LOCAL_WORLD_SIZE": "4"}, "--use_cpu True", 2, None),
        ({"LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}, "", 0, None),
        ({"LOCAL_WORLD_SIZE": "4"}, "", 4, None),
        # torchrun on a machine without devices
        ({"LOCAL_WORLD_SIZE": "4"}, "", 0, None),
        ({}, "", 0, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, "", 0, None),
    ],
)
def test_processes_for_devices_that_are_not_there_are_told(monkeypatch, environment, command, there, told):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: there)
    if told is None:
        check_devices(environment, command.split())
    else:
        with pytest.raises(ValueError, match=told):
            check_devices(environment, command.split())


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_that_accelerate_would_leave_out_is_told(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    check_engine(accelerator, {})
    with pytest.raises(ValueError, match="accelerate would train with NO instead"):
        check_engine(accelerator, {name: "true"})


# --- in processes of their own ----------------------------------------------------------------------------------------


def kill_in_the_middle(process: Any, output: Path, *, chance: random.Random, saving: bool) -> bool:
    """Kills a run at a random moment, or inside a save; whether it was still running."""
    deadline = time.monotonic() + forked.SECONDS
    before = set(output.glob("checkpoint-*"))
    while process.is_alive() and time.monotonic() < deadline:
        new = [folder for folder in output.glob("checkpoint-*") if folder not in before]
        if new and not saving:
            time.sleep(chance.uniform(0, 0.2))
            break
        if any(not (folder / "trainer_state.json").exists() for folder in new):
            time.sleep(chance.uniform(0, 0.02))
            break
        time.sleep(0.0005)
    return forked.kill(process)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kills"), [(SCRIPTS[0], 12), (SCRIPTS[1], 5)])
def test_killed_runs_end_in_the_same_bits_as_the_uninterrupted_one(tmp_path: Path, script: str, kills: int) -> None:
    recipe = write_recipe(tmp_path, max_steps=100 + 10 * kills, save_steps=2, save_total_limit=2, learning_rate=0.001)
    whole, output, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    forked.finish(forked.start(script, recipe, "--output_dir", str(whole), log=log), log=log)
    command = (recipe, "--output_dir", str(output), "--resume_from_checkpoint", "auto")
    chance, killed, whole_before = random.Random(0), 0, 0
    for number in range(kills):
        process = forked.start(script, *command, log=log)
        killed += kill_in_the_middle(process, output, chance=chance, saving=number % 2 == 0)
        left = len([folder for folder in checkpoints_in(output) if damage(folder) is None])
        # the very first save may be torn
        assert left or not whole_before, "no whole checkpoint was left"
        whole_before = left
    assert killed == kills, "the run ended before it was killed; give it more steps"
    forked.finish(forked.start(script, *command, log=log), log=log)
    torn = list(output.glob("aside-*"))
    assert len(torn) == 1, "no kill hit a save, or more than the newest torn checkpoint was kept"
    assert all(folder.name in log.read_text() for folder in torn)
    assert same(weights_of(output), weights_of(whole))
    assert metrics_of(output) == metrics_of(whole)
    assert logged(output, "loss") == logged(whole, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_save_and_resume(tmp_path: Path, script: str) -> None:
    """DDP and FSDP, against each other, against the resumed run and, without drops, against one process."""
    recipe = write_recipe(tmp_path, max_steps=8, save_steps=4)
    for name, engine in (("ddp", {}), ("fsdp", FSDP)):
        forked.run_together(script, recipe, "--output_dir", str(tmp_path / name), log=tmp_path / "log", **engine)
        shutil.copytree(tmp_path / name / "checkpoint-4", tmp_path / f"{name}_resumed" / "checkpoint-4")
        command = (recipe, "--output_dir", str(tmp_path / f"{name}_resumed"), "--resume_from_checkpoint", "true")
        forked.run_together(script, *command, log=tmp_path / "log", **engine)
        assert same(weights_of(tmp_path / name), weights_of(tmp_path / f"{name}_resumed")), name
        assert metrics_of(tmp_path / name) == metrics_of(tmp_path / f"{name}_resumed")
    # what the masks are drawn from
    files = sorted((tmp_path / "ddp" / "checkpoint-4").glob("r*_state*_?.p*"))
    first, second = (torch.load(file, weights_only=False) for file in files)
    name = "cpu" if "cpu" in first else "torch_manual_seed"
    assert not torch.equal(first[name], second[name]), "both processes drop the same keys"
    assert (tmp_path / "fsdp" / "checkpoint-8" / "pytorch_model_fsdp_0").is_dir()
    assert logged(tmp_path / "fsdp", "loss") == pytest.approx(logged(tmp_path / "ddp", "loss"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_do_as_one_without_drops(tmp_path: Path, script: str) -> None:
    recipe = write_recipe(tmp_path, max_steps=6, save_strategy="no")
    plain = ("--dropkey_ratio", "0", "--hidden_dropout_prob", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    command = (recipe, *plain, "--per_device_train_batch_size", "16", "--output_dir", str(one))
    forked.finish(forked.start(script, *command, log=tmp_path / "log"), log=tmp_path / "log")
    forked.run_together(script, recipe, *plain, "--output_dir", str(two), log=tmp_path / "log")
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=2e-6)
    # every image once: the last batch of 41 images on two processes is filled up with others
    assert metrics_of(two) == pytest.approx(metrics_of(one), abs=1e-6)
