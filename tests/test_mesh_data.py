"""People, generated or read: exact annotations, the same rows each time, and clear errors for rows that cannot be right."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_dropkey.mesh.arguments import MeshDataArguments
from hf_dropkey.mesh.bodies import JOINT_ROWS, procedural_body
from hf_dropkey.mesh.data import (
    JOINT_LAYOUTS,
    SWAPPED_JOINTS,
    GeneratedPeople,
    RowPeople,
    background_files,
    joints_of,
    mean_vertices,
)
from hf_dropkey.mesh.job import HELD_OUT_SEED, load_mesh_data
from hf_dropkey.mesh.renderer import project_points


def picture(width: int = 60, height: int = 80, **save: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG", **save)
    return {"bytes": buffer.getvalue(), "path": None}


def people(count: int = 3) -> GeneratedPeople:
    return GeneratedPeople(procedural_body(), count, 0, 48)


def row(**changes: Any) -> dict[str, Any]:
    person = people().person(0)
    assert person.vertices is not None and person.joints_3d is not None and person.joints_2d is not None
    full = {
        "image": picture(),
        "box": list(person.box),
        "vertices": person.vertices.astype(float).tolist(),
        "joints_3d": person.joints_3d.tolist(),
        "joints_2d": person.joints_2d.tolist(),
    }
    return {**full, **changes}


def read(*rows: dict[str, Any], skip: bool = False) -> RowPeople:
    columns = {name: [one.get(name) for one in rows] for name in {name for one in rows for name in one}}
    split = Dataset.from_dict(columns)
    if "image" in columns:
        split = split.cast_column("image", datasets.Image(decode=False))
    return RowPeople(split, "mine", procedural_body(), skip=skip)


# --- generated people ------------------------------------------------------------------------------------------------


def test_a_row_is_the_same_each_time_and_no_other_row() -> None:
    first, second = people(), people()
    for number in range(2):
        assert np.array_equal(np.asarray(first.image(number)), np.asarray(second.image(number)))
        one, other = first.person(number), second.person(number)
        assert np.array_equal(one.vertices, other.vertices) and one.box == other.box
    assert not np.array_equal(first.person(0).vertices, first.person(1).vertices)
    unseen = GeneratedPeople(procedural_body(), 1, 1, 48)
    assert not np.array_equal(first.person(0).vertices, unseen.person(0).vertices)
    # drawn in another order, or never kept
    loose = GeneratedPeople(procedural_body(), 3, 0, 48, keep=False)
    assert np.array_equal(np.asarray(loose.image(1)), np.asarray(first.image(1)))
    assert np.allclose(first.vertices([1])[0], first.person(1).vertices, atol=1e-6)


def test_annotations_are_exact() -> None:
    split, body = people(), procedural_body()
    person = split.person(2)
    assert person.vertices is not None and person.joints_3d is not None and person.joints_2d is not None
    assert np.allclose(person.joints_3d[:, :3], (body.joint_regressor @ person.vertices)[list(JOINT_ROWS)], atol=1e-5)
    # one camera draws joints and mesh: scale and shift from the joints, the box from the mesh
    flat = person.joints_3d[:, :2]
    scale = np.ptp(person.joints_2d[:, 1]) / np.ptp(flat[:, 1])
    shift = person.joints_2d[0, :2] - scale * flat[0]
    assert np.allclose(scale * flat + shift, person.joints_2d[:, :2], atol=1e-6)
    pixels = project_points(person.vertices, np.array([scale, *shift]))
    assert np.allclose((*pixels.min(0), *np.ptp(pixels, axis=0)), person.box, atol=1e-3)
    assert min(person.box[:2]) >= 0 and person.box[0] + person.box[2] <= 48 and person.box[1] + person.box[3] <= 48
    assert split.image(2).size == (48, 48)


def test_people_stand_out_from_backgrounds(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), (0, 255, 0)).save(tmp_path / "green.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = background_files(str(tmp_path))
    assert [file.name for file in files] == ["green.png"]
    split = GeneratedPeople(procedural_body(), 1, 0, 48, files)
    green = (np.abs(np.asarray(split.image(0)).astype(int) - [0, 255, 0]).max(-1) < 20).mean()
    assert 0.6 < green < 0.95
    with pytest.raises(FileNotFoundError, match="absent is not there; give a folder"):
        background_files(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in this folder"):
        background_files(str(tmp_path / "empty"))


def test_held_out_people_are_no_training_people() -> None:
    arguments = MeshDataArguments(max_train_samples=2, max_eval_samples=2)
    data = load_mesh_data(arguments, procedural_body(), 32, training=True, evaluation=True)
    assert data.train is not None and data.evaluation is not None
    assert len(data.train) == len(data.evaluation) == 2
    assert not np.array_equal(data.train.person(0).vertices, data.evaluation.person(0).vertices)
    # no seed that can be given
    assert HELD_OUT_SEED not in range(2**32)


def test_the_mean_of_rows() -> None:
    split, body = people(3), procedural_body()
    mean = mean_vertices(split, body.joint_regressor)
    assert mean is not None and np.allclose((body.joint_regressor @ mean)[0], 0, atol=1e-9)
    rows = read(row(), row(vertices=None))
    one = mean_vertices(rows, body.joint_regressor)
    vertices = rows.person(0).vertices
    assert one is not None and vertices is not None
    assert np.allclose(one, vertices - (body.joint_regressor @ vertices)[0], atol=1e-6)
    assert mean_vertices(read(row(vertices=None)), body.joint_regressor) is None


# --- rows ------------------------------------------------------------------------------------------------------------


def test_what_a_row_says_comes_back() -> None:
    split = read(row(), row(vertices=None, joints_3d=None))
    expected = people().person(0)
    full, flat = split.person(0), split.person(1)
    assert full.vertices is not None and full.joints_3d is not None and flat.joints_2d is not None
    assert np.allclose(full.vertices, expected.vertices, atol=1e-6)
    assert np.allclose(full.joints_3d, expected.joints_3d)
    assert flat.vertices is None and flat.joints_3d is None and np.allclose(flat.joints_2d, expected.joints_2d)
    assert split.image(0).size == (60, 80) and split.image(0).mode == "RGB"


def test_missing_joints_follow_from_the_mesh_and_the_camera() -> None:
    expected = people().person(0)
    assert expected.joints_3d is not None and expected.joints_2d is not None
    camera = [20.0, 30.0, 40.0]
    person = read(row(joints_3d=None, joints_2d=None, camera=camera)).person(0)
    assert person.joints_3d is not None and person.joints_2d is not None
    assert np.allclose(person.joints_3d, expected.joints_3d, atol=1e-5)
    assert np.allclose(person.joints_2d[:, :2], 20 * expected.joints_3d[:, :2] + [30, 40], atol=1e-4)
    # without a camera nothing is known about the image plane
    assert read(row(joints_2d=None)).person(0).joints_2d is None


def test_a_pose_of_the_body_is_a_mesh() -> None:
    body = procedural_body()
    pose, shape = body.sample(1, np.random.default_rng(3))
    given = row(vertices=None, joints_3d=None, pose=pose[0].tolist(), shape=shape[0].tolist())
    assert np.allclose(read(given).person(0).vertices, body(pose, shape)[0][0], atol=1e-5)
    with pytest.raises(ValueError, match="a pose needs a shape"):
        read({**given, "shape": None})


@pytest.mark.parametrize("layout", [14, 17, 24])
def test_layouts_of_joints(layout: int) -> None:
    values = np.stack([np.arange(layout), 10 * np.arange(layout), np.ones(layout)], 1)
    found = joints_of(values.tolist(), 3, 0, "joints_2d")
    assert found is not None and found.shape == (14, 3)
    for place, source in enumerate(JOINT_LAYOUTS[layout]):
        assert found[place].tolist() == ([source, 10 * source, 1] if source >= 0 else [0, 0, 0])


def test_coco_has_left_and_right_where_metro_has_them() -> None:
    coco = [
        "nose",
        "eye",
        "eye",
        "ear",
        "ear",
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
        "left_ankle",
        "right_ankle",
    ]
    names = [coco[place] for place in JOINT_LAYOUTS[17] if place >= 0]
    assert names[:3] == ["right_ankle", "right_knee", "right_hip"] and names[9:12] == [
        "left_shoulder", "left_elbow", "left_wrist",
    ]  # fmt: skip
    for here, there in enumerate(SWAPPED_JOINTS[:12]):
        assert names[there] == names[here].replace("right", "?").replace("left", "right").replace("?", "left")


def test_images_that_lie_on_their_side_are_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    # 80 x 60 in the file, shown 60 x 80: this box is inside only there
    split = read(row(image=picture(80, 60, exif=exif), box=[10, 65, 20, 12]))
    assert split.image(0).size == (60, 80)


def test_joints_outside_the_image_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    joints = np.array(row()["joints_2d"])
    joints[3, 0], joints[5, 1] = -4.0, 1000.0
    split = read(row(joints_2d=joints.tolist()))
    found = split.person(0).joints_2d
    assert split.outside == 2 and "2 joints of mine lie outside" in caplog.text
    assert found is not None and found[3].tolist() == [0, 0, 0] and found[5, 2] == 0 and found[0, 2] == 1


def scaled(factor: float) -> list[Any]:
    return (np.array(row()["vertices"]) * factor).tolist()


def nan_vertices() -> list[Any]:
    vertices = np.array(row()["vertices"])
    vertices[7, 1] = np.nan
    return vertices.tolist()


BAD_ROWS = {
    "no area": ({"box": [5.0, 5.0, 0.0, 10.0]}, "1 with a bad box.*has no area"),
    "corners": ({"box": [30.0, 30.0, -5.0, 10.0]}, "1 with a bad box.*corners"),
    "outside": ({"box": [100.0, 5.0, 10.0, 10.0]}, "1 with a bad box.*outside the image of 60 x 80"),
    "no person": ({"box": None}, "1 without a person"),
    "nan": ({"vertices": nan_vertices}, "1 with NaN vertices"),
    "no image": ({"image": {"bytes": None, "path": None}}, "1 without an image"),
    "bad image": ({"image": {"bytes": b"none", "path": None}}, "1 with a bad image"),
    "ragged": ({"vertices": lambda: [*row()["vertices"][:-1], [0.0]]}, "1 with bad vertices.*not an array of numbers"),
    "short camera": ({"joints_2d": None, "camera": [1.0, 2.0]}, "1 with a bad camera.*scale above 0, got"),
    "no scale": ({"joints_2d": None, "camera": [0.0, 2.0, 2.0]}, "1 with a bad camera"),
    "nan confidence": (
        {"joints_2d": lambda: [[*row()["joints_2d"][0][:2], float("nan")], *row()["joints_2d"][1:]]},
        "1 with NaN joints_2d",
    ),
    "no target": ({"vertices": None, "joints_3d": None, "joints_2d": None}, "1 without a target"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_errors_or_counted_skips(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, message = BAD_ROWS[kind]
    bad = row(**{name: value() if callable(value) else value for name, value in changes.items()})
    with pytest.raises(ValueError, match=rf"1 of 3 rows of mine cannot be used \({message}.*--skip_bad_rows"):
        read(row(), bad, row())
    split = read(row(), bad, row(), skip=True)
    assert len(split) == 2 and "They are left out" in caplog.text
    assert split.image(1).size == (60, 80)
    # nothing left is an error in any case
    with pytest.raises(ValueError, match="1 of 1 rows"):
        read(bad, skip=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"vertices": scaled(1000)}, "looks like millimetres. Divide by 1000"),
        (lambda: {"vertices": scaled(100)}, "looks like centimetres. Divide by 100"),
        (lambda: {"vertices": row()["vertices"][:-1]}, "Choose the body of the data with --body"),
        (lambda: {"joints_3d": [joint[:3] for joint in row()["joints_3d"]]}, "the confidence is missing"),
        (lambda: {"joints_2d": [joint[:2] for joint in row()["joints_2d"]]}, r"\[x, y, confidence\]"),
        (lambda: {"joints_3d": row()["joints_3d"][:12]}, r"\[J, 4\] with J of 14, 17, 24"),
        (lambda: {"joints_3d": [row()["joints_3d"][i] for i in SWAPPED_JOINTS]}, "left and right are swapped"),
        (lambda: {"vertices": None, "joints_3d": [[1000 * x, 1000 * y, 1000 * z, c]
                                                  for x, y, z, c in row()["joints_3d"]]}, "millimetres"),
        (lambda: {"vertices": None, "joints_3d": [[x, -y, -z, c] for x, y, z, c in row()["joints_3d"]]},
         "y seems to point up"),
        (lambda: {"vertices": (np.array(row()["vertices"]) * [-1, 1, 1]).tolist(), "joints_3d": None},
         "turned inside out: one axis is mirrored"),
        (lambda: {"vertices": None, "pose": [[0.0] * 3] * 5, "shape": [0.0] * 5}, r"pose of the shape \[5, 3\].*--body"),
        (lambda: {"vertices": None, "pose": [[0.0] * 3] * 17, "shape": [0.0] * 4}, r"a shape of \[4\].*--body"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_right_is_refused(changes: Any, message: str) -> None:
    # wrong for the whole data set, so nothing is skipped
    with pytest.raises(ValueError, match=message):
        read(row(**changes()), skip=True)


@pytest.mark.parametrize("missing", ["image", "box", "targets"])
def test_columns_that_every_row_needs(missing: str) -> None:
    given = row()
    for name in ("vertices", "joints_3d", "joints_2d") if missing == "targets" else (missing,):
        del given[name]
    with pytest.raises(ValueError, match="Every row needs `image`, `box`"):
        read(given)


def test_an_image_that_is_cut_off_is_found_before_training() -> None:
    whole = picture()["bytes"]
    with pytest.raises(ValueError, match=r"1 with a bad image.*Truncated.*leave them out with --skip_bad_rows"):
        read(row(image={"bytes": whole[: len(whole) // 2], "path": "cut.jpg"}))


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "people" / "train"
    folder.mkdir(parents=True)
    person = people().person(0)
    assert person.joints_2d is not None
    lines = []
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(picture()["bytes"])
        lines.append(
            json.dumps({"file_name": f"{number}.jpg", "box": person.box, "joints_2d": person.joints_2d.tolist()})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    arguments = MeshDataArguments(dataset_name=str(tmp_path / "people"), max_train_samples=1)
    data = load_mesh_data(arguments, procedural_body(), 32, training=True, evaluation=False)
    assert data.train is not None and len(data.train) == 1 and data.train.image(0).size == (60, 80)
    with pytest.raises(ValueError, match="has the splits train, none of validation, valid, test"):
        load_mesh_data(arguments, procedural_body(), 32, training=False, evaluation=True)


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    split = Dataset.from_list([row()]).cast_column("image", datasets.Image())
    split.to_parquet(tmp_path / "rows" / "test.parquet")
    arguments = MeshDataArguments(dataset_name=str(tmp_path / "rows"))
    data = load_mesh_data(arguments, procedural_body(), 32, training=False, evaluation=True)
    assert data.evaluation is not None and data.evaluation.person(0).vertices is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_train_samples": 0}, "--max_train_samples 0 is below 1"),
        ({"generated_seed": -1}, "below 0"),
        ({"dataset_name": "a", "backgrounds": "b"}, "--backgrounds is for generated people"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeshDataArguments(**given)
