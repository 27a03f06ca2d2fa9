"""Defaults by kind of start fill what a command without a recipe leaves out, and nothing else."""

from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.training.defaults import BEST, RATES, default_words, says, start_of, wants
from hf_dropkey.training.finetune import FineTuningArguments


TRAIN = ["--do_train", "--do_eval", "--output_dir", "run", "--use_cpu"]


def test_the_kind_of_start_is_read_off_the_command() -> None:
    assert start_of(TRAIN) == "scratch"
    assert start_of([*TRAIN, "--model_name_or_path=there"]) == "pretrained"
    assert start_of([*TRAIN, "--model-name-or-path", "there", "--lora-r", "8"]) == "lora"


def test_words_of_a_command_are_recognised_as_the_parser_would() -> None:
    assert says(["--learning_rate=1"], "learning_rate") and says(["--learning-rate", "1"], "learning_rate")
    assert says(["--learning", "1"], "learning_rate") and not says(["--lr", "1"], "learning_rate")
    assert not says(["learning_rate"], "learning_rate")
    assert wants(["--do_eval"], "do_eval") and wants(["--do_eval", "True"], "do_eval")
    assert not wants(["--do_eval", "False"], "do_eval") and not wants(["--do_eval=no"], "do_eval")
    assert wants(["--do_eval", "--use_cpu"], "do_eval") and not wants(["--do_train"], "do_eval")


@pytest.mark.parametrize(("words", "kind"), [([], "scratch"), (["--model_name_or_path", "x"], "pretrained")])
def test_what_the_command_leaves_out_is_filled(words: list[str], kind: str) -> None:
    parser = HfArgumentParser([TrainingArguments, FineTuningArguments])  # type: ignore[list-item]  # data classes
    added = default_words([*TRAIN, *words])
    training, tuning = parser.parse_args_into_dataclasses([*TRAIN, *added])
    assert training.num_train_epochs == float(RATES[kind]["num_train_epochs"])
    assert training.learning_rate == float(RATES[kind]["learning_rate"])
    assert tuning.head_learning_rate == (1e-3 if kind == "pretrained" else None)
    assert training.load_best_model_at_end and training.metric_for_best_model == "accuracy"
    assert training.greater_is_better and training.eval_strategy == training.logging_strategy == "epoch"


def test_what_the_command_says_stays() -> None:
    words = default_words([*TRAIN, "--learning_rate", "0.1", "--num_train_epochs", "2", "--model_name_or_path", "x"])
    assert not {"--learning_rate", "--num_train_epochs", "--head_learning_rate"} & set(words)
    assert "--num_train_epochs" not in default_words([*TRAIN, "--max_steps", "5"])
    for name in BEST[1]:
        assert "--load_best_model_at_end" not in default_words([*TRAIN, f"--{name}", "1"]), name
    assert "--eval_strategy" not in default_words(["--do_train"])
    assert "--logging_strategy" not in default_words([*TRAIN, "--logging_steps", "5"])


def test_recipes_and_evaluations_get_none() -> None:
    assert default_words(["recipe.json", *TRAIN]) == default_words(["--do_eval"]) == default_words([]) == []


def test_a_job_adds_them_to_its_command_and_logs_them_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = ClassificationJob.parse([*TRAIN[:2], "--output_dir", str(tmp_path / "run"), "--use_cpu"])
    assert training.training.num_train_epochs == 60 and training.training.save_total_limit == 2
    with caplog.at_level("INFO"):
        training.begin()
    (line,) = [record.message for record in caplog.records if "defaults" in record.message]
    assert line.startswith("defaults for a start from random weights, where the command says nothing: --per_device")
    assert "--num_train_epochs 60" in line and "--load_best_model_at_end True" in line
