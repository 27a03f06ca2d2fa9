"""Every source of images ends in the same rows, and data that cannot be used is reported with the next step."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from sklearn.datasets import load_digits

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import ImageData, load_image_data
from hf_dropkey.classification.sources import find_image_column, find_label_column, stratified_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 6), (shade, shade, shade)).save(file, format="PNG")
    return file.getvalue()


def shade_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def folder_of(root: Path, **counts: int) -> Path:
    """Image folder with the given number of images per class."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            (root / name / f"{image:03d}.png").write_bytes(png(100 * number + image))
    return root


def table_of(file: Path, labels: list, **columns: list) -> Path:
    """Parquet with images as plain structs, as other tools write it."""
    images = [{"bytes": png(number), "path": None} for number in range(len(labels))]
    Dataset.from_dict({"image": images, "label": labels, **columns}).to_parquet(file)
    return file


def load(training: bool = True, **arguments: Any) -> ImageData:
    return load_image_data(DataArguments(**arguments), training=training)


def test_digits_are_those_of_scikit_learn_a_fifth_of_each_class_for_testing():
    data = load()
    assert data.evaluation_split == "test"
    assert data.label_names == [str(number) for number in range(10)]
    found = []
    for split in (data.train, data.evaluation):
        assert split.column_names == ["image", "label", "row"]
        found += [
            (np.asarray(image).tobytes(), label) for image, label in zip(split["image"], split["label"], strict=True)
        ]
    source = load_digits()
    scaled = np.rint(source.images * 255 / 16).astype(np.uint8)
    expected = [(image.tobytes(), int(label)) for image, label in zip(scaled, source.target, strict=True)]
    assert sorted(found) == sorted(expected)
    counts = np.bincount(data.evaluation["label"][:]) / np.bincount(source.target)
    assert np.abs(counts - 0.2).max() < 0.005
    assert load(dataset_name="digits").evaluation["label"][:] == data.evaluation["label"][:]


def test_folders_share_their_classes_even_where_one_lacks_some(tmp_path):
    train, validation = folder_of(tmp_path / "t", bee=3, cat=2, dog=2), folder_of(tmp_path / "v", dog=2)
    data = load(train_dir=str(train), validation_dir=str(validation))
    assert data.label_names == ["bee", "cat", "dog"]
    assert [data.label_ids[label] for label in data.evaluation["label"]] == [2, 2]
    assert (len(data.train), data.evaluation_split) == (7, "validation")


def test_without_a_split_to_evaluate_on_a_share_of_each_class_is_kept(tmp_path):
    folder = str(folder_of(tmp_path / "t", cat=20, dog=40))
    data = load(train_dir=folder, train_val_split=0.25)
    assert np.bincount(data.evaluation["label"][:]).tolist() == [5, 10]
    assert np.bincount(data.train["label"][:]).tolist() == [15, 30]
    assert not set(data.train["row"]) & set(data.evaluation["row"])
    assert data.evaluation_split == "0.25 of train"
    again = load(training=False, train_dir=folder, train_val_split=0.25)
    assert again.train is None and again.evaluation["row"][:] == data.evaluation["row"][:]


def test_a_held_out_part_leaves_the_split_for_evaluation_alone():
    held_out, usual = load(hold_out_validation=True, train_val_split=0.2), load()
    assert (held_out.evaluation_split, usual.evaluation_split) == ("0.2 of train", "test")
    kept, trained = set(held_out.evaluation["row"]), set(held_out.train["row"])
    assert not kept & trained and kept | trained == set(usual.train["row"])


def test_shares_are_spread_over_the_rows_of_each_class():
    assert stratified_rows([0] * 10 + [1] * 4 + [2], fraction=0.5).tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert stratified_rows(["a", "b"] * 2, fraction=0.1).tolist() == []


def test_parquet_without_metadata_and_with_number_labels(tmp_path):
    train = table_of(tmp_path / "train.parquet", [12, 5, 7, 12])
    validation = table_of(tmp_path / "validation.parquet", [7])
    data = load(train_file=str(train), validation_file=str(validation))
    # 5 before 12: the order of numbers, not of their names
    assert data.label_names == ["5", "7", "12"]
    assert [data.label_ids[label] for label in data.train["label"]] == [2, 0, 1, 2]
    assert [shade_of(image) for image in data.train["image"]] == [0, 1, 2, 3]


def test_a_glob_pattern_takes_all_files(tmp_path):
    for number in (0, 1):
        table_of(tmp_path / f"train-{number}.parquet", [0, 1] * 5)
    assert len(load(train_file=str(tmp_path / "train-*.parquet"), train_val_split=0.1).train) == 18


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_tables_name_image_files_beside_them(tmp_path, kind):
    rows = []
    for number, name in enumerate(["cat", "dog", "cat"]):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        rows.append({"file_name": f"{number}.png", "label": name})
    file = tmp_path / f"train.{kind}"
    lines = ["file_name,label"] + [f"{row['file_name']},{row['label']}" for row in rows]
    file.write_text("\n".join(lines if kind == "csv" else map(json.dumps, rows)))
    data = load(train_file=str(file), validation_file=str(file))
    assert data.label_names == ["cat", "dog"]
    assert [shade_of(image) for image in data.train["image"]] == [0, 1, 2]


