"""The script for a first run on a GPU: here to its message that there is none, and to its first failure."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hf_dropkey.lab import gpu_check
from hf_dropkey.models import triton_attention
from hf_dropkey.models.triton_kernels import INTERPRETED
from hf_dropkey.models.triton_launches import Launch, launch_configuration


ROOT = Path(__file__).resolve().parents[1]


def check(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", str(ROOT / "scripts" / "check_gpu.sh"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def stand_in(folder: Path, lines: str) -> str:
    """A "Python" that answers as `lines` say; its arguments are in $*."""
    file = folder / "python"
    file.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_first_steps_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
    done = check(tmp_path, sys.executable)
    assert done.returncode == 3, done.stderr[-2000:]
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.count("ok ") == 3 and "no GPU" in summary and "nothing was measured" in summary
    assert "to the bit" in (tmp_path / "02_first_call.log").read_text()
    assert "passed" in (tmp_path / "03_interpreter.log").read_text()


def test_an_environment_without_the_package_is_named(tmp_path: Path) -> None:
    done = check(tmp_path / "out", stand_in(tmp_path, "exit 1"))
    assert done.returncode == 2 and "pip install -e '.[test,triton]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_first_failure_ends_it(tmp_path: Path) -> None:
    # no GPU, and a first call that is wrong
    lines = 'case "$*" in *is_available*) echo 0 ;; *first_call*) echo "dq differs"; exit 1 ;; esac'
    done = check(tmp_path / "out", stand_in(tmp_path, lines))
    assert done.returncode == 1 and "dq differs" in done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(summary) == 2 and summary[0].startswith("ok ") and summary[1].startswith("FAILED  2 first_call")


def test_all_steps_of_a_gpu_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a "Python" and an nvidia-smi that only say yes: which steps there are, and that tests come before times."""
    python = stand_in(tmp_path, 'case "$*" in *is_available*) echo 1 ;; *) echo "$*" ;; esac')
    (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = check(tmp_path / "out", python)
    assert done.returncode == 0, done.stderr
    steps = [line.split()[2].rstrip(",") for line in done.stdout.splitlines() if line.startswith("ok ")]
    tests, times = ["fused_attention", "masks", "backends"], ["kernels", "launches", "shapes", "steps"]
    assert [step for step in steps if step != "memcheck"] == ["versions", "first_call", *tests, *times]
    for log in (tmp_path / "out").glob("*.log"):
        words = log.read_text().split()
        # the files and scripts that a step names are there
        assert all((ROOT / word).is_file() for word in words if word.startswith(("tests/", "scripts/")))


def test_the_default_launch_is_tried_first_and_each_once() -> None:
    found = list(gpu_check.candidates(Launch(64, 4, 2)))
    assert found[0] == Launch(64, 4, 2) and len(found) == len(set(found)) == 24


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_a_sweep_times_each_kernel_and_puts_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [Launch(16, 4, 1), Launch(32, 4, 1), Launch(32, 8, 2)]
    monkeypatch.setattr(gpu_check, "candidates", lambda default: iter(tried))
    times = iter([3.0, 1.0, 2.0] * 3)
    found = list(gpu_check.swept((1, 1, 20, 16), torch.device("cpu"), lambda job, repeats: next(times), 1000.0))
    best = [(1.0, tried[1]), (2.0, tried[2]), (3.0, tried[0])]
    assert found == [(kernel, *one) for kernel in ("short", "query", "key_value") for one in best]
    # nothing is left of it
    assert triton_attention.launch_configuration is launch_configuration
    ended = gpu_check.swept((1, 1, 20, 16), torch.device("cpu"), lambda job, repeats: 1.0, 0.0)
    assert not list(ended), "no time was given"


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_a_launch_with_other_results_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([[torch.ones(3)], [torch.full((3,), 1.2)]])
    with pytest.raises(SystemExit, match="gives other results"):
        gpu_check.times_of_launches("query", Launch(16, 4, 1), lambda: next(results), lambda *_: 1.0, float("inf"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_sweep_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu_check.sweep(tmp_path / "rows.csv", (1, 1, 8, 16), 1.0)
