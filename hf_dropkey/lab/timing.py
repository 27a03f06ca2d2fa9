"""Comparing variants of one job: interleaved times, peak memory, tidy rows in a CSV file.

Machines drift, so variants are compared by their ratio in the same round, and its median over rounds.
"""

import csv
import io
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


Job = Callable[[], Any]


class Spread(NamedTuple):
    """The median of `n` values, and their first and third quartiles."""

    median: float
    first: float
    third: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, first, third, len(values))


def interleaved_times(
    jobs: Mapping[str, Job],
    rounds: int,
    *,
    device: torch.device,
    repeats: int = 1,
    warmup: int = 1,
    timer: Callable[[Job, int], float] | None = None,
) -> dict[str, list[float]]:
    """The time of each job in each round, in milliseconds; every round runs all jobs, starting with another one.

    Args:
        jobs: The jobs, by name.
        rounds: Number of rounds.
        device: The device of the jobs, which is synchronised before the clock is read.
        repeats: Runs of a job between two readings of the clock; the result is the time of one run.
        warmup: Rounds before the first one that counts.
        timer: Takes a job and `repeats` and returns the milliseconds of one run. Default: the host's clock.
    """

    def by_the_clock(job: Job, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            job()
        wait_for(device)
        return (time.perf_counter() - start) * 1e3 / repeats

    timer = timer or by_the_clock
    names = list(jobs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wait_for(device)
            time_ms = timer(jobs[name], repeats)
            if number >= 0:
                times[name].append(time_ms)
    return times


def ratios(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """The ratio of two jobs in each round."""
    return [one / other for one, other in zip(times, baseline, strict=True)]


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(job: Job, device: torch.device) -> int:
    """The peak of the bytes that torch allocates during `job`, above those allocated before.

    Raises:
        ValueError: The device is neither a CPU nor CUDA.
    """
    if device.type == "cuda":
        wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"memory is measured on 'cpu' and 'cuda', got {device.type!r}")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@cache
def commit() -> str:
    """The commit of this code, with "-changed" where files differ from it; "unknown" outside a repository.

    Determined once in a process, which keeps running the code that it loaded.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    # appended rows change no code
    places = ["--", ":(top)", ":(top,exclude)model_cards"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", *places], capture_output=True, text=True, check=False
    ).stdout.strip()
    sha = found.stdout.strip() or "unknown"
    return f"{sha}-changed" if changed else sha


def origin(device: torch.device, command: str) -> dict[str, str | int]:
    """The origin of a row: command, commit, versions, device, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "command": command,
        "git_sha": commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
    }


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file in one write, so that concurrent or killed processes leave no partial row.

    A new file gets a header.

    Raises:
        ValueError: The file has other columns.
    """
    if not rows:
        return
    columns = list(rows[0])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if file.exists() and file.stat().st_size:
        check_columns(file, columns)
        # an editor may have removed the last newline
        with file.open("rb") as old_bytes:
            old_bytes.seek(-1, os.SEEK_END)
            text.write("" if old_bytes.read() == b"\n" else "\n")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    writer.writerows(rows)
    with file.open("ab", buffering=0) as out:
        out.write(text.getvalue().encode())


def check_columns(file: Path, columns: Sequence[str]) -> None:
    """Raises ValueError for a CSV file with other columns than those of the rows to append."""
    with file.open(encoding="utf-8", newline="") as old:
        header = next(csv.reader(old), [])
    if header != list(columns):
        raise ValueError(f"{file} has the columns {header}, not {list(columns)}; choose another file to append to")
