"""The console command does what the library does, and turns errors into one line and an exit code."""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hub_server import TOKEN, serving
from huggingface_hub import ModelCard
from PIL import Image
from small_runs import SHAPE
from transformers import DetrConfig, Dinov2Config, Dinov2Model, ViTImageProcessorPil

import hf_dropkey
from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, load_classifier
from hf_dropkey.cli import COMMANDS, main
from hf_dropkey.training.job import started_command


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    config = DropKeyViTConfig(**{**SHAPE, "num_hidden_layers": 3}, dropkey_ratio=0.3, dropkey_schedule="decreasing")
    DropKeyViTForImageClassification(config).save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_the_command_is_installed_under_its_name() -> None:
    (entry,) = entry_points(group="console_scripts", name="hf-dropkey")
    assert entry.load() is main


def test_check_answers_by_its_exit_code(folder, capsys):
    assert main(["check", folder]) == 0
    assert "trusted: " in capsys.readouterr().out
    Path(folder, "training_args.bin").touch()
    assert main(["check", folder]) == 1
    assert "problem: training_args.bin" in capsys.readouterr().out


def test_export_writes_a_plain_checkpoint(folder, tmp_path, capsys):
    assert main(["export", folder, str(tmp_path / "plain")]) == 0
    assert "ViTForImageClassification, a plain Transformers checkpoint" in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "vit"
    assert not list((tmp_path / "plain").glob("*.py"))


def test_card_writes_the_facts_of_its_arguments(folder, capsys):
    words = ["--license", "mit", "--dataset", "Cats", "--repo_id", "me/cats", "--command", "python train.py"]
    assert main(["card", folder, *words]) == 0
    assert capsys.readouterr().out.strip().endswith("README.md")
    # facts are given once and kept for later cards
    assert main(["card", folder, "--dataset-split", "test"]) == 0
    card = ModelCard.load(Path(folder, "README.md"))
    assert card.data.license == "mit" and "trained on the Cats dataset" in card.text and "python train.py" in card.text


def test_info_lists_every_attention_with_its_ratio(folder, capsys):
    assert main(["info", folder]) == 0
    printed = capsys.readouterr().out
    assert "schedule      decreasing" in printed and "3 attentions drop keys" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip().startswith("vit.layers.")]
    assert [row[4] for row in rows] == ["0.3", "0.15", "0"] and {row[-1] for row in rows} == {"sdpa"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["check", "gone/a/b"], "gone/a/b is neither a folder"),
        (["check", "./gone"], "./gone is neither a folder"),
        (["export", "gone", "x"], "gone is not a folder, nor owner/name of a repository on the Hub"),
        (["export", "me/gone", "x"], "me/gone was not read: there is no such folder, it is not in the cache"),
        (["export", "saved/config.json", "x"], "saved/config.json is a file; give the folder it lies in"),
        (["export", "saved", "x", "--revision", "main"], "saved is a folder, which has no revisions"),
        (["push", "gone", "me/x"], "gone is not a folder"),
        (["push", "saved", "a--b"], "Cannot have -- or .."),
        (["push", "saved", "a/b/c", "--dry_run"], "a/b/c"),
        (["push", "saved", "me/x", "--dry-run", "--revision", "0" * 40], "is a commit, which cannot be pushed to"),
        (["push", "saved", "me/x"], "HF_HUB_OFFLINE is set"),
        (["push", "saved/config.json", "me/x"], "is a file; give the folder it lies in"),
        (["card", "gone"], "gone has no config.json"),
        (["info", "gone"], "gone is not a folder, nor owner/name of a repository on the Hub"),
        (["info", "."], "has no config.json"),
        (["export", "saved", "saved"], "would be overwritten by its own export"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder, monkeypatch, capsys, command, message):
    monkeypatch.chdir(Path(folder).parent)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-dropkey {command[0]}: ") and message in error


def test_an_unknown_command_is_reported(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["upload"])
    assert caught.value.code == 2 and "check" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and all(name in printed for name in ("check", "export", "push", "card", "info"))


