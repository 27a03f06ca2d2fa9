"""The console command answers help, version and mistakes at once, without loading torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_dropkey import __version__
from hf_dropkey.cli import PROGRAMS as RUNNERS
from hf_dropkey.cli import help_texts
from hf_dropkey_cli import main
from hf_dropkey_cli.parser import PROGRAMS, parse, program_words
from hf_dropkey_cli.short_help import FILE, short_help


ROOT = Path(__file__).resolve().parents[1]
# what takes seconds to load
HEAVY = ("torch", "transformers", "hf_dropkey", "numpy", "huggingface_hub")
PROBE = f"""
import sys
from hf_dropkey_cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code in (0, 2), ended.code
assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["train", "--help"],
        ["train", "recipe:hoi_scenes", "-h"],
        ["look", "--help"],
        ["check", "--help"],
        ["nothing"],
        ["train", "--task", "nothing"],
    ],
    ids=" ".join,
)
def test_help_loads_nothing_that_is_slow(words: list[str]) -> None:
    begun = time.process_time()
    done = subprocess.run([sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr.count("\n") == 1
    assert time.process_time() - begun < 1


def test_the_short_help_is_current() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8")) == help_texts(), "run python scripts/write_help.py"
    assert set(RUNNERS) == {(verb, task) for verb, tasks in PROGRAMS.items() for task in tasks}


@pytest.mark.parametrize(("verb", "task"), sorted(RUNNERS))
def test_the_short_help_names_every_argument_of_the_project(
    verb: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = short_help(verb, task)
    assert max(map(len, printed.splitlines())) <= 120 and len(printed.splitlines()) < 140
    groups = help_texts()[verb][task]["groups"]
    assert all(f"  --{name}" in printed for group in groups for name, _ in group["arguments"])


def test_the_whole_help_has_the_arguments_of_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help_all"])
    assert ended.value.code == 0 and "--torch_compile_backend" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--torch_compile_backend" not in capsys.readouterr().out


def test_the_task_is_that_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert program_words("train", ["recipe:hoi_scenes", "--seed", "1"]).task == "hoi"
    assert program_words("train", ["--task", "mesh", "recipe:mesh_generated"]).rest == ("recipe:mesh_generated",)
    assert program_words("train", ["recipe:digits_vit"]).task == "classification"
    assert program_words("predict", ["--images", "a.json"]).task == "classification"
    with pytest.raises(SystemExit):
        program_words("train", ["recipe:hoi_scenes", "--task", "mesh"])
    assert capsys.readouterr().err.startswith("hf-dropkey train: recipe:hoi_scenes is a recipe of --task hoi")


def test_dashes_and_underscores_are_the_same() -> None:
    for words in (["--repo-id", "me/x", "--dataset-split=a-b"], ["--repo_id", "me/x", "--dataset_split=a-b"]):
        found = parse(["card", "there", *words])
        assert (found.repo_id, found.dataset_split) == ("me/x", "a-b")
    assert parse(["push", "a", "b", "--dry-run", "--replace_readme"]).dry_run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["check"], "the following arguments are required: target"),
        (["info", "there", "--unknown"], "unrecognized arguments: --unknown"),
        (["predict", "--task", "detection"], "invalid choice: 'detection'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and told in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--lerning_rate", "1"], "unknown arguments: --lerning_rate (did you mean --learning_rate?)"),
        (
            ["train", "--learning_rate", "fast"],
            "argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        (
            ["train", "--use_cpu", "True", "recipe:digits_vit"],
            "unknown words: recipe:digits_vit; a recipe comes first",
        ),
        (["train", "recipe:digit"], "there is no recipe 'digit'; there are detection_overfit, digits_ceit"),
        (["predict", "--images", "a.png"], "the following arguments are required: --model_name_or_path"),
        (["evaluate", "--task", "hoi", "--output_dir", "x"], "give the model to measure with --model_name_or_path"),
        (["evaluate", "--task", "mesh", "--output_dir", "x"], "give the model to measure with --model_name_or_path"),
        (
            ["train", "--output_dir", "x", "--do_train", "--attn_implementation", "sdp"],
            "choose from dropkey_triton, eager",
        ),
    ],
)
def test_a_mistake_in_a_program_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-dropkey {words[0]}: ") and told in line


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "hf_dropkey", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"hf-dropkey {__version__}\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -c 'from hf_dropkey_cli import main; print(main([\"recipes\"]))' | head -n 1"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("recipe:") and not done.stderr


def test_a_script_tells_a_mistake_in_one_line() -> None:
    script = ROOT / "scripts" / "evaluate_image_classification.py"
    command = [sys.executable, str(script), "--model_name_or_path", "./gone"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"{script}: --model_name_or_path ./gone is not there")
    shown = subprocess.run(
        [*command[:2], "--debug", *command[2:]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" in shown.stderr
