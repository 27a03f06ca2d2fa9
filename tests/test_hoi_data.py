"""Images with interactions from files, rows and scenes: what comes out, and every kind of bad input with its message."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from hf_dropkey.hoi.arguments import HoiDataArguments
from hf_dropkey.hoi.data import HoiData, load_hoi_data, model_labels, read_allowed, read_rows
from hf_dropkey.hoi.names import COCO_OBJECTS, HICO_VERBS, VCOCO_ROLE_VERBS, VCOCO_VERBS, plain_name


PERSON, BALL, DOG = 1, 37, 18


def record(name: str, pairs: list[tuple[int, int, int]] | None = None) -> dict[str, Any]:
    """One image with a person, a ball and a dog."""
    chosen = [(0, 1, 25), (0, 1, 5), (0, -1, 4)] if pairs is None else pairs
    return {
        "file_name": name,
        "annotations": [
            {"bbox": [2, 3, 20, 30], "category_id": PERSON},
            {"bbox": [22, 20, 30, 28], "category_id": BALL},
            {"bbox": [30, 10, 39, 30], "category_id": DOG},
        ],
        "hoi_annotation": [
            {"subject_id": person, "object_id": thing, "category_id": verb} for person, thing, verb in chosen
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 32), (number * 60, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write(folder: Path, records: Any, name: str = "train.json") -> str:
    (folder / name).write_text(json.dumps(records))
    return str(folder / name)


def arguments(folder: Path, file: str, **more: Any) -> HoiDataArguments:
    given = {"train_images": str(folder / "images"), "train_annotations": file, "verb_base": 0, **more}
    return HoiDataArguments(**given)


def load(folder: Path, records: Any, **more: Any) -> HoiData:
    return load_hoi_data(arguments(folder, write(folder, records), **more), training=True, evaluation=False)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_hoias_form(folder: Path) -> None:
    data = load(folder, [record("0.png"), record("1.png", [])])
    assert data.train is not None
    one = data.train.annotations[0]
    assert one.boxes[0].tolist() == [2, 3, 20, 30]
    assert [data.objects[label] for label in one.labels] == ["person", "sports ball", "dog"]
    assert {(data.verbs[verb], int(thing)) for _, thing, verb in one.pairs} == {
        ("look_obj", 1),
        ("walk", -1),
        ("kick_obj", 1),
    }
    assert data.verbs == list(VCOCO_VERBS)
    assert data.missing_object
    assert model_labels(data)[80] == "missing object"
    assert data.person_label == 0
    # images without pairs stay, to train on "no pair"
    assert [data.train.count(row) for row in range(2)] == [3, 0]
    assert data.train.open(1).size == (40, 32)


def test_the_verb_base_shifts_the_verbs(folder: Path) -> None:
    data = load(folder, [record("0.png", [(0, 1, 1), (0, 2, 117)])], verb_base=1)
    assert data.train is not None
    assert [data.verbs[verb] for verb in data.train.annotations[0].pairs[:, 2]] == ["adjust", "zip"]
    assert data.verbs == list(HICO_VERBS)
    assert not data.missing_object


def test_names_of_ones_own(folder: Path) -> None:
    names = write(folder, {"verbs": ["pet", "ride"], "objects": {"7": "Person", "9": "horse"}}, "names.json")
    one = record("0.png", [(0, 1, 2)])
    one["annotations"] = [
        {"bbox": [2, 3, 20, 30], "category_id": 7},
        {"bbox": [22, 20, 30, 28], "category_id": 9},
    ]
    data = load(folder, [one], verb_base=1, names_file=names)
    assert (data.objects, data.verbs) == (["Person", "horse"], ["pet", "ride"])
    assert data.train is not None
    assert data.train.annotations[0].pairs.tolist() == [[0, 1, 1]]


def test_zhangs_form(folder: Path) -> None:
    document = {
        "classes": ["hold obj", "kick obj"],
        "objects": ["background", "person", "ball"],
        "images": ["0.png"],
        "annotations": [
            {
                "file_name": "0.png",
                "boxes_h": [[2, 3, 20, 30], [2, 3, 20, 30]],
                "boxes_o": [[22, 20, 30, 28], [22, 20, 30, 28]],
                "actions": [0, 1],
                "objects": [2, 2],
            }
        ],
    }
    data = load(folder, document, verb_base=None)
    assert data.train is not None
    one = data.train.annotations[0]
    assert len(one.boxes) == 2
    assert one.pairs.tolist() == [[0, 1, 0], [0, 1, 1]]
    assert [data.objects[label] for label in one.labels] == ["person", "ball"]


def rows(**more: Any) -> dict[str, Any]:
    return {
        "image": [Image.new("RGB", (40, 32))],
        "objects": [{"bbox": [[2, 3, 18, 27], [22, 20, 8, 8]], "category": [0, 1]}],
        "interactions": [{"person": [0, 0], "object": [1, -1], "verb": [0, 1]}],
        **more,
    }


FEATURES = Features(
    {
        "image": datasets.Image(),
        "objects": {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["person", "ball"]))},
        "interactions": {
            "person": List(Value("int64")),
            "object": List(Value("int64")),
            "verb": List(ClassLabel(names=["kick", "walk"])),
        },
    }
)


def test_rows_of_a_data_set() -> None:
    split = read_rows(Dataset.from_dict(rows(), features=FEATURES), "made", skip=False)
    assert (split.objects, split.verbs) == (["person", "ball"], ["kick", "walk"])
    # boxes are [x, y, width, height] there
    assert split.annotations[0].boxes.tolist() == [[2, 3, 20, 30], [22, 20, 30, 28]]
    assert split.annotations[0].pairs.tolist() == [[0, -1, 1], [0, 1, 0]]
    assert split.open(0).size == (40, 32)


def test_rows_with_text_for_names() -> None:
    given = rows(
        objects=[{"bbox": [[2, 3, 18, 27], [22, 20, 8, 8]], "category": ["person", "ball"]}],
        interactions=[{"person": [0], "object": [1], "verb": ["kick"]}],
    )
    split = read_rows(Dataset.from_dict(given), "made", skip=False)
    assert (split.objects, split.verbs) == (["ball", "person"], ["kick"])
    assert split.annotations[0].pairs.tolist() == [[0, 1, 0]]


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for name in ("train", "test"):
        Dataset.from_dict(rows(), features=FEATURES).to_parquet(tmp_path / f"{name}.parquet")
    given = HoiDataArguments(dataset_name=str(tmp_path))
    data = load_hoi_data(given, training=True, evaluation=True)
    assert data.train is not None
    assert data.evaluation is not None
    assert data.evaluation.open(0).size == (40, 32)
    assert given.name == tmp_path.name


def test_scenes_need_no_file() -> None:
    given = HoiDataArguments(dataset="scenes", train_scenes=5, validation_scenes=3, scene_size=64)
    data = load_hoi_data(given, training=True, evaluation=True)
    assert data.train is not None
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (5, 3)
    assert data.train.open(0).size == (64, 64)
    assert given.name == "generated scenes"


def test_the_real_images(shared_data: Path, tmp_path: Path) -> None:
    mini = shared_data / "hoi_vcoco_mini"
    if not mini.is_dir():
        pytest.skip("no hoi_vcoco_mini")
    # its verbs are numbered as F. Zhang's files do it, without the actions that have no object
    verbs = json.loads((mini / "instances_vcoco_test.json").read_text())["classes"]
    names_file = write(tmp_path, {"verbs": verbs}, "names.json")
    qpic, zhang = (
        load_hoi_data(
            HoiDataArguments(
                **{f"{role}_images": str(mini / "images") for role in ("train", "validation")},
                train_annotations=str(mini / names[0]),
                names_file=names_file,
                validation_annotations=str(mini / names[1]),
                verb_base=0,
            ),
            training=True,
            evaluation=True,
        )
        for names in (
            ("trainval_qpic_style.json", "test_qpic_style.json"),
            ("instances_vcoco_trainval.json", "instances_vcoco_test.json"),
        )
    )
    names: list[set[tuple[str, str]]] = []
    for data in (qpic, zhang):
        splits = [data.train, data.evaluation]
        assert [split and len(split) for split in splits] == [5, 18]
        classes = {
            (plain_name(data.verbs[verb]), plain_name(data.objects[split.annotations[row].labels[thing]]))
            for split in splits
            if split is not None
            for row in range(len(split))
            for _, thing, verb in split.annotations[row].pairs
        }
        # 38 (object, verb) classes of 17 roles, as the data's own notes count
        assert len(classes) == 38
        assert len({verb for verb, _ in classes}) == 17
        names.append(classes)
        assert sum(split.count(row) for split in splits if split for row in range(len(split))) == 62
    assert names[0] == names[1]
    assert {plain_name(verb) for verb in VCOCO_ROLE_VERBS} == {plain_name(verb) for verb in zhang.verbs}


def test_both_splits_get_the_same_numbers(folder: Path) -> None:
    train = write(folder, [record("0.png")])
    document = {
        "classes": ["kick obj", "pet obj"],
        "objects": ["background", "person", "sports ball"],
        "annotations": [
            {
                "file_name": "1.png",
                "boxes_h": [[2, 3, 20, 30]],
                "boxes_o": [[22, 20, 30, 28]],
                "actions": [1],
                "objects": [2],
            }
        ],
    }
    other = write(folder, document, "test.json")
    given = arguments(folder, train, validation_images=str(folder / "images"), validation_annotations=other)
    data = load_hoi_data(given, training=True, evaluation=True)
    assert data.verbs[-1] == "pet obj"
    assert data.evaluation is not None
    assert data.evaluation.annotations[0].pairs.tolist() == [[0, 1, 29]]
    assert data.objects[data.evaluation.annotations[0].labels[1]] == "sports ball"


def test_the_summary_counts_and_tells_what_was_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = record("1.png", [(0, 1, 25), (0, 7, 25), (1, 0, 25)])
    with caplog.at_level(logging.WARNING):
        data = load(folder, [record("0.png"), bad, record("2.png", [])], skip_bad_annotations=True)
    assert data.train is not None
    summary = data.train.summary()
    assert "3 images (1 without interactions), 3 pairs with 4 verbs" in summary
    assert "3 of 29 verbs and 1 of 80 object classes occur" in summary
    assert "left out: 1 index out of range, 1 no person" in summary
    assert "They are left out" in caplog.text


def test_a_choice_of_images_is_the_same_every_time(folder: Path) -> None:
    records = [record(f"{number}.png") for number in range(3)]
    first, second = (load(folder, records, max_train_samples=2).train for _ in range(2))
    assert first is not None
    assert second is not None
    assert [image["file_name"] for image in first.images] == [image["file_name"] for image in second.images]
    assert len(first) == 2


# --- bad input -------------------------------------------------------------------------------------------------------


def changed(change: Any) -> list[dict[str, Any]]:
    """A good file with one image changed."""
    one = copy.deepcopy(record("0.png"))
    change(one)
    return [record("1.png"), one]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["hoi_annotation"][0].update(object_id=5), "object_id 5 is not a place among 3 annotations"),
        (lambda one: one["hoi_annotation"][0].update(object_id=-2), "object_id -2 is not a place"),
        (lambda one: one["hoi_annotation"][0].update(subject_id=9), "subject_id 9 is not a place"),
        (lambda one: one["hoi_annotation"][0].update(subject_id=-1), "subject_id -1 is not a place"),
        (lambda one: one["hoi_annotation"][0].update(subject_id=2), "subject_id 2 is a dog, not a person"),
        (lambda one: one["hoi_annotation"][0].update(category_id="kick"), "the verb 'kick' is not one of 29 verbs"),
        (lambda one: one["annotations"][1].update(category_id=12), "category_id 12 is not among the categories"),
        (lambda one: one["annotations"][1].update(bbox=[1, 2, 3]), "is not four finite numbers"),
        (lambda one: one["annotations"][1].update(bbox=[22, 20, 8, 8]), "the corners .22, 20, 8, 8. leave no area"),
        (lambda one: one["annotations"][1].update(bbox=[22, 20, 90, 28]), "50 pixels out of the image of 40 x 32"),
        (lambda one: one["annotations"][1].update(bbox=[1e400, 0, 1e400, 1]), "four finite numbers"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(folder: Path, change: Any, message: str) -> None:
    records = changed(change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, records)
    assert "image 1 (0.png)" in str(caught.value)
    assert "--skip_bad_annotations" in str(caught.value)
    data = load(folder, records, skip_bad_annotations=True)
    assert data.train is not None
    assert data.train.count(0) == 3
    assert data.train.count(1) < 3
    assert data.train.left_out


def test_verbs_that_do_not_fit_the_base_are_refused(folder: Path) -> None:
    # V-COCO's verb 0 read as HICO-DET's, and HICO-DET's verb 117 read as V-COCO's
    for verb, base in ((0, 1), (117, 0)):
        with pytest.raises(ValueError, match="give another --verb_base") as caught:
            load(folder, [record("0.png", [(0, 1, verb), (0, 1, 5)])], verb_base=base)
        assert f"the verbs {verb} are outside" in str(caught.value)
    with pytest.raises(ValueError, match="--verb_base 1 for HICO-DET"):
        load(folder, [record("0.png")], verb_base=None)


def test_no_pair_left_to_train_on(folder: Path) -> None:
    with pytest.raises(ValueError, match="have no pairs"):
        load(folder, [record("0.png", []), record("1.png", [])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "neither a list of images in HOIA's form"),
        ("[{}]", "record 0 lacks .'file_name', 'annotations', 'hoi_annotation'."),
        ("[1, 2]", "record 0 lacks"),
        ("no json", "is not JSON"),
        ('{"classes": [], "objects": [], "annotations": [{"file_name": "0.png"}]}', "lacks .'boxes_h'"),
    ],
)
def test_files_of_another_form_are_refused(folder: Path, content: str, message: str) -> None:
    (folder / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_hoi_data(arguments(folder, str(folder / "train.json")), training=True, evaluation=False)


def test_missing_files(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="annotation file .* is not there"):
        load_hoi_data(arguments(folder, str(folder / "no.json")), training=True, evaluation=False)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(folder, [record("0.png"), record("9.png")])
    data = load(folder, [record("0.png"), {**record("9.png"), "width": 40, "height": 32}], skip_bad_images=True)
    assert data.train is not None
    assert len(data.train) == 1
    with pytest.raises(ValueError, match="no data for the train split"):
        load_hoi_data(HoiDataArguments(), training=True, evaluation=False)


def test_damaged_images_are_named(folder: Path) -> None:
    (folder / "images" / "1.png").write_bytes(b"")
    records = [record("0.png"), {**record("1.png"), "width": 40, "height": 32}]
    with pytest.raises(ValueError, match="1.png .empty file."):
        load(folder, records)
    data = load(folder, records, skip_bad_images=True)
    assert data.train is not None
    assert len(data.train) == 1


def test_a_size_that_is_not_the_images_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="annotated as .80, 64."):
        load(folder, [{**record("0.png"), "width": 80, "height": 64}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": None}, "no column 'objects'"),
        ({"interactions": [{"person": [0], "verb": [0]}]}, "it lacks .'object'."),
        ({"interactions": [{"person": [0], "object": [4], "verb": [0]}]}, "object_id 4 is not a place"),
        ({"interactions": [{"person": [1], "object": [0], "verb": [0]}]}, "is a .*, not a person"),
        ({"objects": [{"bbox": [[2, 3, 18, 27], [22, 20, 0, 8]], "category": ["person", "ball"]}]}, "leave no area"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, Any], message: str) -> None:
    given = rows(objects=[{"bbox": [[2, 3, 18, 27], [22, 20, 8, 8]], "category": ["person", "ball"]}])
    given |= change
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read_rows(Dataset.from_dict(given), "made", skip=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_images": "a"}, "--train_annotations is missing"),
        ({"dataset": "scenes", "dataset_name": "x"}, "several data sources"),
        ({"train_scenes": 0}, "train_scenes=0 is below 1"),
        ({"max_train_samples": -1}, "max_train_samples=-1 is below 1"),
        ({"scene_size": 8}, "scene_size=8 is below 32"),
    ],
)
def test_arguments_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HoiDataArguments(**given)


def test_names_are_compared_never_places(folder: Path) -> None:
    data = load(folder, [record("0.png")])
    objects, verbs = list(reversed(data.objects)), list(reversed(data.verbs))
    turned = data.renamed(objects, verbs, missing_object=True)
    assert data.train is not None
    assert turned.train is not None
    before, after = data.train.annotations[0], turned.train.annotations[0]
    assert [data.objects[label] for label in before.labels] == [objects[label] for label in after.labels]
    assert [data.verbs[verb] for verb in before.pairs[:, 2]] == [verbs[verb] for verb in after.pairs[:, 2]]
    assert turned.person_label == 79
    with pytest.raises(ValueError, match="1 verbs that the model does not know: kick_obj"):
        data.renamed(data.objects, [verb for verb in data.verbs if verb != "kick_obj"], missing_object=True)
    with pytest.raises(ValueError, match="object classes that the model does not know: dog"):
        data.renamed([name for name in data.objects if name != "dog"], data.verbs, missing_object=True)
    with pytest.raises(ValueError, match="no class for a missing object"):
        data.renamed(data.objects, data.verbs, missing_object=False)


def test_allowed_combinations(tmp_path: Path) -> None:
    assert read_allowed(None, 80, 117) is None
    file = tmp_path / "corre.npy"
    np.save(file, np.ones((117, 80)))
    matrix = read_allowed(str(file), 80, 117)
    assert matrix is not None
    assert matrix.shape == (117, 80)
    with pytest.raises(ValueError, match="a row for each of 29 verbs and a column for each of 80"):
        read_allowed(str(file), 80, 29)
    with pytest.raises(FileNotFoundError):
        read_allowed(str(tmp_path / "no.npy"), 80, 29)
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a .npy file"):
        read_allowed(str(file), 80, 117)


def test_the_lists_of_names() -> None:
    assert len(COCO_OBJECTS) == 80
    assert (COCO_OBJECTS[1], COCO_OBJECTS[90]) == ("person", "toothbrush")
    assert (len(HICO_VERBS), len(VCOCO_VERBS), len(VCOCO_ROLE_VERBS)) == (117, 29, 24)
    assert plain_name("Dining_Table") == plain_name("dining table")


def test_the_lists_of_names_are_those_of_the_data_sets(shared_data: Path) -> None:
    file = shared_data / "hoi_vcoco_mini" / "hico_det_lists.json"
    if not file.is_file():
        pytest.skip("no hoi_vcoco_mini")
    lists = json.loads(file.read_text())
    assert lists["verbs"] == list(HICO_VERBS)
    assert {plain_name(name) for name in lists["objects"]} == {plain_name(name) for name in COCO_OBJECTS.values()}
