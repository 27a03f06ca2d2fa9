"""The attention benchmark on tiny shapes: its rows, its figure, its refusals."""

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dropkey.models import attention


SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, script: str = "benchmark_attention.py") -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as rows:
        return list(csv.DictReader(rows))


ON_CPU = ("--device", "cpu", "--rounds", "2", "--shapes", "1x2x9x8", "1x2x30x8")


def test_rows_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    run(monkeypatch, *ON_CPU, "--dtypes", "float32", "bfloat16", "--out", str(out))
    rows = rows_of(out)
    variants = {(row["backend"], row["regulariser"]) for row in rows}
    assert variants >= {
        (backend, what) for backend in ("eager", "sdpa") for what in ("none", "attention dropout", "dropkey")
    }
    assert ("eager", "paper listing") in variants and ("sdpa", "dropkey token") in variants
    assert len(rows) == len(variants) * 2 * 2 * 4
    assert all(float(row["value"]) >= 0 for row in rows)
    same = [row for row in rows if (row["backend"], row["regulariser"]) == ("sdpa", "none") and row["unit"] == "ratio"]
    assert {float(row["value"]) for row in same} == {1.0}

    figure = tmp_path / "figure.png"
    run(monkeypatch, str(out), "cpu", "float32", str(figure), script="draw_benchmark.py")
    assert figure.stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no attention rows of cuda"):
        run(monkeypatch, str(out), "cuda", "float32", str(figure), script="draw_benchmark.py")


def test_a_backend_that_differs_from_the_reference_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.DROPKEY_BACKENDS["sdpa"]

    def forgets_to_drop(module: Any, *arguments: Any, **settings: Any) -> Any:
        # the seed is drawn as ever, and a weak ratio drops other scores
        ratio, module.dropkey_ratio = module.dropkey_ratio, 1e-9
        try:
            return right(module, *arguments, **settings)
        finally:
            module.dropkey_ratio = ratio

    monkeypatch.setitem(attention.DROPKEY_BACKENDS, "sdpa", forgets_to_drop)
    out = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="sdpa/dropkey"):
        run(
            monkeypatch, *ON_CPU, "--out", str(out), "--memory", "False", "--variants", "sdpa/dropkey", "eager/dropkey"
        )
    assert {(row["backend"], row["regulariser"]) for row in rows_of(out)} == {("sdpa", "none"), ("eager", "dropkey")}


def test_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    small = ("--workload", "step", "--models", "tiny", "--batch_size", "1", "--image_size", "32", "--device", "cpu")
    run(monkeypatch, *small, "--rounds", "1", "--out", str(out), "--variants", "sdpa/dropkey", "eager/paper listing")
    rows = rows_of(out)
    assert {row["backend"] + "/" + row["regulariser"] for row in rows} == {
        "sdpa/none",
        "sdpa/dropkey",
        "eager/paper listing",
    }
    assert {row["workload"] for row in rows} == {"vit_tiny step"} and {row["tokens"] for row in rows} == {"5"}
    # weights, gradients and two moments of AdamW at least
    memory = [float(row["value"]) for row in rows if row["unit"] == "MiB"]
    assert min(memory) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "steps"), "steps"),
        (("--models", "huge"), "huge"),
        (("--dtypes", "int8"), "int8"),
        (("--shapes", "16x6x197"), "16x6x197"),
        (("--shapes", "16x6x0x64"), "16x6x0x64"),
        (("--rounds", "0"), "at least 1"),
        (("--image_size", "225"), "225"),
        (("--shapes", "1x1x5x4", "--variants", "flash/magic"), "flash/magic"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *arguments)


def test_threads_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    run(monkeypatch, "--shapes", "1x1x5x4", "--rounds", "1", "--memory", "False", "--device", "cpu")
    assert torch.get_num_threads() == before
