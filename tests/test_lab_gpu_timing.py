"""What of the GPU's timing needs no GPU: names of kernels, facts, and which times and columns a row has."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_dropkey.lab import gpu_timing, timing
from hf_dropkey.lab.gpu_timing import attention_kernel, parse_facts, short_name


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_attention.py"
EFFICIENT = "void fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>, false>(Flash_fwd_params)"


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ([FLASH, "void at::native::copy"], "flash"),
        (["void at::native::copy", EFFICIENT], "memory-efficient"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"], "cudnn"),
        (["_short_kernel"], "dropkey_triton"),
        (["triton_tem_fused_flex_attention_0"], "flex"),
        (["ampere_bf16_s16816gemm_bf16_128x128", "softmax_warp_forward"], "math"),
    ],
)
def test_the_attention_kernel_is_told_from_the_names(kernels: list[str], expected: str) -> None:
    assert attention_kernel(kernels) == expected


def test_names_of_kernels_are_cut() -> None:
    assert short_name(FLASH) == "pytorch_flash::flash_fwd_kernel"
    assert short_name(EFFICIENT) == "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"
    assert short_name("_query_kernel") == "_query_kernel"
    assert len(short_name("x" * 200)) == 60


def test_facts_of_nvidia_smi() -> None:
    found = parse_facts("570.86.15, 1755, 1980")
    assert found == {"driver": "570.86.15", "clock_mhz": "1755", "largest_clock_mhz": "1980"}
    with pytest.raises(ValueError, match="printed 'No devices were found'"):
        parse_facts("No devices were found")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_attention_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow of a run on a GPU, with everything that touches one replaced."""
    script, device = load_script(), SimpleNamespace(type="cuda")
    arguments = script.BenchmarkArguments(rounds=3, memory=False)
    calls: dict[str, int] = {}

    def job(name: str) -> Any:
        def run() -> None:
            calls[name] = calls.get(name, 0) + 1

        return run

    monkeypatch.setattr(timing, "wait_for", lambda device: None)
    monkeypatch.setattr(script, "warm_clock", lambda device: None)
    monkeypatch.setattr(
        script, "event_timer", lambda device: lambda job, repeats: [job() for _ in range(repeats)] and 2.0
    )
    # the second job cannot be captured
    monkeypatch.setattr(script, "captured", lambda run, device: run if run is jobs["flash/none"] else None)
    monkeypatch.setattr(script, "kernel_times", lambda run, device, repeats: {FLASH: 0.5, "fill": 0.1})
    monkeypatch.setattr(script, "gpu_facts", lambda device: {"driver": "1", "clock_mhz": "2", "triton": "3.7.1"})
    monkeypatch.setattr(script, "origin", lambda device, command: {"device": "a GPU"})
    jobs = {"flash/none": job("flash"), "sdpa/dropkey": job("sdpa")}
    forwards = {name: job(f"{name} forward") for name in jobs}
    rows = list(script.measured(jobs, arguments, device, {"workload": "attention"}, forwards))
    assert {(row["driver"], row["clock_mhz"], row["triton"], row["attention_kernel"]) for row in rows} == {
        ("1", "2", "3.7.1", "flash")
    }
    metrics = {name: [row["metric"] for row in rows if row["backend"] == name] for name in ("flash", "sdpa")}
    times = ["time", "GPU time", "forward GPU time"]
    kernels = ["kernel pytorch_flash::flash_fwd_kernel", "kernel fill"]
    both = [metric for time in times for metric in (time, f"{time} over flash/none")]
    assert metrics["sdpa"] == both + kernels
    assert metrics["flash"] == [*both, "graph time", "graph time over flash/none", *kernels]
    # 20 runs between two readings; a round to warm up, and three
    assert calls["sdpa"] == 2 * 4 * 20 and calls["sdpa/dropkey forward"] == 4 * 20
    assert gpu_timing.triton_release()