def test_data_sets_by_name_may_be_folders_and_pick_splits(tmp_path):
    name = str(tmp_path / "data")
    Path(name).mkdir()
    for split in ("train", "test"):
        table_of(Path(name) / f"{split}.parquet", [0, 1], other=[1, 2])
    assert load(dataset_name=name).evaluation_split == "test"
    with pytest.raises(ValueError, match="no split 'dev' among"):
        load(dataset_name=name, eval_split_name="dev")
    with pytest.raises(ValueError, match="split 'train' is for training and evaluation"):
        load(dataset_name=name, eval_split_name="train")
    assert load(training=False, dataset_name=name, eval_split_name="train").evaluation_split == "train"


def test_columns_are_found_by_type_then_by_usual_name():
    features = Features({"img": datasets.Image(), "image": Value("string"), "kind": ClassLabel(names=["a"])})
    assert find_image_column(features, None) == "img"
    assert find_image_column(features, "image") == "image"
    assert find_label_column(features, None) == "kind"
    plain = Features({"path": Value("string"), "label": Value("string"), "id": Value("int64")})
    assert (find_image_column(plain, None), find_label_column(plain, None)) == ("path", "label")


@pytest.mark.parametrize(
    ("find", "features", "wanted", "message"),
    [
        (find_image_column, {"id": Value("int64")}, None, "no image column among .*--image_column_name"),
        (
            find_image_column,
            {"a": datasets.Image(), "b": datasets.Image()},
            None,
            r"several image columns \['a', 'b'\]",
        ),
        (find_image_column, {"a": datasets.Image()}, "pic", r"no column 'pic'; the data has \['a'\]"),
        (find_image_column, {"a": Value("int64")}, "a", "column 'a' holds .*int64.*, not images"),
        (find_label_column, {"a": datasets.Image()}, None, "no label column .* one sub-folder per class"),
        (
            find_label_column,
            {"fine": ClassLabel(names=["x"]), "coarse": ClassLabel(names=["y"])},
            None,
            r"several label columns \['fine', 'coarse'\]; choose with --label_column_name",
        ),
        (find_label_column, {"a": datasets.Image()}, "species", "no column 'species'"),
    ],
)
def test_columns_that_are_not_there_are_reported(find, features, wanted, message):
    with pytest.raises(ValueError, match=message):
        find(Features(features), wanted)


def test_one_column_for_images_and_labels_is_told(tmp_path):
    file = table_of(tmp_path / "train.parquet", ["cat", "dog"])
    with pytest.raises(ValueError, match="'image' cannot hold the images and the labels"):
        load(train_file=str(file), label_column_name="image")


@pytest.mark.parametrize(
    ("labels", "evaluation", "message"),
    [
        (
            ["cat", "dog"],
            ["cow", "cow", "cat"],
            r"2 of 3 labels in the validation split .*cow \(2 times, first in row 0\)",
        ),
        (["cat", None, "dog"], ["cat"], r"1 of 3 labels in the train split .*no label \(1 times, first in row 1\)"),
        ([0.5, 1.5], [0.5], "label column holds .*; allowed are ClassLabel, string and integer"),
    ],
)
def test_labels_that_cannot_be_used_are_reported(tmp_path, labels, evaluation, message):
    train = table_of(tmp_path / "train.parquet", labels)
    validation = table_of(tmp_path / "validation.parquet", evaluation)
    with pytest.raises(ValueError, match=message):
        load(train_file=str(train), validation_file=str(validation))


def test_a_fraction_that_leaves_nothing_is_reported(tmp_path):
    train = table_of(tmp_path / "train.parquet", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"the 0.1 of train split has no rows"):
        load(train_file=str(train), train_val_split=0.1)


