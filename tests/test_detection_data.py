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
from hf_dropkey.detection.data import as_records, choose, load_detection_data, read_coco, read_rows
from hf_dropkey.images.sources import changed_data


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
    "field": (lambda content: content["images"][1].pop("width") and None, r"images\[1\] lacks \['width'\]"),
    "no record": (lambda content: content["annotations"].append([1]), r"annotations\[4\] lacks fields: \[1\]"),
    "no images": (lambda content: {**content, "images": []}, "has no images"),
    "no boxes": (lambda content: {**content, "annotations": []}, "has no usable annotation"),
    "shares": (shares, r"no number in any bbox is above 1, for example \[0.1, 0.2, 0.5, 0.5\].*in pixels, multiply"),
    "image twice": (lambda c: c["images"].append(c["images"][0]), r"images' id must be unique, .*: '5'"),
    "category twice": (lambda c: c["categories"][0].update(id=3), r"categories' id must be unique, .*: '3'"),
    "name twice": (lambda c: c["categories"][0].update(name="cat"), r"categories' name must be unique, .*: 'cat'"),
    "annotation twice": (lambda c: c["annotations"][0].update(id=2), r"annotations' id must be unique, .*: '2'"),
    "negative id": (
        lambda c: c["images"][0].update(id=-5),
        r"the id -5 in images is neither a whole number from 0 on",
    ),
    "no id": (
        lambda c: c["categories"][0].update(id=None),
        r"the id None in categories is neither a whole number from 0 on",
    ),
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
    with pytest.raises(FileNotFoundError, match=r"image folder .* is a file; check --train_images"):
        read_coco(files / "boxes.json", files / "images")
    with pytest.raises(FileNotFoundError, match=r"annotation file .* is a folder; check --train_annotations"):
        read_coco(files / "images", files / "images")
    with pytest.raises(FileNotFoundError, match=r"none of its \d+ images is there, such as .*; give the folder"):
        read_coco(files, files / "boxes.json")
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


def validation(folder: Path, change: Any) -> Any:
    """The data with a second file for evaluation."""
    content = document()
    content = change(content) or content
    (folder / "other.json").write_text(json.dumps(content))
    arguments = DetectionDataArguments(
        train_images=str(folder / "images"),
        train_annotations=str(folder / "boxes.json"),
        validation_images=str(folder / "images"),
        validation_annotations=str(folder / "other.json"),
    )
    return load_detection_data(arguments, training=True, evaluation=True)


def test_crowd_regions_are_counted_apart_from_the_boxes_that_are_used(files, caplog):
    split = load(files).train
    assert split.box_counts() == (3, 1)
    assert "3 boxes are used; 1 annotations have iscrowd 1" in caplog.text


@pytest.mark.parametrize("crowd", [1, True, "1", 1.0])
def test_crowd_regions_alone_are_an_error_that_names_the_cause(files, crowd):
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["iscrowd"] = crowd

    with pytest.raises(ValueError, match=r"all 4 annotations have iscrowd 1, .*set iscrowd to 0 in the file"):
        load(changed(files, change))


def test_the_case_of_a_mask_exporter(shared_cases):
    folder = shared_cases / "small" / "K39"
    arguments = DetectionDataArguments(train_images=str(folder), train_annotations=str(folder / "ann.json"))
    with pytest.raises(ValueError, match=r"all 8 annotations have iscrowd 1"):
        load_detection_data(arguments, training=True, evaluation=False)


def test_chosen_images_with_crowd_regions_alone_are_named(files):
    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [content["annotations"][0], {**content["annotations"][3], "image_id": 6}]

    found = load(changed(files, change), max_train_samples=3).train
    assert found.box_counts() == (1, 1)
    chosen = next(size for size in (1, 2) if 5 not in {one["id"] for one in sample(files, size)})
    with pytest.raises(ValueError, match=r"have no boxes"):
        load(files, max_train_samples=chosen)


def sample(folder: Path, size: int) -> list[dict[str, Any]]:
    """The images that a limit chooses."""
    split = read_coco(folder / "images", folder / "boxes.json")
    return choose(split, size).images


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(files, encoding):
    (files / "boxes.json").write_text(json.dumps(document()), encoding=encoding)
    assert len(load(files).train) == 3


