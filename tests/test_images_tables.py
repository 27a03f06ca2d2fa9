"""Tables are read as the text that stands in them; labels that are not classes are named by their row."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import ImageData, load_image_data
from hf_dropkey.images.tables import labels_from_text, matching_files, read_csv


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(file: Path, validation: Path | None = None) -> ImageData:
    arguments = DataArguments(train_file=str(file), validation_file=str(validation or file))
    return load_image_data(arguments, training=True)


def table(file: Path, *labels: str) -> Path:
    """A CSV file with these labels, and an image for each row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for number in range(len(labels)):
        Image.new("RGB", (4, 4)).save(file.parent / f"{number}.png")
    file.write_text("file_name,label\n" + "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels)))
    return file


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["None", "NA", "null", "nan", ""][:4], ["NA", "None", "nan", "null"]),
        (["001", "002", "010"], ["001", "002", "010"]),
        (["10", "9", "9"], ["9", "10"]),
        (["1", "01"], ["01", "1"]),
        (["True", "False"], ["False", "True"]),
        (["1", "cat"], ["1", "cat"]),
        (["1e3", "cat"], ["1e3", "cat"]),
    ],
)
def test_labels_are_the_text_that_stands_there(tmp_path: Path, labels: list[str], names: list[str]) -> None:
    data = load(table(tmp_path / "t.csv", *labels))
    assert data.label_names == names
    assert [names[data.label_ids[label]] for label in data.train["label"]] == labels


def test_splits_are_read_alike(tmp_path: Path) -> None:
    train, validation = table(tmp_path / "t.csv", "1", "2"), table(tmp_path / "v.csv", "01", "2")
    with pytest.raises(
        ValueError, match=r"1 of 2 labels in the validation split .*01 \(1 times, first in row 0 \(0.png\)"
    ):
        load(train, validation)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["0", "1", "-1", "-1"],
            r"2 of 4 labels .* -1 \(2 times, first in row 2 \(2.png\)\).*below 0 stand for no class",
        ),
        (["0", "1", ""], r"1 of 3 labels .* no label \(1 times, first in row 2 \(2.png\)\)"),
        (["a", "b", ""], r"1 of 3 labels .* no label \(1 times, first in row 2 \(2.png\)\)"),
        (["0.5", "1.5"], r"the labels are numbers such as 1.5; allowed are text and whole numbers"),
        (["a", "a"], r"all 2 images to train on are of one class, 'a'"),
    ],
)
def test_labels_that_are_not_classes_are_named_by_their_row(tmp_path: Path, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(table(tmp_path / "t.csv", *labels))


def test_classes_that_differ_only_in_spaces_or_capitals_are_reported(tmp_path: Path, caplog: Any) -> None:
    load(table(tmp_path / "t.csv", "cat", "Cat", "dog", " dog"))
    assert "the classes 'Cat' and 'cat' differ only in spaces or capitals" in caplog.text
    assert "the classes ' dog' and 'dog' differ" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"file_name;label\n0.png;a\n", r"single column 'file_name;label'; separate columns with commas"),
        (b"file_name,label\n0.png,a,b\n", r"line 2: 3 columns, and 2 in the header"),
        (b"file_name,label\n0.png\n", r"line 2: 1 columns, and 2 in the header"),
        (b"file_name,label,label\n0.png,a,b\n", r"the columns \['label'\] twice"),
        (b'file_name,label\n0.png,"a\n', r"line 2: unexpected end of data; repair the line"),
        (b"file_name,label\n0.png,caf\xe9\n", r"is not text in UTF-8"),
    ],
)
def test_a_file_that_is_not_a_table_is_reported(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "t.csv")


def test_byte_order_marks_quotes_and_empty_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbffile_name,label\r\n"a,b.png","say ""x"""\r\n\r\nc.png,d\r\n')
    assert read_csv(tmp_path / "t.csv") == {"file_name": ["a,b.png", "c.png"], "label": ['say "x"', "d"]}


def test_whole_numbers_are_those_that_print_back_the_same() -> None:
    assert labels_from_text([["1", ""], ["-2"]]) == [[1, None], [-2]]
    for odd in ("+1", "1_000", "01", "\u0661", "-0", " 1"):
        assert labels_from_text([["1"], [odd]]) == [["1"], [odd]]


def test_files_are_found_whatever_their_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "images [v2]"
    first, second = table(folder / "a" / "t.csv", "x", "y"), table(folder / "b" / "t.csv", "y", "x")
    odd = table(folder / "t[1].csv", "x", "y")
    assert matching_files(str(odd)) == [str(odd)] and matching_files(str(folder / "t*.csv")) == [str(odd)]
    assert len(load(odd).train) == 2
    pattern = tmp_path / "*" / "[ab]" / "t.csv"
    assert matching_files(str(pattern)) == [str(first), str(second)]
    data = load(pattern)
    # each table names the images beside itself
    assert [
        path["path"]
        for path in data.train.with_format(None).cast_column("image", datasets.Image(decode=False))["image"]
    ] == [str(folder / name / f"{number}.png") for name in ("a", "b") for number in range(2)]


def test_parts_of_a_table_must_have_the_same_columns(tmp_path: Path) -> None:
    table(tmp_path / "1.csv", "x", "y")
    (tmp_path / "2.csv").write_text("file,label\n0.png,x\n")
    with pytest.raises(ValueError, match=r"2.csv has the columns \['file', 'label'\] and .*1.csv has"):
        load(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("G1", ["NA", "None", "car"]),
        ("G2", ["001", "002", "010"]),
        ("G4", r"1 of 12 labels in the (train|validation) split .*-1 \(1 times, first in row 5 \(dog1.png\)\)"),
    ],
)
def test_cases_that_failed_once(shared_cases: Path, tmp_path: Path, name: str, found: Any) -> None:
    file = tmp_path / f"{name}.csv"
    file.write_bytes((shared_cases / "small" / f"{name}.csv").read_bytes())
    for path in read_csv(file)["file_name"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            load(file)
    else:
        assert load(file).label_names == found


@pytest.mark.parametrize("folder", ["data", "data [v2]"])
def test_tables_of_a_data_set_by_name_are_read_as_text_too(tmp_path: Path, folder: str, monkeypatch: Any) -> None:
    table(tmp_path / folder / "train.csv", "None", "NA", "001")
    table(tmp_path / folder / "test.csv", "NA")
    monkeypatch.chdir(tmp_path / folder)
    for file in (tmp_path / folder).glob("*.png"):
        file.rename(tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    data = load_image_data(DataArguments(dataset_name=folder), training=True)
    assert data.label_names == ["001", "NA", "None"] and data.evaluation_split == "test"
