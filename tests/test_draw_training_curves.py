"""The job that draws training curves finds the runs of each kind, and says what is wrong with a run."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image


SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "draw_training_curves.py"


def draw(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run_folder(folder: Path, losses: list[float]) -> str:
    folder.mkdir()
    history = [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return str(folder)


def test_runs_of_a_kind_become_one_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, losses) for name, losses in (("a", [2, 1]), ("b", [3, 1]), ("c", [4, 3]))]
    file = tmp_path / "figures" / "curves.png"
    draw(monkeypatch, str(file), "--runs", *(f"{kind}={folder}" for kind, folder in zip("xxy", folders, strict=True)))
    with Image.open(file) as image:
        assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_folders_without_a_run_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--runs 'runs/a' is not of the form KIND=FOLDER"):
        draw(monkeypatch, str(tmp_path / "x.png"), "--runs", "runs/a")
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state\.json; pass the folder of a finished run"):
        draw(monkeypatch, str(tmp_path / "x.png"), "--runs", f"x={tmp_path}")
    folder = run_folder(tmp_path / "a", [1.0])
    with pytest.raises(ValueError, match="logged no 'eval_accuracy'"):
        draw(monkeypatch, str(tmp_path / "x.png"), "--metric", "eval_accuracy", "--runs", f"x={folder}")
    assert not (tmp_path / "x.png").exists()
