"""One run at a time in an output folder, and what says that the run in it is complete.

Each process of a run holds a lock on a file of its own, so that processes which outlive their launcher are noticed. The
operating system lets go of the lock of a process that has died, however it died.
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..extras import needed
from ..saved import read_json


with needed("train"):
    from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

# a folder of a run for this purpose; never pushed, because no name in it ends like a file that is
FOLDER = ".run"
COMPLETE = "complete"
# workers that read data notice within five seconds that their process is gone, and hold its lock until then
SECONDS_TO_NOTICE = 10.0


class RunInProgressError(ValueError):
    """Another run writes to the output folder."""


@contextmanager
def locked_output(training: TrainingArguments, *, seconds: float = SECONDS_TO_NOTICE) -> Iterator[None]:
    """Keeps the output folder to this run, on every process of it; call it before anything is written there.

    Args:
        training: Names the folder, and the place of this process among those of the run.
        seconds: How long to wait for what a run that was killed has left behind.

    Raises:
        RunInProgressError: A process of another run is alive and holds the folder.
    """
    folder = Path(str(training.output_dir)) / FOLDER
    # on each node, where each has a folder of its own
    shared = not training.save_on_each_node
    first = training.process_index == 0 if shared else training.local_process_index == 0
    new = first and not folder.parent.exists()
    with ExitStack() as stack:
        if new:
            stack.callback(_leave_nothing, folder)
        with training.main_process_first(local=not shared, desc="locking the output folder"):
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                _wait_for_others(folder, seconds)
            stack.enter_context(_held(folder, training.process_index, seconds))
        yield


def _leave_nothing(folder: Path) -> None:
    """Removes the lock and the output folder of a run that was stopped before it wrote anything else."""
    alone = all(path == folder for path in folder.parent.iterdir())
    if alone and all(path.suffix == ".lock" for path in folder.iterdir()):
        shutil.rmtree(folder)
        folder.parent.rmdir()


def _wait_for_others(folder: Path, seconds: float) -> None:
    """Makes sure that no process of another run, whatever its number, holds a lock."""
    for file in sorted(folder.glob("*.lock")):
        with _held(folder, int(file.stem) if file.stem.isdecimal() else 0, seconds):
            pass


@contextmanager
def _held(folder: Path, process: int, seconds: float) -> Iterator[None]:
    owner = folder / f"{process}.owner"
    lock = FileLock(folder / f"{process}.lock")
    try:
        # at once if the owner is known to live
        lock.acquire(timeout=0 if _alive(owner) else seconds)
    except Timeout as error:
        raise RunInProgressError(
            f"another run writes to {folder.parent} ({_described(owner)}). Wait until it has ended, end that process, or "
            "choose another --output_dir"
        ) from error
    except NotImplementedError:
        logger.warning(
            "the file system of %s has no locks: a second run in the same folder would not be noticed", folder.parent
        )
        yield
        return
    if owner.is_file():
        logger.warning("%s left its lock on %s: taken over", _described(owner), folder.parent)
    try:
        owner.write_text(
            json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}),
            encoding="utf-8",
        )
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    # not there, or not yet written
    except (FileNotFoundError, ValueError):
        return {}


def _alive(file: Path) -> bool:
    """Whether a lock's owner is a living process of this machine."""
    owner = _owner(file)
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("process"), int):
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _described(file: Path) -> str:
    owner = _owner(file)
    if not owner:
        return f"{file.with_suffix('.lock').name} in its folder {FOLDER} is locked"
    return f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}"


def write_complete(output_dir: Path, settings: Mapping[str, str]) -> None:
    """Says that the run is complete: everything that was requested is done and written."""
    (output_dir / FOLDER).mkdir(exist_ok=True)
    (output_dir / FOLDER / COMPLETE).write_text(json.dumps(dict(settings), indent=1), encoding="utf-8")


def forget_complete(output_dir: Path) -> None:
    """Takes back what `write_complete` said, because the run goes on or another one begins."""
    (output_dir / FOLDER / COMPLETE).unlink(missing_ok=True)


def is_complete(output_dir: Path, settings: Mapping[str, str], *, may_change: Mapping[str, str]) -> bool:
    """Whether the run in a folder is complete, and these settings ask for nothing that it has not done.

    Args:
        output_dir: The folder of the run.
        settings: What is requested now.
        may_change: Settings with which a complete run can go on, and what for.

    Raises:
        ValueError: It is complete, and was run with other settings than those that may change.
    """
    file = output_dir / FOLDER / COMPLETE
    if not file.is_file():
        return False
    done = read_json(file)
    changed = sorted(name for name in settings.keys() & done.keys() if settings[name] != done[name])
    if not changed:
        return True
    if any(name in may_change for name in changed):
        return False
    differences = ", ".join(f"{name} {done[name]} there and {settings[name]} here" for name in changed)
    raise ValueError(
        f"the run in {output_dir} is complete, with other settings: {differences}. Nothing was changed: choose another "
        f"--output_dir for another run, or go on with this one ({'; '.join(dict.fromkeys(may_change.values()))})"
    )
