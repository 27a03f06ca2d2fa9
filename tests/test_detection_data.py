"""Tests of reading boxes in COCO's format: what goes in comes out, and everything wrong is named."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dropkey.detection.arguments import DetectionDataArguments
from hf_dropkey.detection.data import load_detection_data, read_coco, read_rows


# the second category comes first: classes are numbered by category id
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}]


def document() -> dict[str, Any]:
    """Three images of 40 x 30 pixels: two boxes, one crowd beside one box, none."""
    return {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 30} for number in (5, 6, 7)],
        "categories": [dict(category) for category in CATEGORIES],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 3, "bbox": [4, 6, 10, 12], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 9, "bbox": [20.5, 3, 20, 9]},
            {"id": 3, "image_id": 6, "category_id": 9, "bbox": [0, 0, 40, 30]},
            {"id": 4, "image_id": 6, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        ],
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `images` and `boxes.json`."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in (5, 6, 7):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "boxes.json").write_text(json.dumps(document()))
    return tmp_path


def load(folder: Path, **more: Any) -> Any:
    files = {"train_images": str(folder / "images"), "train_annotations": str(folder / "boxes.json")}
    return load_detection_data(DetectionDataArguments(**files, **more), training=True, evaluation=False)


def changed(folder: Path, change: Any) -> Path:
    content = document()
    content = change(content) or content
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def test_files_are_read_as_they_are(files):
    data = load(files)
    assert data.label_names == ["cat", "dog"] and data.category_ids == [3, 9]
    assert data.class_numbers == {3: 0, 9: 1} and data.evaluation is None
    first, second = data.train.boxes[5]
    assert first == {"image_id": 5, "category_id": 3, "bbox": [4, 6, 10, 12], "area": 100, "iscrowd": 0}
    # half a pixel over the border is cut; the area is then that of the box
    assert second["bbox"] == [20.5, 3, 19.5, 9] and second["area"] == 19.5 * 9
    assert data.train.boxes[7] == [] and len(data.train) == 3
    assert data.train.open(0).size == (40, 30)


def test_real_annotations_are_read(shared_data):
    folder = shared_data / "detection_coco256"
    split = read_coco(folder / "images", folder / "instances_train.json")
    assert len(split) == 128 and sum(map(len, split.boxes.values())) == 929 and len(split.categories) == 80
    assert sum(not boxes for boxes in split.boxes.values()) == 2
    assert split.open(0).size == (split.images[0]["width"], split.images[0]["height"])


BOX_PROBLEMS = {
    "empty box": ([4, 6, 0, 12], r"annotation 1 of image 5: bbox \[4, 6, 0, 12\] has width 0 and height 12"),
    "negative": ([4, 6, 10, -3], r"annotation 1 of image 5: .* height -3, both must be above 0"),
    "outside": ([4, 6, 10, 40], r"bbox \[4, 6, 10, 40\] reaches 16 pixels out of the image of 40 x 30 .*corners"),
    "left of it": ([-7, 6, 10, 10], r"bbox \[-7, 6, 10, 10\] reaches 7 pixels out"),
    "three numbers": ([4, 6, 10], r"bbox \[4, 6, 10\] is not four finite numbers"),
    "text": (["4", 6, 10, 2], r"is not four finite numbers"),
    "not finite": ([4, 6, float("nan"), 2], r"bbox \[4, 6, nan, 2\] is not four finite numbers"),
}


@pytest.mark.parametrize(("box", "message"), BOX_PROBLEMS.values(), ids=BOX_PROBLEMS)
def test_a_box_that_cannot_be_used_is_named_or_left_out(files, caplog, box, message):
    changed(files, lambda content: content["annotations"][0].update(bbox=box))
    with pytest.raises(
        ValueError, match=r"1 of 4 annotations cannot be used.*" + message + ".*--skip_bad_annotations"
    ):
        load(files)
    with caplog.at_level(logging.WARNING):
        data = load(files, skip_bad_annotations=True)
    assert len(data.train.boxes[5]) == 1 and "1 of 4 annotations" in caplog.text and "left out" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "category_id",
            4,
            r"unknown category 1\).*annotation 1 of image 5: category_id 4 is not among the categories",
        ),
        ("image_id", 8, r"unknown image 1\).*annotation 1 of image 8: there is no image with this id"),
    ],
)
def test_unknown_ids_are_named_or_left_out(files, key, value, message):
    changed(files, lambda content: content["annotations"][0].update({key: value}))
    with pytest.raises(ValueError, match=message):
        load(files)
    assert sum(map(len, load(files, skip_bad_annotations=True).train.boxes.values())) == 3


def shares(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.5, 0.5]


STRUCTURE = {
    "list": (lambda content: [1], r"boxes.json has list; COCO's format is an object with the lists"),
    "part": (lambda content: content.pop("images") and None, r"has \['annotations', 'categories'\]; COCO's format"),
    "field": (lambda content: content["annotations"][1].pop("bbox") and None, r"annotations\[1\] lacks \['bbox'\]"),
    "no images": (lambda content: {**content, "images": []}, "has no images"),
    "no boxes": (lambda content: {**content, "annotations": []}, "has no usable annotation"),
    "shares": (shares, r"no number in any bbox is above 1, for example \[0.1, 0.2, 0.5, 0.5\].*in pixels, multiply"),
    "image twice": (lambda c: c["images"].append(c["images"][0]), r"images' id must be unique, .*: '5'"),
    "category twice": (lambda c: c["categories"][0].update(id=3), r"categories' id must be unique, .*: '3'"),
    "name twice": (lambda c: c["categories"][0].update(name="cat"), r"categories' name must be unique, .*: 'cat'"),
    "annotation twice": (lambda c: c["annotations"][0].update(id=2), r"annotations' id must be unique, .*: '2'"),
    "text id": (lambda c: c["images"][0].update(id="five"), r"the id 'five' in images is no whole number"),
    "text category": (lambda c: c["annotations"][0].update(category_id="cat"), r"category_id 'cat' of an annotation"),
    "no size": (lambda c: c["images"][0].update(width=0), r"image 5 is 0 wide and 30 high"),
}


@pytest.mark.parametrize(("change", "message"), STRUCTURE.values(), ids=STRUCTURE)
def test_a_document_that_is_not_cocos_is_named(files, change, message):
    with pytest.raises(ValueError, match=message):
        load(changed(files, change), skip_bad_annotations=True)


@pytest.mark.parametrize("content", [b'{"images": [', b"\xff\xfe\x00"], ids=["cut off", "no text"])
def test_a_file_that_is_not_json_is_named(files, content):
    (files / "boxes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"boxes.json is not JSON"):
        load(files)


def test_missing_files_and_folders_are_named(files):
    with pytest.raises(FileNotFoundError, match=r"image folder .*absent is not there"):
        read_coco(files / "absent", files / "boxes.json")
    with pytest.raises(FileNotFoundError, match=r"annotation file .*absent.json is not there"):
        read_coco(files / "images", files / "absent.json")


def test_images_that_are_missing_damaged_or_of_another_size_are_named_or_left_out(files, caplog):
    (files / "images" / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images .*image 7: .*7.png \(no such file\)"):
        load(files, check_images=False)
    content = (files / "images" / "6.png").read_bytes()
    (files / "images" / "6.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"2 of 3 images .*image 6: .*6.png .*image 7: .*--skip_bad_images"):
        load(files)
    data = load(files, skip_bad_images=True)
    assert [image["id"] for image in data.train.images] == [5] and "2 of 3 images" in caplog.text
    Image.new("RGB", (30, 40)).save(files / "images" / "5.png")
    with pytest.raises(ValueError, match=r"5.png is \(30, 40\) pixels \(width, height\) and annotated as \(40, 30\)"):
        load(files, skip_bad_images=True)


def test_an_image_that_was_not_checked_is_named_where_it_is_read(files):
    (files / "images" / "6.png").write_bytes((files / "images" / "6.png").read_bytes()[:100])
    split = load(files, check_images=False).train
    assert split.open(0).size == (40, 30)
    with pytest.raises(ValueError, match=r"6\.png \(.*\)\. Repair or remove it; --check_images True"):
        split.open(1)


def test_an_image_is_turned_as_its_file_says(files):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40)).save(files / "images" / "5.png", exif=exif)
    assert load(files).train.open(0).size == (40, 30)


def test_a_choice_without_boxes_is_named(files):
    chosen = [image["id"] for image in load(files, max_train_samples=2).train.images]
    assert chosen == [image["id"] for image in load(files, max_train_samples=2).train.images]
    others = [one for one in document()["annotations"] if one["image_id"] not in chosen]
    changed(files, lambda content: {**content, "annotations": others})
    with pytest.raises(ValueError, match=r"the 2 chosen images of .* have no boxes; choose more or other images"):
        load(files, max_train_samples=2)


def test_splits_must_agree_in_their_categories(files):
    content = document()
    content["categories"][0]["name"] = "wolf"
    (files / "other.json").write_text(json.dumps(content))
    arguments = DetectionDataArguments(
        train_images=str(files / "images"),
        train_annotations=str(files / "boxes.json"),
        validation_images=str(files / "images"),
        validation_annotations=str(files / "other.json"),
    )
    with pytest.raises(ValueError, match=r"different categories: 9 is 'dog' there and 'wolf' here"):
        load_detection_data(arguments, training=True, evaluation=True)
    with pytest.raises(ValueError, match=r"no data for the validation split; give --validation_images"):
        load_detection_data(
            DetectionDataArguments(train_images=str(files / "images"), train_annotations=str(files / "boxes.json")),
            training=True,
            evaluation=True,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": "a"}, "--train_annotations is missing beside a; give both"),
        ({"validation_annotations": "a"}, "--validation_images is missing beside a; give both"),
        ({"train_images": "a", "train_annotations": "b", "dataset_name": "c"}, "several data sources at once"),
        ({"dataset_name": "c", "max_eval_samples": 0}, "max_eval_samples=0 is below 1"),
    ],
)
def test_arguments_that_contradict_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetectionDataArguments(**arguments)


def test_a_model_that_knows_the_classes_keeps_its_numbers(files):
    data = load(files).with_label_names(["N/A", "dog", "N/A", "cat"])
    assert data.category_ids == [None, 9, None, 3] and data.class_numbers == {9: 1, 3: 3}
    with pytest.raises(ValueError, match=r"1 classes that the model does not know: dog; the model knows cat, cow"):
        load(files).with_label_names(["cat", "cow"])


def hub_rows(*, nested: bool, category: Any) -> datasets.Dataset:
    """Two rows, with `objects` as one dictionary of lists, or as a list of dictionaries."""
    box = datasets.List(datasets.Value("float32"), length=4)
    one = {"bbox": box, "category": category}
    objects = datasets.List(one) if nested else {name: datasets.List(kind) for name, kind in one.items()}
    values = [0, 1] if isinstance(category, datasets.ClassLabel) else ["dog", "cat"]
    boxes = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    found: Any = {"bbox": boxes, "category": values}
    if nested:
        found = [{"bbox": box, "category": value} for box, value in zip(boxes, values, strict=True)]
    empty: Any = [] if nested else {"bbox": [], "category": []}
    rows = {"image_id": [31, 32], "image": [Image.new("RGB", (40, 30))] * 2, "objects": [found, empty]}
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": objects})
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("category", [datasets.ClassLabel(names=["dog", "cat"]), datasets.Value("string")], ids=str)
def test_rows_of_the_hub_are_read_in_either_layout(nested, category):
    split = read_rows(hub_rows(nested=nested, category=category), "rows")
    assert [image["id"] for image in split.images] == [31, 32] and split.boxes[32] == []
    names = {one["id"]: one["name"] for one in split.categories}
    assert [(names[one["category_id"]], one["bbox"]) for one in split.boxes[31]] == [
        ("dog", [1, 2, 3, 4]),
        ("cat", [5, 6, 7, 8]),
    ]
    assert split.open(1).size == (40, 30) == (split.images[1]["width"], split.images[1]["height"])


def test_rows_of_another_layout_are_named():
    rows = hub_rows(nested=False, category=datasets.Value("string"))
    with pytest.raises(ValueError, match=r"rows has no column 'objects', only \['image_id', 'image'\]"):
        read_rows(rows.remove_columns("objects"), "rows")
    other = datasets.Dataset.from_dict({"image": rows["image"][:], "objects": [{"box": [1]}, {"box": [2]}]})
    with pytest.raises(ValueError, match=r"`objects` of rows has \['box'\]; needed are 'bbox' and one of"):
        read_rows(other, "rows")


def test_hub_splits_are_found_by_name(tmp_path):
    rows = hub_rows(nested=False, category=datasets.ClassLabel(names=["dog", "cat"]))
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    found = load_detection_data(DetectionDataArguments(dataset_name=str(tmp_path)), training=True, evaluation=True)
    assert len(found.train) == len(found.evaluation) == 2 and found.label_names == ["dog", "cat"]
    for wrong, message in (("absent", "no split 'absent' among"), ("train", "is for training and evaluation")):
        arguments = DetectionDataArguments(dataset_name=str(tmp_path), eval_split_name=wrong)
        with pytest.raises(ValueError, match=message):
            load_detection_data(arguments, training=True, evaluation=True)
