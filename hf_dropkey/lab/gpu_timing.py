"""Timing on an NVIDIA GPU: events, CUDA graphs, kernels, a cold cache and a warm clock, and the facts behind a row.

The host's clock alone says how long Python and launches take, where these are slower than the GPU. Here are the other two
times: between events on the GPU, with the L2 cache emptied before each run, and of a CUDA graph, which launches nothing.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Job, wait_for


# PyTorch's attention kernels by a part of their names; the first that is found counts
ATTENTION_KERNELS = {
    "cudnn": r"cudnn.*(sdpa|attention|fprop|fmha)",
    "flash": r"flash_(fwd|bwd)|flash::|pytorch_flash",
    "memory-efficient": r"fmha_cutlass|AttentionKernel|AttentionBackwardKernel|attention_kernel",
    "dropkey_triton": r"^_(short|long|query|key_value)_kernel",
    "flex": r"triton_tem_fused.*flex",
}
# bytes that overwrite the L2 cache of any GPU so far
FLUSH_BYTES = 2**28
Timer = Callable[[Job, int], float]


def event_timer(device: torch.device) -> Timer:
    """A timer for `interleaved_times`: the mean milliseconds between two events around each run, with a cold L2 cache."""
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def timer(job: Job, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            pairs.append((start, end))
        wait_for(device)
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats

    return timer


def captured(job: Job, device: torch.device) -> Job | None:
    """The job as a CUDA graph to replay, or None where it cannot be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            job()
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        wait_for(device)
        return None
    return graph.replay


def warm_clock(device: torch.device, seconds: float = 1.0) -> None:
    """Keeps the GPU busy, because an idle one runs at a lower clock."""
    left = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(left, left)
        wait_for(device)


def kernel_times(job: Job, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of each GPU kernel in one run of the job, by name, the longest first."""
    job()
    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            job()
        wait_for(device)
    found = {event.key: event.self_device_time_total / 1e3 / repeats for event in profiler.key_averages()}
    return dict(sorted(((name, ms) for name, ms in found.items() if ms > 0), key=lambda pair: -pair[1]))


def short_name(kernel: str) -> str:
    """A kernel's name without C++ template arguments and parameters, at most 60 characters."""
    plain = re.sub(r"<.*", "", kernel.removeprefix("void ")).split("(")[0]
    return plain[:60] or kernel[:60]


def attention_kernel(kernels: Iterable[str]) -> str:
    """Which attention the kernels of a job belong to: a name of `ATTENTION_KERNELS`, or "math"."""
    names = list(kernels)
    for attention, pattern in ATTENTION_KERNELS.items():
        if any(re.search(pattern, name) for name in names):
            return attention
    return "math"


def parse_facts(line: str) -> dict[str, str]:
    """Driver and clocks from a line of nvidia-smi's CSV.

    Raises:
        ValueError: The line has another form.
    """
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 3 or not parts[0]:
        raise ValueError(f"nvidia-smi printed {line!r}, not driver, clock and largest clock; update the driver")
    return {"driver": parts[0], "clock_mhz": parts[1], "largest_clock_mhz": parts[2]}


def gpu_facts(device: torch.device) -> dict[str, str]:
    """The compute capability, the driver, the clock now and at most, in MHz, and the Triton release."""
    fields = "driver_version,clocks.current.sm,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if identity is not None:
        command.append(f"--id=GPU-{identity}")
    line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"capability": capability, **parse_facts(line.splitlines()[0]), "triton": triton_release()}


def triton_release() -> str:
    """The installed release of Triton, or "none"."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
