"""`hf-dropkey search` trains trials on held-out rows, goes on after a kill, and writes a recipe that trains."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import RECIPE

from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.cli import main


ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("optuna", reason="needs the extra [search]")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    small: dict[str, Any] = {
        **RECIPE,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
    }
    small |= {"max_eval_samples": 40, "disable_tqdm": True}
    del small["do_train"], small["do_eval"]
    (tmp_path / "small.json").write_text(json.dumps(small))
    return [str(tmp_path / "small.json"), "--hold_out_validation", "--output_dir", str(tmp_path / "found")]


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> list[tuple[str, ...]]:
    names = ("trial", "state", "value", "ratio", "final_ratio", "schedule", "pattern")
    return [tuple(row[name] for name in names) for row in trials(folder)]


def test_a_search_writes_a_recipe_that_trains_to_the_same_result(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *words, "--trials", "3"]) == 0
    folder = tmp_path / "found"
    printed = capsys.readouterr().out
    assert "trial  state" in printed and f"next: hf-dropkey train {folder / 'best.json'}" in printed
    assert {path.name for path in folder.iterdir()} == {
        "best.json", "search.db", "search.png", "trials", "trials.csv", ".run",
    }  # fmt: skip
    assert not list((folder / "trials").iterdir())
    with Image.open(folder / "search.png") as image:
        assert image.width > 600
    rows = trials(folder)
    assert [row["ratio"] for row in rows[:2]] == ["0.0", "0.1"] and len(rows) == 3
    best = max(rows, key=lambda row: (float(row["value"]), -int(row["trial"])))
    found = json.loads((folder / "best.json").read_text())
    assert found["dropkey_ratio"] == float(best["ratio"]) and found["max_steps"] == 8
    assert found["task"] == "classification" and "hold_out_validation" not in found and "trials" not in found
    # on the rows that chose it, the recipe gives the number that chose it
    again = str(folder / "best.json"), "--hold_out_validation", "--output_dir", str(tmp_path / "again")
    assert main(["train", *again]) == 0
    measured = json.loads((tmp_path / "again" / "eval_results.json").read_text())
    assert measured["eval_accuracy"] == pytest.approx(float(best["value"]))
    # and without them it trains on all rows
    job = ClassificationJob.parse([str(folder / "best.json")])
    assert not job.data.hold_out_validation and job.output == folder / "best"


@pytest.mark.slow
def test_an_equal_search_has_the_same_trials_and_a_complete_one_runs_none(words: list[str], tmp_path: Path) -> None:
    assert main(["search", *words, "--trials", "2"]) == 0
    before = results(tmp_path / "found")
    assert main(["search", *words, "--trials", "2"]) == 0
    assert results(tmp_path / "found") == before
    other = [*words[:-1], str(tmp_path / "other"), "--trials", "2", "--keep_trials"]
    assert main(["search", *other]) == 0
    assert results(tmp_path / "other") == before
    assert (tmp_path / "other" / "trials" / "0001" / "report.html").is_file()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--hold_out_validation", "False"], "compared on the test images (split 'test')"),
        (["--dropkey_ratio", "0.2"], "--dropkey_ratio is what the search chooses; leave it out, or bound the search with --search_ratio"),
        (["--dropkey_final-ratio=0.1"], "bound the search with --search_final_fractions"),
        (["--search_patterns", "blok"], "--search_patterns blok is not known"),
        (["--eval_strategy", "no"], "there are none; pass --eval_strategy epoch, or --prune False"),
        (["--push_to_hub"], "--push_to_hub would upload every trial"),
        (["--metric_for_best_model", "size"], "--metric_for_best_model size is not a metric to choose by; choose from accuracy, top5_accuracy, nll, ece, loss"),
        (["--lerning_rate", "1"], "unknown arguments: --lerning_rate (did you mean --learning_rate?)"),
        (["--image_size", "9"], "--image_size 9 is not a multiple"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    words: list[str], extra: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *words, *extra]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-dropkey search: ") and told in error
    assert not (tmp_path / "found" / "search.db").exists()


def test_a_folder_with_something_else_is_left_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "mine.txt").write_text("mine")
    assert main(["search", *words, "--trials", "1"]) == 2
    assert "holds no search (search.db); choose another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "found" / "mine.txt").read_text() == "mine"


def test_a_test_folder_is_no_validation_set(words: list[str], tmp_path: Path, capsys: Any) -> None:
    for split in ("train", "my_test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8), (31 * number, 0, 0)).save(tmp_path / split / label / f"{split}{number}.png")
    folders = ["--train_dir", str(tmp_path / "train"), "--validation_dir", str(tmp_path / "my_test")]
    assert main(["search", words[0], *folders, "--output_dir", str(tmp_path / "x"), "--trials", "1"]) == 2
    assert "compared on the test images (my_test)" in capsys.readouterr().err


def test_settings_that_fail_are_rows_of_the_table(words: list[str], tmp_path: Path, capsys: Any) -> None:
    # attention dropout is compared with DropKey, and refused beside it
    dropout = ["--attention_probs_dropout_prob", "0.1", "--search_ratio", "0", "0.5", "--trials", "2"]
    assert main(["search", *words, *dropout]) == 2
    assert "are both above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_search_goes_on(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_dropkey", "search", *words, "--trials", "5", "--max_steps", "40"]
    command += ["--save_strategy", "steps", "--save_steps", "8", "--eval_steps", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
    folder = tmp_path / "found"
    for trial in ("0001", "0003"):
        process = subprocess.Popen(command, **options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        # in the middle of a trial that has a checkpoint
        while not list((folder / "trials" / trial).glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert not (folder / "trials.csv").exists()
    done = subprocess.run(command, **options, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = [*command, "--output_dir", str(tmp_path / "whole")]
    assert subprocess.run(whole, **options, capture_output=True, timeout=600).returncode == 0
    assert results(folder) == results(tmp_path / "whole")
