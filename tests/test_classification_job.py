"""A job trains as configured, and records all settings that determine its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_grids import RECIPE
from transformers import TrainerCallback

from hf_dropkey.classification.job import ClassificationJob


class Ratios(TrainerCallback):
    """Keeps the first layer's ratio in each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["model"].vit.layers[0].attention.dropkey_ratio)


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    def call(*words: str, **changes: Any) -> ClassificationJob:
        (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | changes))
        job = ClassificationJob.parse([str(tmp_path / "recipe.json"), "--output_dir", str(tmp_path / "run"), *words])
        job.check()
        return job

    return call


def test_the_last_steps_are_trained_without_dropkey(parse: Any, tmp_path: Path) -> None:
    job = parse("--dropkey_ratio", "0.4", "--dropkey_alignment", "0.5")
    data = job.load()
    trainer, ratios = job.trainer(job.make_model(data), data), Ratios()
    trainer.add_callback(ratios)
    trainer.train()
    assert ratios.seen == [0.4, 0.4, 0.0, 0.0]
    # what is saved keeps the settings
    trainer.save_model()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dropkey_ratio"] == 0.4


def test_settings_that_determine_the_weights_are_recorded(parse: Any, tmp_path: Path) -> None:
    settings = parse().settings()
    assert parse().settings() == settings and json.loads(json.dumps(settings)) == settings
    for words in (
        ["--seed", "1"],
        ["--dropkey_alignment", "0.1"],
        ["--max_train_samples", "8"],
        ["--crop_scale", "0.5"],
        ["--adam_beta2", "0.9"],
        ["--dataloader_drop_last", "True"],
        ["--on_nonfinite_loss", "skip"],
    ):
        other = parse(*words).settings()
        assert [name for name in settings if settings[name] != other[name]] == [words[0].removeprefix("--")]
    # where the files are does not matter, but what is in them
    file = "some-data/train.parquet"
    assert parse("--train_file", file, "--train_split_name", "train").settings()["train_file"] == "train.parquet"
    names, contents = set(), {}
    for place, held in (("one", b"a"), ("two [v2]", b"a"), ("three", b"b")):
        there = tmp_path / place / "train-0.parquet"
        there.parent.mkdir()
        there.write_bytes(held)
        for given in ("train-0.parquet", "train-*.parquet"):
            settings = parse("--train_file", str(there.with_name(given)), "--train_split_name", "train").settings()
            names.add(settings["train_file"])
            contents[place, given] = settings["train_file_contents"]
    assert names == {"train-0.parquet", "train-*.parquet"}
    assert (
        len(set(contents.values())) == 2
        and contents["one", "train-0.parquet"] == contents["two [v2]", "train-*.parquet"]
    )
    # images that are held out come from the training rows
    held_out = ["--train_file", str(tmp_path / "one" / "train-0.parquet"), "--hold_out_validation", "True"]
    assert parse(*held_out).settings() == parse(*held_out, "--validation_file", "test.parquet").settings()


def test_a_mistake_is_reported_before_data_is_read(parse: Any) -> None:
    with pytest.raises(ValueError, match="--image_size 9 is not a multiple of --patch_size 2"):
        parse("--image_size", "9")
    with pytest.raises(ValueError, match="`warmup` is a fraction"):
        parse("--dropkey_warmup", "2")