def test_json_that_is_nested_too_deeply_is_named(files):
    (files / "boxes.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"boxes.json is not JSON"):
        load(files)


def test_ids_as_text_are_numbers_where_they_are_that(files):
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = str(image["id"])
        for annotation in content["annotations"]:
            annotation.update(image_id=float(annotation["image_id"]), category_id=str(annotation["category_id"]))

    expected = load(files).train
    found = load(changed(files, change)).train
    assert (found.images, found.boxes, found.categories) == (expected.images, expected.boxes, expected.categories)


def test_other_ids_of_text_are_numbered_by_place_and_splits_agree_on_them(files, caplog):
    ids = {9: "canis", 3: "felis"}

    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = f"img_{image['id']}"
        for category in content["categories"]:
            category["id"] = ids[category["id"]]
        for one in content["annotations"]:
            one.update(image_id=f"img_{one['image_id']}", category_id=ids[one["category_id"]])

    def only_cats(content: dict[str, Any]) -> None:
        change(content)
        content["categories"] = content["categories"][1:]
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] == "felis"]

    with caplog.at_level(logging.INFO):
        data = validation(changed(files, change), only_cats)
    assert "the ids of its images are text, such as 'img_5'; they are numbered by place" in caplog.text
    assert [image["id"] for image in data.train.images] == [1, 2, 3]
    names = dict(zip(data.category_ids, data.label_names, strict=True))
    assert {names[box["category_id"]] for box in data.evaluation.boxes[1]} == {"cat"}


def test_annotations_without_a_box_are_named_or_left_out(files):
    changed(files, lambda content: content["annotations"][1].pop("bbox") and None)
    with pytest.raises(
        ValueError, match=r"\(no box 1\): annotation 2 of image 5: it has no bbox.*--skip_bad_annotations"
    ):
        load(files)
    assert load(files, skip_bad_annotations=True).train.box_counts() == (2, 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("area", "big", r"\(no area 1\).*area 'big' is not a number"),
        ("iscrowd", "no", r"iscrowd 'no' is not a number"),
        ("image_id", None, r"annotation 1 of image None: there is no image with this id"),
        ("category_id", [3], r"category_id \[3\] is not among the categories"),
        ("category_id", "cat", r"category_id 'cat' is not among the categories"),
        ("bbox", [10**400, 0, 1, 1], r"is not four finite numbers"),
    ],
)
def test_fields_that_are_no_numbers_are_named(files, key, value, message):
    changed(files, lambda content: content["annotations"][0].update({key: value}))
    with pytest.raises(ValueError, match=message):
        load(files)


def test_validation_may_have_some_of_the_categories(files):
    def only_dogs(content: dict[str, Any]) -> None:
        content["categories"] = content["categories"][:1]
        content["annotations"] = content["annotations"][1:3]

    data = validation(files, only_dogs)
    assert data.label_names == ["cat", "dog"] and data.evaluation.box_counts() == (2, 0)
    # and some more, if no box has them
    more = validation(files, lambda content: content["categories"].append({"id": 1, "name": "emu"}))
    assert more.label_names == ["cat", "dog"]


def test_a_turn_by_exif_that_the_annotations_do_not_know_is_named(files):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(files / "images" / "5.png", exif=exif)
    with pytest.raises(
        ValueError,
        match=r"stored as \(40, 30\) pixels .* as annotated, and its EXIF orientation 6 turns it to \(30, 40\)",
    ):
        load(files)


@pytest.mark.parametrize("name", ["../boxes.json", "/etc/passwd", "a/../../other.png"])
def test_a_file_outside_the_image_folder_is_refused(files, name):
    changed(files, lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match=r"1 of 3 images have a file_name outside the image folder"):
        load(files, check_images=False, skip_bad_images=True)


@pytest.mark.parametrize("name", [5, None, ""])
def test_a_file_name_that_is_none_is_named(files, name):
    changed(files, lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(ValueError, match=r"image 5 has the file_name .*; give the name of its file"):
        load(files)


def test_a_file_name_may_be_absolute_inside_the_folder(files):
    changed(files, lambda content: content["images"][0].update(file_name=str(files / "images" / "5.png")))
    assert load(files).train.open(0).size == (40, 30)


def test_transparent_images_are_told(files, caplog):
    Image.new("RGBA", (40, 30)).save(files / "images" / "5.png")
    load(files)
    assert "1 of 3 images of" in caplog.text and "have transparent pixels" in caplog.text


def test_a_fingerprint_tells_what_changed(files):
    before = load(files).fingerprint()["train"]
    assert before["rows"] == 3 and changed_data(before, load(files).fingerprint()["train"]) == []
    changed(files, lambda content: content["annotations"][0].update(bbox=[4, 6, 10, 11]))
    assert changed_data(before, load(files).fingerprint()["train"]) == ["other labels"]


def test_lists_of_different_lengths_are_named():
    with pytest.raises(ValueError, match=r"lists of different lengths in `objects`, \{'bbox': 1, 'category': 2\}"):
        as_records({"bbox": [[1, 2, 3, 4]], "category": [0, 1]})


def test_sizes_with_a_fraction_of_nothing_or_as_text_are_read(files):
    expected = load(files).train.images
    changed(files, lambda content: [image.update(width=40.0, height="30") for image in content["images"]] and None)
    assert load(files).train.images == expected
