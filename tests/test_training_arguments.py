"""Recipes are read or refused in one line that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.detection.job import DetectionJob
from hf_dropkey.hoi.job import HoiJob
from hf_dropkey.mesh.job import MeshJob
from hf_dropkey.segmentation.job import SegmentationJob


ROOT = Path(__file__).resolve().parents[1]


def parse(file: Path, *words: str) -> ClassificationJob:
    return ClassificationJob.parse([str(file), "--use_cpu", "--output_dir", "unused", *words])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"cannot be read as JSON \(Expecting value"),
        (b"  \n", r"cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{\x00}\x00", "cannot be read as JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read as JSON"),
        (b'{"about":' * 100_000 + b"1" + b"}" * 100_000, "cannot be read as JSON"),
        (b"[]", "holds a list; write an object"),
        (b"null", "holds a NoneType; write an object"),
        (b'"digits"', "holds a str"),
        (b"3", "holds a int"),
    ],
)
def test_a_recipe_that_is_no_object_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"the recipe .*recipe.json {told}") as caught:
        parse(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_steps", "many", '"many", which must be a whole number'),
        ("max_steps", 1.5, "1.5, which must be a whole number"),
        ("max_steps", True, "true, which must be a whole number"),
        ("max_steps", [3], r"\[3\], which must be a whole number"),
        ("max_steps", None, "null, which must be a whole number"),
        ("learning_rate", {}, "{}, which must be a number"),
        ("do_train", "maybe", '"maybe", which must be true or false'),
        ("do_train", 1, "1, which must be true or false"),
        ("dropkey_ratio", "0.1x", "which must be a number or null"),
        ("dropkey_schedule", 3, "which must be a string or null"),
        ("model_family", "resnet", "which must be 'vit' or "),
        ("on_nonfinite_loss", None, "which must be 'stop' or 'skip'"),
        ("save_strategy", "sometimes", "which must be 'no' or "),
        ("train_dir", ["a" * 100], "which must be a string or null"),
        ("report_to", [1], "which must be .*a list"),
        ("nosuch", 1, "not arguments"),
    ],
)
def test_a_field_of_another_type_is_told(tmp_path: Path, name: str, value: Any, told: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"the recipe .*recipe.json has .*{name}.*{told}|has fields that are {told}"):
        parse(file)


def test_a_byte_order_mark_is_read_over_and_types_are_those_of_json(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    recipe = {"about": [1], "learning_rate": 1, "max_steps": 3, "report_to": ["none"], "lr_scheduler_kwargs": {}}
    file.write_text(json.dumps({**recipe, "dropkey_ratio": None, "save_strategy": "no"}), encoding="utf-8-sig")
    job = parse(file, "--max_steps", "4")
    assert job.training.learning_rate == 1 and job.training.max_steps == 4 and job.dropkey.dropkey_ratio is None


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*gone\.json; check the path"):
        parse(tmp_path / "gone.json")


@pytest.mark.parametrize("file", sorted((ROOT / "hf_dropkey" / "recipes").glob("*.json")), ids=lambda file: file.name)
def test_our_own_recipes_are_read(file: Path) -> None:
    jobs: dict[str, Any] = {"detection": DetectionJob, "hoi": HoiJob, "mesh": MeshJob, "segmentation": SegmentationJob}
    job = jobs.get(file.name.split("_")[0], ClassificationJob)
    job.parse([str(file), "--use_cpu", "--output_dir", "unused"])
