"""Steps of `scripts/check_gpu.sh` that are Python: the facts of a machine, a first call, and a sweep of launches.

    python -m hf_dropkey.lab.gpu_check facts | first_call | sweep --out FILE

Without a GPU `first_call` runs in Triton's interpreter (TRITON_INTERPRET=1), and `sweep` refuses.
"""

import argparse
import importlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_dropkey.models import triton_attention
from hf_dropkey.models.attention_mask import Settings, additive_mask
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.patterns import dropped_scores
from hf_dropkey.models.triton_attention import triton_dropkey_attention
from hf_dropkey.models.triton_launches import Launch, launch_configuration
from hf_dropkey.models.triton_mask import drawn_mask
from hf_dropkey.reference import reference_attention

from .gpu_timing import Timer, event_timer, gpu_facts, triton_release
from .timing import append_rows, origin


# in units of the error of explicit attention in the same dtype
ALLOWED_ERROR = 4.0


def device_of_checks() -> torch.device:
    """The GPU, or the CPU for the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts() -> None:
    """Prints versions, and on a GPU its name, driver and clocks."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}")
    print(f"Triton {triton_release()}")
    device = device_of_checks()
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, compute capability {torch.cuda.get_device_capability(device)}")
        print(", ".join(f"{name} {value}" for name, value in gpu_facts(device).items()))


