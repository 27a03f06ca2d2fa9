"""One run at a time in an output folder, however the one before it ended; a complete run is known as one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import TrainingArguments

from hf_dropkey.training import lock
from hf_dropkey.training.lock import (
    FOLDER,
    RunInProgressError,
    forget_complete,
    is_complete,
    locked_output,
    write_complete,
)


# holds the lock of one process of a run, as one process of a launcher does, until it is killed
HOLD = """
import sys, time
from pathlib import Path
from hf_dropkey.training.lock import _held
with _held(Path(sys.argv[1]), int(sys.argv[2]), 1.0):
    print("held", flush=True)
    time.sleep(120)
"""


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")


@contextmanager
def other_process(folder: Path, number: int) -> Iterator[subprocess.Popen]:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / FOLDER), str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=60)


def test_a_second_run_is_told_at_once_and_a_killed_one_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = arguments(tmp_path / "run")
    # process 1: the launcher and process 0 are gone, and this one goes on writing
    with other_process(tmp_path / "run", 1) as process:
        begun = time.monotonic()
        message = rf"another run writes to .*run \(process {process.pid} on .*, since .*\)\. Wait until .*--output_dir"
        with pytest.raises(RunInProgressError, match=message) as caught, locked_output(training):
            pass
        assert time.monotonic() - begun < 5 and "\n" not in str(caught.value)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        with locked_output(training):
            assert f"process {process.pid} on" in caplog.text and "taken over" in caplog.text
    with locked_output(training):
        pass


def test_a_run_holds_its_folder_until_it_ends(tmp_path: Path) -> None:
    training = arguments(tmp_path)
    with locked_output(training):
        with pytest.raises(RunInProgressError, match=f"process {os.getpid()}"), locked_output(training, seconds=0.1):
            pass
        # another folder is another matter
        with locked_output(arguments(tmp_path / "other")):
            pass

    def fail() -> None:
        with locked_output(training):
            raise KeyError("an error in the run")

    with pytest.raises(KeyError):
        fail()
    with locked_output(training):
        pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for written in (False, True):
        with locked_output(arguments(tmp_path / "run")):
            assert (tmp_path / "run" / FOLDER / "0.owner").is_file()
            if written:
                (tmp_path / "run" / "config.json").touch()
        assert (tmp_path / "run").exists() is written
        assert not list(tmp_path.rglob("*.owner"))


def test_what_a_killed_run_left_behind_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    # a worker that reads data still holds the lock of a process that is gone
    left = FileLock(folder / "0.lock")
    left.acquire()
    (folder / "0.owner").write_text(json.dumps({"process": 2**22 + 1, "host": "elsewhere", "since": "then"}))
    with pytest.raises(RunInProgressError, match="on elsewhere"), locked_output(arguments(tmp_path), seconds=0.2):
        pass
    (folder / "0.owner").write_text("half a JSON fi")
    with (
        pytest.raises(RunInProgressError, match=r"0\.lock in its folder"),
        locked_output(arguments(tmp_path), seconds=0),
    ):
        pass
    left.release()
    with locked_output(arguments(tmp_path), seconds=0.2):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unlockable:
        def __init__(self, path: Path) -> None:
            pass

        def acquire(self, timeout: float) -> None:
            raise NotImplementedError

    monkeypatch.setattr(lock, "FileLock", Unlockable)
    with locked_output(arguments(tmp_path)):
        assert "has no locks: a second run in the same folder would not be noticed" in caplog.text


def test_a_complete_run_is_one_with_the_same_settings(tmp_path: Path) -> None:
    settings = {"learning_rate": "0.1", "max_steps": "4"}
    may = {"max_steps": "longer with --max_steps"}
    assert not is_complete(tmp_path, settings, may_change=may)
    write_complete(tmp_path, settings)
    assert is_complete(tmp_path, settings, may_change=may)
    # what a later release adds is not known to differ
    assert is_complete(tmp_path, {**settings, "new": "1"}, may_change=may)
    assert not is_complete(tmp_path, {**settings, "max_steps": "8"}, may_change=may)
    with pytest.raises(ValueError, match=r"learning_rate 0\.1 there and 0\.2 here.*longer with --max_steps"):
        is_complete(tmp_path, {**settings, "learning_rate": "0.2"}, may_change=may)
    forget_complete(tmp_path)
    assert not is_complete(tmp_path, settings, may_change=may)
