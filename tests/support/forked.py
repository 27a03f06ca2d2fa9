"""Scripts as processes of their own that start at once, because they fork from one that has imported everything.

Starting an interpreter and importing torch and Transformers takes longer than the small runs of the tests.
"""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401
import torch.distributed.fsdp
import torch.utils.data
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import Trainer  # noqa: F401

import hf_dropkey.classification.model
import hf_dropkey.training.guards  # noqa: F401


ROOT = Path(__file__).resolve().parents[2]
# a run takes some seconds, and many times that on a busy machine
SECONDS = 300.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked"])


def preload() -> None:
    """Starts the server that runs are forked from with this folder on its path.

    Python 3.11 does not pass `sys.path` on, and leaves out without a word what it cannot import.
    """
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run_here(script: str, arguments: list[str], environment: Mapping[str, str], log: str) -> None:
    """What the new process does."""
    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    # where it stands, if it hangs
    faulthandler.dump_traceback_later(SECONDS / 2)
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    # the environment is read when torch is imported
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def shard_on_cpu() -> None:
    """Lets accelerate shard over processes on a CPU, which it (1.15) does on accelerators only, DDP being what it does here.

    FSDP itself works with gloo.
    """
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def start(script: str, *arguments: str, log: Path, **environment: str) -> BaseProcess:
    """Starts a script of the repository; what it prints is appended to `log`."""
    settings = {"OMP_NUM_THREADS": "1", **environment}
    preload()
    process = CONTEXT.Process(
        target=run_here, args=(str(ROOT / "scripts" / script), list(arguments), settings, str(log))
    )
    process.start()
    return process


def finish(*processes: BaseProcess, log: Path, seconds: float = SECONDS) -> None:
    """Waits for processes to end well; kills the rest and fails with the log if one does not."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(codes), f"exit codes {codes}\n{log.read_text()[-6000:]}"


def start_together(script: str, *arguments: str, log: Path, count: int = 2, **environment: str) -> list[BaseProcess]:
    """Starts the processes of a distributed run, as `torchrun` does; each has a log of its own, `<log>.<rank>`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    return [
        start(
            script,
            *arguments,
            log=log.with_name(f"{log.name}.{rank}"),
            **{**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank in range(count)
    ]


def run_together(script: str, *arguments: str, log: Path, count: int = 2, **environment: str) -> None:
    """Runs a distributed script to its end."""
    processes = start_together(script, *arguments, log=log, count=count, **environment)
    finish(*processes, log=log.with_name(f"{log.name}.0"))


def kill(process: BaseProcess) -> bool:
    """Kills a process as `kill -9` does; whether it was still there."""
    process.kill()
    process.join(SECONDS)
    return process.exitcode == -signal.SIGKILL