def inputs_like_a_model(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, `[B, H, N, D]`, laid out as `[B, N, H, D]`."""
    images, heads, tokens, width = shape
    drawn = torch.randn(4, images, tokens, heads, width, device=device, dtype=dtype)
    return [part.transpose(1, 2) for part in drawn.unbind()]


def results_of(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


def first_call() -> None:
    """One fused forward and backward pass against the reference, and one mask against PyTorch's operations.

    Raises:
        SystemExit: They differ.
    """
    device = device_of_checks()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs, seed, ratio = inputs_like_a_model((1, 2, 49, 32), device, dtype), draw_seed(device), 0.1
    start = time.perf_counter()
    found = results_of(lambda q, k, v: triton_dropkey_attention(q, k, v, seed, ratio), inputs)
    print(f"one fused forward and backward pass: {time.perf_counter() - start:.1f} s with compilation")
    dropped = dropped_scores(seed, (1, 2, 49, 49), ratio)

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(dropped, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value

    yardstick = results_of(eager, inputs)
    exact = results_of(
        lambda q, k, v: reference_attention(q, k, v, dropped.cpu()), [tensor.double().cpu() for tensor in inputs]
    )
    for name, one, other, truth in zip(("output", "dq", "dk", "dv"), found, yardstick, exact, strict=True):
        error, allowed = ((part.double().cpu() - truth).norm().item() for part in (one, other))
        print(f"{name}: error {error:.2e}, of explicit attention {allowed:.2e}")
        if not error <= ALLOWED_ERROR * allowed:
            raise SystemExit(
                f"{name} differs from the reference: error {error:.2e}, allowed {ALLOWED_ERROR} x {allowed:.2e}"
            )
    settings = Settings(ratio, "score", 3, None)
    mask = drawn_mask(seed, inputs[0], 49, None, ratio, "score")
    if not torch.equal(mask, additive_mask(seed, inputs[0], inputs[1], None, settings)):
        raise SystemExit("the mask that the kernel draws differs from the one of PyTorch's operations")
    print("the mask of the kernel is that of PyTorch's operations, to the bit")


def candidates(default: Launch) -> Iterator[Launch]:
    """The launches to try for a kernel, the default first."""
    yield default
    for tile, warps, stages in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if Launch(tile, warps, stages) != default:
            yield Launch(tile, warps, stages)


@contextmanager
def choosing(choose: Callable[[str, Launch], Launch]) -> Iterator[None]:
    """Launches of the fused attention as `choose` says, from the kernel's name and its usual launch."""

    def chosen(*arguments: Any, **settings: Any) -> tuple[str, Launch]:
        name, usual = launch_configuration(*arguments, **settings)
        return name, choose(name, usual)

    patched: Any = triton_attention
    patched.launch_configuration = chosen
    try:
        yield
    finally:
        patched.launch_configuration = launch_configuration


def times_of_launches(
    kernel: str, default: Launch, run: Callable[[], list[torch.Tensor]], timer: Timer, end: float
) -> list[tuple[float, Launch]]:
    """Milliseconds of `run` for each launch of a kernel that its GPU takes, until the monotonic clock shows `end`.

    Raises:
        SystemExit: A launch gives other results than the default, by more than rounding.
    """
    # what a kernel cannot be launched with
    impossible = (RuntimeError, importlib.import_module("triton.runtime.errors").OutOfResources)
    expected, times = run(), []
    for launch in candidates(default):
        if time.monotonic() > end:
            print(f"{kernel}: the time is over, the other launches were not tried")
            break
        with choosing(lambda name, usual, launch=launch: launch if name == kernel else usual):  # type: ignore[misc]
            try:
                found = run()
            except impossible as error:
                print(f"{kernel} {tuple(launch)}: {str(error).splitlines()[0][:100]}")
                continue
            for one, other in zip(found, expected, strict=True):
                if not (one.double() - other.double()).norm() <= 1e-2 * other.double().norm():
                    raise SystemExit(f"{kernel} {tuple(launch)} gives other results than {tuple(default)}")
            times.append((timer(run, 20), launch))
    return sorted(times)


def swept(
    shape: tuple[int, int, int, int], device: torch.device, timer: Timer, seconds: float
) -> Iterator[tuple[str, float, Launch]]:
    """Kernel, milliseconds of forward and backward pass, launch: the fastest first; the best three are printed."""
    inputs, seed = inputs_like_a_model(shape, device, torch.bfloat16), draw_seed(device)

    def run() -> list[torch.Tensor]:
        return results_of(lambda q, k, v: triton_dropkey_attention(q, k, v, seed, 0.1), inputs)

    used: dict[str, Launch] = {}
    with choosing(lambda name, usual: used.setdefault(name, usual)):
        run()
    end = time.monotonic() + seconds
    for number, (kernel, default) in enumerate(used.items()):
        # each kernel gets its part of the time that is left
        share = time.monotonic() + (end - time.monotonic()) / (len(used) - number)
        times = times_of_launches(kernel, default, run, timer, share)
        print(f"{kernel}, default {tuple(default)}: best of {len(times)} (forward and backward pass)")
        for time_ms, launch in times[:3]:
            print(f"  {time_ms:.3f} ms {tuple(launch)}{' (default)' if launch == default else ''}")
        yield from ((kernel, time_ms, launch) for time_ms, launch in times)


def sweep(out: Path, shape: tuple[int, int, int, int], seconds: float) -> None:
    """Times the launches of all kernels for one shape in bfloat16, and appends a row for each.

    Raises:
        SystemExit: There is no GPU, or a launch gives other results.
    """
    device = device_of_checks()
    if device.type != "cuda":
        raise SystemExit("a sweep of launches needs a GPU; nothing was measured")
    command = f"python -m hf_dropkey.lab.gpu_check sweep --shape {'x'.join(map(str, shape))}"
    about: dict[str, Any] = {**origin(device, command), **gpu_facts(device)}
    about |= dict(zip(("batch", "heads", "tokens", "head_width"), shape, strict=True))
    for kernel, time_ms, launch in swept(shape, device, event_timer(device), seconds):
        append_rows(out, [{**about, "kernel": kernel, **launch._asdict(), "time_ms": f"{time_ms:.5g}"}])


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("facts", "first_call", "sweep"))
    parser.add_argument("--out", type=Path, help="CSV file of the sweep")
    parser.add_argument("--shape", default="128x6x197x64", help="of the sweep: batch x heads x tokens x head width")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the sweep")
    arguments = parser.parse_args()
    if arguments.step == "facts":
        facts()
    elif arguments.step == "first_call":
        first_call()
    elif arguments.out is None:
        parser.error("the step 'sweep' needs --out FILE")
    else:
        sizes = [int(part) for part in arguments.shape.split("x") if part.isdigit()]
        if len(sizes) != 4 or min(sizes) < 1:
            parser.error(
                f"--shape {arguments.shape!r} is not batch x heads x tokens x head width, such as 128x6x197x64"
            )
        sweep(arguments.out, (sizes[0], sizes[1], sizes[2], sizes[3]), arguments.seconds)


if __name__ == "__main__":
    main()
