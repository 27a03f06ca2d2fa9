"""Image folders: every file is used or reported, and contents that look like a mistake stop with the next step."""

import io
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import ImageData, load_image_data
from hf_dropkey.images.folders import (
    check_output_file,
    image_endings,
    images_among,
    local_class_folders,
    make_output_folder,
    output_names,
    read_class_folders,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image_of(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 6), "red").save(file, format=kind)
    return file.getvalue()


def tree(root: Path, *files: str) -> Path:
    """A folder with image files under these names."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_of())
    return root


TWO = tuple(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4))


def load(training: bool = True, **arguments: Any) -> ImageData:
    return load_image_data(DataArguments(**arguments), training=training)


def test_rows_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    # a blank sorts before the separator, as in the listing of a whole tree
    folder = tree(tmp_path, "a/1.png", "a/10.png", "a/2.PNG", "a b/3.png", "B/0.png")
    rows = read_class_folders(folder).rows()
    assert [os.path.relpath(path, folder) for path, _ in rows] == [
        "B/0.png",
        "a b/3.png",
        "a/1.png",
        "a/10.png",
        "a/2.PNG",
    ]
    assert [name for _, name in rows] == ["B", "a b", "a", "a", "a"]


@pytest.mark.parametrize("name", ["images [v2]", "im?ges", "*", "{a,b}", "__train__", "[!x]"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tree(tmp_path / name, *TWO)
    data = load(train_dir=str(folder), train_val_split=0.25)
    assert data.label_names == ["cat", "dog"] and len(data.train) + len(data.evaluation) == 8
    assert len(load(dataset_name=str(folder), train_val_split=0.25).train) == 6


def test_every_class_is_reported_with_its_counts_and_what_is_left_out(tmp_path: Path, caplog: Any) -> None:
    train, validation = tree(tmp_path / "t", *TWO), tree(tmp_path / "v", "cat/0.png")
    for name in ("cat/x.heic", "cat/plain", "dog/y.heic", "dog/.hidden.png", ".DS_Store"):
        (train / name).write_bytes(b"?")
    with caplog.at_level(logging.INFO):
        load(train_dir=str(train), validation_dir=str(validation))
    assert "class cat: 4 images to train on, 1 images to evaluate on" in caplog.text
    assert "class dog: 4 images to train on, 0 images to evaluate on" in caplog.text
    assert "1 classes have no image to evaluate on, so that the metrics say nothing of them: 'dog'" in caplog.text
    assert f"3 files in the train folder {train} are left out" in caplog.text
    assert ".heic 2, without ending 1" in caplog.text


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "WEBP", "QOI", "TIFF"])
def test_every_ending_that_pillow_reads_counts(tmp_path: Path, kind: str) -> None:
    endings = [ending for ending in image_endings() if Image.registered_extensions()[ending] == kind]
    assert endings
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for ending in endings:
            (tmp_path / name / f"one{ending.upper()}").write_bytes(image_of(kind))
    data = load(train_dir=str(tmp_path), validation_dir=str(tmp_path))
    assert len(data.train) == 2 * len(endings)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", "a/0.png", "b/0.png", "b/1.png")
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "cat").symlink_to(store / "a")
    (folder / "dog").symlink_to(store / "b")
    (folder / "cat" / "link.png").symlink_to(store / "b" / "1.png")
    (store / "a" / "again").symlink_to(folder / "cat")
    found = read_class_folders(folder)
    assert {name: len(files) for name, files in found.images.items()} == {"cat": 2, "dog": 2}
    assert found.deeper == {"cat": [], "dog": []}


def test_underscores_are_part_of_a_name_and_hidden_folders_are_not_classes(tmp_path: Path) -> None:
    folder = tree(
        tmp_path, "__background__/0.png", "cat/0.png", ".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png"
    )
    (tmp_path / "__MACOSX").mkdir()
    data = load(train_dir=str(folder), validation_dir=str(folder))
    assert data.label_names == ["__background__", "cat"] and len(data.train) == 2


STOPS = {
    "flat": (("a.png", "b.png"), {}, r"has 2 image files and no class folders: a.png, b.png; give each class"),
    "loose": ((*TWO, "x.png"), {}, r"has 1 image files beside its 2 class folders: x.png; .*table"),
    "nested": (
        ("cat/2023/0.png", "dog/2023/0.png"),
        {},
        r"2 images lie in folders inside .*'cat', 'dog', such as cat/2023",
    ),
    "nested in one": ((*TWO, "cat/more/9.png"), {}, r"1 images lie in folders inside the class folders 'cat'"),
    "parent": (("train/cat/0.png", "val/cat/0.png"), {}, r"holds the folders 'train', 'val', which look like splits"),
    "split among classes": ((*TWO, "val/cat/0.png"), {}, r"holds the folders 'val', which look like splits"),
    "splits without classes": (("train/0.png", "test/0.png"), {}, r"which look like splits rather than classes"),
    "one class": (
        ("cat/0.png", "cat/1.png"),
        {"validation_dir": "v"},
        r"all 2 images to train on are of one class, 'cat'",
    ),
    "only there": (
        TWO,
        {"validation_dir": "w"},
        r"1 classes without images to train on: 'dogs' \(there is 'dog' to train",
    ),
    "inside": ((*TWO, "dev/0.png"), {"validation_dir": "t/dev"}, r"one folder lies in the other"),
    "nothing": ((), {}, r"has no folders of images; give each class"),
}


@pytest.mark.parametrize(("files", "more", "message"), STOPS.values(), ids=STOPS)
def test_contents_that_look_like_a_mistake_stop(
    tmp_path: Path, files: Any, more: Any, message: str, monkeypatch: Any
) -> None:
    (tmp_path / "t").mkdir()
    tree(tmp_path / "t", *files)
    tree(tmp_path / "v", "cat/0.png")
    tree(tmp_path / "w", "cat/0.png", "dogs/0.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(train_dir="t", **more)


def test_a_class_folder_without_images_stops_with_what_it_holds(tmp_path: Path) -> None:
    folder = tree(tmp_path, *TWO)
    (folder / "owl").mkdir()
    (folder / "owl" / "a.heic").touch()
    (folder / "yak").mkdir()
    with pytest.raises(
        ValueError, match=r"2 class folders hold no image .*'owl' \(\.heic 1\), 'yak' \(nothing\); add"
    ):
        load(train_dir=str(folder))


def test_the_same_folder_twice_is_reported(tmp_path: Path, caplog: Any) -> None:
    folder = str(tree(tmp_path, *TWO))
    load(train_dir=folder, validation_dir=folder)
    assert "is also the training folder, so that its metrics do not measure" in caplog.text


def test_evaluation_alone_may_have_one_class(tmp_path: Path) -> None:
    assert load(training=False, validation_dir=str(tree(tmp_path, "cat/0.png"))).label_names == ["cat"]


def test_a_table_called_metadata_names_the_images_of_a_folder(tmp_path: Path) -> None:
    folder = tree(tmp_path / "a [b]", *(f"{number}.png" for number in range(8)))
    (folder / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{n}.png,{'NA' if n % 2 else '01'}\n" for n in range(8))
    )
    assert load(train_dir=str(folder), train_val_split=0.25).label_names == ["01", "NA"]
    other = tree(tmp_path / "v", "NA/0.png")
    with pytest.raises(
        ValueError, match=r"found the tables .*metadata.csv, but every folder must have exactly one table"
    ):
        load(train_dir=str(folder), validation_dir=str(other))


def test_a_data_set_by_name_is_walked_like_a_folder_where_it_is_one(tmp_path: Path) -> None:
    folder = tree(tmp_path / "data [1]", *(f"{split}/{name}" for split in ("train", "val-1") for name in TWO))
    found = local_class_folders(folder)
    assert found == {"train": folder / "train", "validation": folder / "val-1"}
    data = load(dataset_name=str(folder))
    assert (len(data.train), len(data.evaluation), data.evaluation_split) == (8, 8, "validation")
    (folder / "val-1" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"--dataset_name .*1 class folders hold no image .*'emu'"):
        load(dataset_name=str(folder))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert local_class_folders(folder) is None
    assert local_class_folders(tmp_path / "absent") is None


def test_tables_in_a_folder_with_brackets_are_found_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "set [v2]"
    folder.mkdir()
    rows = {"image": [{"bytes": image_of(), "path": None}] * 4, "label": ["a", "b"] * 2}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    data = load(dataset_name=str(folder))
    assert (len(data.train), len(data.evaluation), data.evaluation_split) == (4, 4, "test")
    with pytest.raises(ValueError, match=r"--dataset_config_name x cannot be used with a folder with brackets"):
        load(dataset_name=str(folder), dataset_config_name="x")


CASES = {
    "A1_brackets": ("images [v2]/train", "images [v2]/val", None),
    "A4_dunder_class": ("train", "train", None),
    "B2_nested_same_leaf": ("train", None, r"12 images lie in folders inside the class folders 'cat', 'dog'"),
    "B4_flat": ("train", None, r"has 8 image files and no class folders"),
    "C2_val_typo": ("train", "val", r"'dogs' \(there is 'dog' to train on\)"),
    "E2_avif_heic_jfif": ("train", "train", None),
    "H1_valone": ("val", None, r"all \d images to train on are of one class, 'cat'"),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_cases_that_failed_once(shared_cases: Path, name: str, case: Any, caplog: Any) -> None:
    root, (train, validation, message) = shared_cases / "small" / name, case
    arguments = {"train_dir": str(root / train), **({"validation_dir": str(root / validation)} if validation else {})}
    if message is not None:
        with pytest.raises(ValueError, match=message):
            load(**arguments)
        return
    data = load(**arguments)
    counted = {"A1_brackets": [6, 6], "A4_dunder_class": [6, 6], "E2_avif_heic_jfif": [7, 6, 5]}[name]
    assert [data.class_counts("train")[number] for number in range(len(counted))] == counted
    assert ("left out" in caplog.text) == (name == "E2_avif_heic_jfif")
    if name == "E2_avif_heic_jfif":
        assert ".heic 1, without ending 1" in caplog.text


def test_icons_on_a_transparent_ground_are_reported(shared_cases: Path, caplog: Any) -> None:
    root = shared_cases / "small" / "I1_icons"
    load(train_dir=str(root / "train"), validation_dir=str(root / "val"))
    assert "32 of 32 images in the train split have transparent pixels" in caplog.text
    assert "(black in 32); 32 of them become one plain colour" in caplog.text


def test_a_name_that_is_not_text_is_reported(tmp_path: Path) -> None:
    folder = tree(tmp_path, *TWO)
    name = os.fsencode(folder / "cat") + b"/\xff.png"
    try:
        Path(os.fsdecode(name)).write_bytes(image_of())
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    with pytest.raises(ValueError, match=r"'\\udcff.png' in .*cat is not valid UTF-8; rename the file or folder"):
        load(train_dir=str(folder))


def test_each_file_gets_a_name_of_its_own_for_results() -> None:
    files = [Path("one/a.jpg"), Path("one/b.jpg"), Path("two/a.jpg"), Path("two/a.png"), Path("two/a_2.png")]
    assert output_names(files) == ["a", "b", "a_3", "a_4", "a_2"]


def test_places_for_results_are_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="--out .*file/below cannot be a folder: .*file is a file"):
        make_output_folder(tmp_path / "file" / "below", "--out")
    with pytest.raises(IsADirectoryError, match="--output_file .* is a folder; name a file in it"):
        check_output_file(tmp_path, "--output_file")
    check_output_file(tmp_path / "new" / "found.json", "--output_file")
    assert (tmp_path / "new").is_dir()


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", "b.pdf"):
        (tmp_path / name).write_bytes(b"")
    assert images_among([str(tmp_path)]) == [tmp_path / "a.png"]