def test_the_unlabelled_rows_of_a_hub_test_split_are_reported(tmp_path):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    for split, labels in (("train", [0, 1]), ("test", [-1, -1])):
        rows = {"image": [{"bytes": png(0), "path": None}] * 2, "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"2 of 2 labels in the test split .*-1 \(2 times, first in row 0\)"):
        load(dataset_name=str(tmp_path))


def test_a_choice_of_samples_is_not_the_first_class_and_is_repeatable(tmp_path):
    folder = str(folder_of(tmp_path / "t", cat=30, dog=30))
    data = load(train_dir=folder, max_train_samples=20, max_eval_samples=4)
    assert (len(data.train), len(data.evaluation)) == (20, 4)
    assert set(data.train["label"]) == {0, 1}
    assert load(train_dir=folder, max_train_samples=20).train["row"][:] == data.train["row"][:]
    assert len(load(train_dir=folder, max_train_samples=10**6).train) == 52


def test_bad_files_in_a_folder_stop_the_run_or_are_skipped(tmp_path):
    folder = folder_of(tmp_path / "t", cat=10, dog=10)
    (folder / "cat" / "000.png").write_bytes(b"")
    (folder / "dog" / "003.png").write_bytes(png(3)[:40])
    with pytest.raises(
        ValueError, match=r"2 of 16 images in the train split cannot be used: .*000.png \(empty"
    ) as caught:
        load(train_dir=str(folder))
    assert "003.png" in str(caught.value) and "--skip_bad_images" in str(caught.value)
    kept = load(train_dir=str(folder), skip_bad_images=True).train
    # a row keeps its number whatever was skipped before it
    assert len(kept) == 14 and 0 not in kept["row"][:] and max(kept["row"]) == 19
    assert len(load(train_dir=str(folder), check_images=False).train) == 16


def test_an_image_that_goes_bad_after_the_check_or_without_one_is_named_where_it_is_read(tmp_path):
    folder = folder_of(tmp_path / "train", a=4, b=4)
    data = load(train_dir=str(folder), train_val_split=0.25)
    (folder / "a" / "001.png").write_bytes(png(1)[:40])
    message = r"001\.png \(.*\)\. Repair or remove it; --check_images True .*--skip_bad_images leaves them out"
    with pytest.raises(ValueError, match=message):
        data.train[:]
    file = tmp_path / "some.parquet"
    cells = [{"bytes": png(number)[: 40 if number == 1 else None], "path": None} for number in range(4)]
    Dataset.from_dict({"image": cells, "label": ["a", "b"] * 2}).to_parquet(file)
    rows = load(train_file=str(file), validation_file=str(file), check_images=False).train
    assert shade_of(rows[2]["image"]) == 2
    with pytest.raises(ValueError, match=r"an image cannot be used: row 1 \("):
        rows[1]


def test_a_repaired_file_is_good_again(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "train.csv").write_text("image,label\n0.png,a\n0.png,b\n")
    arguments = {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "train.csv")}
    with pytest.raises(ValueError, match="2 of 2 images"):
        load(**arguments)
    (tmp_path / "0.png").write_bytes(png(7))
    assert len(load(**arguments).train) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"train_dir": "gone"}, FileNotFoundError, "train folder gone is not there"),
        ({"train_dir": "README.md"}, FileNotFoundError, "README.md is a file, which --train_file"),
        ({"train_file": "tests"}, ValueError, "tests is a folder; name a folder of images with --train_dir"),
        ({"train_file": "gone*.parquet"}, FileNotFoundError, r"no train file matches gone\*.parquet"),
        ({"train_file": "README.md"}, ValueError, r"data files end in \['.md'\]; use files of one kind"),
        ({"validation_dir": "tests"}, ValueError, "no label column|no split 'train'"),
    ],
)
def test_sources_that_are_not_there_are_reported(arguments, kind, message, monkeypatch, tmp_path):
    (tmp_path / "README.md").touch()
    folder_of(tmp_path / "tests", cat=1, dog=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        load(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset_name": "digits", "train_dir": "x"},
            "--dataset_name digits and --train_dir x are several data sources at once",
        ),
        ({"train_val_split": 1.0}, r"--train_val_split 1.0 is outside \(0, 1\)"),
        ({"hold_out_validation": True, "eval_split_name": "test"}, "name two splits to evaluate on; keep one"),
        ({"max_train_samples": 0}, "--max_train_samples 0 is below 1"),
        ({"preprocessing_num_workers": -1}, "--preprocessing_num_workers -1 is below 1"),
    ],
)
def test_arguments_that_make_no_sense_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name", "is_digits"),
    [
        ({}, "digits", True),
        ({"dataset_name": "digits"}, "digits", True),
        ({"dataset_name": "owner/flowers"}, "owner/flowers", False),
        ({"validation_dir": "/data/digits/"}, "digits", False),
        ({"train_file": "/data/train-*.parquet"}, "train-*.parquet", False),
    ],
)
def test_data_has_a_name_that_may_be_published(arguments, name, is_digits):
    found = DataArguments(**arguments)
    assert (found.name, found.is_digits) == (name, is_digits)


def test_a_model_keeps_its_own_numbers_for_the_classes(tmp_path):
    data = load(training=False, validation_dir=str(folder_of(tmp_path / "v", cat=1, dog=1)))
    matched = data.with_label_names(["dog", "emu", "cat"])
    assert [matched.label_ids[label] for label in data.evaluation["label"]] == [2, 0]
    with pytest.raises(ValueError, match="1 classes that the model does not know: dog; the model knows cat, emu"):
        data.with_label_names(["cat", "emu"])


@pytest.mark.parametrize(
    ("name", "classes", "rows"), [("flowers12", 12, (658, 239)), ("cifar10_tiny", 10, (1000, 200))]
)
def test_parquet_of_real_photographs(shared_data, name, classes, rows):
    files = {
        f"{split}_file": str(shared_data / name / f"{part}-*.parquet")
        for split, part in (("train", "train"), ("validation", "test"))
    }
    data = load(**files)
    assert (len(data.label_names), len(data.train), len(data.evaluation)) == (classes, *rows)
    assert data.train[0]["image"].mode == "RGB"
