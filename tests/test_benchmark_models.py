"""The benchmark of the families measures the same function in every variant, and leaves tidy rows or a clear error."""

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_models.py"
SMALL = ["--batch_size", "1", "--image_size", "32", "--rounds", "1"]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_rows_are_appended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in ("t2t_vit_7", "volo_d1"):
        run(monkeypatch, *SMALL, "--models", size, "--out", str(tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    backends = {"plain", "sdpa"} if "not compared with timm" in printed else {"plain", "sdpa", "timm"}
    assert {row["backend"] for row in rows} == backends
    assert {row["workload"] for row in rows} == {
        f"{size} {work}" for size in ("t2t_vit_7", "volo_d1") for work in ("forward", "step")
    }
    for row in rows:
        assert float(row["value"]) > 0 and row["n"] == "1" and row["tokens"] == "5"
        if row["backend"] == "plain" and row["metric"] == "time over plain/none":
            assert float(row["value"]) == 1
    dropping = {row["drop_ratio"] for row in rows if row["regulariser"] == "dropkey"}
    assert dropping == {"0.1"}
    assert "t2t_vit_7: logits of the plain model agree with ours" in printed


@pytest.mark.parametrize("size", ["t2t_vit_7", "volo_d1"])
def test_the_plain_model_trains_on_the_same_loss(script: dict[str, Any], size: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    models = script["variants"](size, script["BenchmarkArguments"](image_size=32), images)
    labels = torch.arange(2)
    losses = []
    for name in ("plain/none", "sdpa/none"):
        model = models[name].train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses.append(script["losses_of"](model(images), labels))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    losses[0].backward()
    assert all(one.grad is not None for one in models["plain/none"].parameters() if one.requires_grad)


def test_another_function_is_not_timed(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any]) -> None:
    with torch.no_grad():
        monkeypatch.setattr(script["PlainAttention"], "forward", lambda self, x: self.proj(x))
        with pytest.raises(ValueError, match="the plain t2t_vit_7 differ by .* times cannot be compared"):
            script["variants"]("t2t_vit_7", script["BenchmarkArguments"](image_size=32), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "volo_d9"], r"--models volo_d9 is unknown; choose from t2t_vit_7, .*, volo_d5"),
        (["--models", "t2t_vit_t_14"], r"--models t2t_vit_t_14 is unknown"),
        (["--rounds", "0"], "--rounds 0 and --batch_size 8 must be at least 1"),
    ],
)
def test_bad_arguments_are_errors(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *arguments)
