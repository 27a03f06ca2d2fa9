"""The runner of grids as a user runs it: rows, interruption, the test stage, and what is refused."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_grids import GRID, RECIPE

from hf_dropkey.lab.grids import BEGUN, DONE
from hf_dropkey.lab.rows import read_rows


ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "scripts" / "run_experiments.py"


def command(folder: Path, *arguments: str) -> list[str]:
    """The runner's command for a grid in a folder, where it leaves everything."""
    places = ["--results", str(folder / "rows.csv"), "--output_dir", str(folder / "weights")]
    return [sys.executable, str(RUNNER), str(folder / "small.json"), *places, *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the runner in this process; returns its exit status and what it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", command(tmp_path, *arguments)[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(RUNNER), run_name="__main__")
        return int(str(ended.value.code)), capfd.readouterr().out

    return call


def write(folder: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> None:
    (folder / "recipe.json").write_text(json.dumps(RECIPE | (recipe or {})))
    (folder / "small.json").write_text(json.dumps(GRID | {"recipe": str(folder / "recipe.json")} | changes))


def children(process: int) -> list[int]:
    """The processes that a process started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_grid_runs_goes_on_and_looks_at_the_test_once(tmp_path: Path, run: Any) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="10 of 10 cells are not finished"):
        run("--test")
    status, output = run("--seeds", "1", "--workers", "2")
    assert status == 0 and "small, validation: 5 cells, 0 of them done" in output and "[3/3]" in output
    rows = read_rows(tmp_path / "rows.csv")
    assert {row["seed"] for row in rows} == {"0"} and {row["split"] for row in rows} == {"validation"}
    assert all(row["command"].startswith("python scripts/run_experiments.py small.json") for row in rows)

    status, output = run()
    assert status == 0 and "10 cells, 5 of them done" in output and "[3/3]" in output
    assert read_rows(tmp_path / "rows.csv")[: len(rows)] == rows
    status, output = run("--test")
    assert status == 0 and "small, test: 6 cells, 0 of them done" in output
    whole = (tmp_path / "rows.csv").read_bytes()
    assert "6 cells, 6 of them done" in run("--test")[1]
    assert (tmp_path / "rows.csv").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_grid_leaves_no_process_and_no_half_cell(tmp_path: Path, sent: signal.Signals) -> None:
    write(tmp_path, {"max_steps": 100000})
    # a shell's jobs in the background ignore Ctrl+C, and what they start inherits that
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command(tmp_path), env=environment(tmp_path), stderr=subprocess.PIPE, text=True, preexec_fn=heeds
    )
    weights = tmp_path / "weights" / "small"
    try:
        for _ in range(1200):
            if any(weights.glob(f"*/{BEGUN}")):
                break
            time.sleep(0.1)
        assert any(weights.glob(f"*/{BEGUN}")), "no training began"
        workers = children(process.pid)
        second = subprocess.run(
            command(tmp_path), env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 1 and "another run of this grid holds" in second.stderr
    finally:
        process.send_signal(sent)
        try:
            # one that does not heed the signal would wait for the training
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    for _ in range(300):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert workers and not any(map(alive, workers)) and process.returncode != 0
    assert not (tmp_path / "rows.csv").exists() and not any(weights.glob(f"*/{DONE}"))


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, run: Any) -> None:
    models = {"tiny": {}, "wild": {"learning_rate": 1e30}}
    write(tmp_path, models=models, cells=[{"regulariser": "none"}], seeds=[0])
    status, output = run()
    assert status == 1
    assert "FAILED wild_0.0_all_seed0: FloatingPointError" in output and "1 of 2 trainings failed" in output
    assert {row["model"] for row in read_rows(tmp_path / "rows.csv")} == {"tiny"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": [{"regulariser": "dropout"}]}, "unknown cell: regulariser 'dropout'"),
        ({"models": {"tiny": {"image_size": 9}}}, "--image_size 9"),
        ({"models": {"tiny": {"colour": 1}}}, "colour"),
    ],
)
def test_a_mistake_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, **changes)
    monkeypatch.setattr(sys, "argv", command(tmp_path)[1:])
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(RUNNER), run_name="__main__")
    assert not (tmp_path / "weights").exists() and not (tmp_path / "rows.csv").exists()