@pytest.mark.slow
def test_push_and_check_a_repository(folder, tmp_path):
    Path(folder, "training_args.bin").touch()
    code = """
    from hf_dropkey.cli import main
    push = ["push", "saved", "tester/cli", "--private", "--message", "By hand"]
    print(main(push), main(push), main(["check", "tester/cli"]), main(["info", "tester/cli"]))
    print(main(["export", "tester/cli", "plain"]), main(["info", "tester/none"]), main(["info", "tester/cli", "--revision", "x"]))
    """
    with serving() as hub:
        done = hub.run(code, tmp_path)
        assert done.stdout.splitlines()[-1] == "0 2 2" and "0 0 0 0" in done.stdout.splitlines()
        assert "hf-dropkey info: tester/none was not read: there is no repository tester/none" in done.stderr
        assert "hf-dropkey info: tester/cli was not read: tester/cli has no such branch or commit" in done.stderr
        assert hub.repositories["tester/cli"].private and hub.messages("tester/cli")[1:] == ["By hand"]
    assert "nothing new, no commit made" in done.stdout and "  training_args.bin (0 bytes)" in done.stdout
    assert done.stdout.count("load it with revision=") == 3 and "3 attentions drop keys" in done.stdout
    assert (tmp_path / "plain" / "model.safetensors").is_file() and not list((tmp_path / "plain").glob("*.py"))


RUN = ["--do_train", "--max_steps", "1", "--max_train_samples", "8", "--use_cpu", "--report_to", "none"]


def test_a_pip_user_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", *RUN, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/hf-dropkey", *words])
    assert main() == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "hf-dropkey train --do_train" in card and "--output_dir run" in card


def test_a_card_shows_how_the_module_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/env/site-packages/hf_dropkey/__main__.py", "train", "--do_train"])
    assert started_command() == ["python", "-m", "hf_dropkey", "train", "--do_train"]


def test_a_mistake_is_one_line_and_debug_shows_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--output_dir", str(tmp_path), "--do_train", "--image_size", "9", "--patch_size", "2"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("hf-dropkey train: --image_size 9 is not a multiple of --patch_size 2")
        and "Traceback" not in error
    )
    with pytest.raises(ValueError, match="--image_size 9"):
        main(["--debug", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dropkey_ratio", "1.5"], "'dropkey_ratio': ValueError: `a DropKey ratio` must lie in [0, 1), got 1.5"),
        (["--dropkey_pattern", "blok"], "Known values: 'score', 'key', 'token', 'block', 'cross'."),
        (["--attention_probs_dropout_prob", "0.1"], "are both above 0"),
        (
            ["--model_name_or_path", "./gone"],
            "--model_name_or_path ./gone is not there; give the folder of a saved model",
        ),
        (["--model_name_or_path", __file__], "test_cli.py is a file; give the folder of a saved model"),
    ],
)
def test_settings_that_are_not_allowed_are_one_line(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *RUN, "--output_dir", str(tmp_path / "run"), *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("hf-dropkey train: ") and told in error


def test_unknown_arguments_of_a_command_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path), "--unknown"])
    assert "unrecognized arguments: --unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "argument"), [("classification", "--dropkey_ratio"), ("detection", "--train_annotations")]
)
def test_each_task_has_its_own_help(task: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", task, "--help"]) == 0
    assert argument in capsys.readouterr().out


def test_the_version_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-dropkey {hf_dropkey.__version__}\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FloatingPointError("the loss of step 3 is nan"), "hf-dropkey info: the loss of step 3 is nan\nstart again\n"),
        (KeyboardInterrupt(), "hf-dropkey info: interrupted\nstart again\n"),
    ],
)
def test_what_stops_a_run_is_told_with_its_notes(
    error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error.add_note("start again")

    def stopped(arguments: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "info", stopped)
    assert main(["info", "x"]) in (2, 130)
    assert capsys.readouterr().err == told


@pytest.mark.usefixtures("auto_image_processor")
def test_a_model_without_a_trained_classifier_classifies_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path / "features")
    DetrConfig().save_pretrained(tmp_path / "detr")
    (tmp_path / "detr" / "model.safetensors").write_bytes((tmp_path / "features" / "model.safetensors").read_bytes())
    for name in ("features", "detr"):
        ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path / name)
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    for name, told in (("features", "without 2 weights of an image classifier"), ("detr", "not an image classifier")):
        assert (
            main(["predict", "--model_name_or_path", str(tmp_path / name), "--images", str(tmp_path / "a.png")]) == 2
        )
        assert told in capsys.readouterr().err
        with pytest.raises(ValueError, match=told):
            load_classifier(tmp_path / name)


def test_results_that_cannot_be_written_are_told_before_the_work(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    gone = str(tmp_path / "gone" / "found.json")
    words = ["--model_name_or_path", folder, "--images", str(tmp_path / "a.png"), "--output_file", gone]
    assert main(["predict", *words]) == 2
    assert "lies in a folder that is not there" in capsys.readouterr().err
    assert main(["look", "--model_name_or_path", folder, "--output_dir", str(tmp_path / "a.png")]) == 2
