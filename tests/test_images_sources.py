"""Fingerprints of data show every kind of change."""

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import load_image_data
from hf_dropkey.images.sources import (
    changed_data,
    data_fingerprint,
    data_name,
    hub_or_data_name,
    load_named,
    near_names,
)


ROWS = [("cat/0.png", "cat", 10), ("dog/0.png", "dog", 11)]


def test_equal_data_has_equal_fingerprints_as_json_holds_them() -> None:
    found = data_fingerprint(ROWS)
    assert found == data_fingerprint(iter(ROWS)) and found["rows"] == 2
    assert all(isinstance(found[part], str) and len(found[part]) == 16 for part in ("names", "labels", "sizes"))
    assert changed_data(found, found) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:1], ["1 images instead of 2", "other file names", "other labels", "files of other sizes"]),
        (ROWS[::-1], ["other file names", "other labels", "files of other sizes"]),
        ([ROWS[0], ("dog/0.png", "cat", 11)], ["other labels"]),
        ([ROWS[0], ("dog/0.png", "dog", 12)], ["files of other sizes"]),
        ([("cat/0.pngdog/0.png", "cat", 10), ("", "dog", 11)], ["other file names"]),
    ],
)
def test_what_changed_is_reported_in_words(rows: list[tuple[str, str, int]], words: list[str]) -> None:
    changes = changed_data(data_fingerprint(ROWS), data_fingerprint(rows))
    assert len(changes) == len(words) and all(one.startswith(word) for one, word in zip(changes, words, strict=True))


def test_parts_that_an_older_record_lacks_are_not_compared() -> None:
    assert changed_data({}, data_fingerprint(ROWS)) == []
    assert changed_data({"rows": 3}, data_fingerprint(ROWS)) == ["2 images instead of 3"]


def test_names_that_differ_only_in_spaces_or_capitals() -> None:
    assert near_names(["a b", "AB", "c"]) == [("a b", "AB")]


def test_images_in_a_folder_are_distinguished_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for root in ("one", "two"):
        for name in ("cat", "dog"):
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (4, 4), "red").save(tmp_path / root / name / f"{number}.png")

    def found(root: str) -> dict[str, dict]:
        data = load_image_data(DataArguments(train_dir=str(tmp_path / root), train_val_split=0.25), training=True)
        return data.with_label_names(["dog", "emu", "cat"]).fingerprint()

    assert found("one") == found("two") and found("one")["train"]["rows"] == 6
    for file in (tmp_path / "two").rglob("*.png"):
        Image.new("RGB", (9, 9)).save(file, compress_level=0)
    assert changed_data(found("one")["train"], found("two")["train"]) == ["files of other sizes, so other images"]


def test_images_in_a_table_are_distinguished_by_their_bytes(tmp_path: Path) -> None:
    sizes = []
    for side in (4, 5):
        file = io.BytesIO()
        Image.new("RGB", (side, side)).save(file, format="BMP")
        cells = [{"bytes": file.getvalue(), "path": None}] * 4
        table = tmp_path / f"{side}.parquet"
        datasets.Dataset.from_dict({"image": cells, "label": ["a", "b"] * 2}).to_parquet(table)
        arguments = DataArguments(train_file=str(table), validation_file=str(table))
        sizes.append(load_image_data(arguments, training=True).fingerprint()["train"])
    assert changed_data(*sizes) == ["files of other sizes, so other images"]


def test_data_is_called_by_its_last_part_and_a_split_with_the_folder_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    for path, name in {
        "flowers": "flowers",
        "flowers/train": "flowers/train",
        "flowers/Validation.parquet": "flowers/Validation.parquet",
        # whose home it is stays private
        "jane/train": "train",
        "jane/cats/train": "cats/train",
    }.items():
        assert data_name(tmp_path / path) == name
    monkeypatch.chdir(tmp_path)
    assert data_name("/train") == "train" and hub_or_data_name("org/train") == "org/train"
    (tmp_path / "org" / "train").mkdir(parents=True)
    assert hub_or_data_name(str(tmp_path / "org" / "train")) == "org/train"
    # no name is not the folder we are in
    assert hub_or_data_name("") == ""


def test_a_path_without_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--dataset_name .*gone is not there; give a folder, or the id"):
        load_named(str(tmp_path / "gone"), None)
