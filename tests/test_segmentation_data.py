"""Folders of images and masks: what is read, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_dropkey.segmentation.arguments import SegmentationDataArguments, SegmentationModelArguments
from hf_dropkey.segmentation.data import load_segmentation_data, read_class_names, read_mask
from hf_dropkey.segmentation.scenes import SCENE_CLASSES


def write(folder: Path, name: str, mask: Any = None, *, size: tuple[int, int] = (8, 6)) -> None:
    """An image and its mask; by default of three classes."""
    (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(folder / "images" / f"{name}.jpg")
    values = np.arange(size[0] * size[1]).reshape(size[::-1]) % 3 if mask is None else mask
    image = values if isinstance(values, Image.Image) else Image.fromarray(values.astype(np.uint8))
    image.save(folder / "masks" / f"{name}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "a")
    write(tmp_path, "deeper/b", np.full((6, 8), 255) - 254 * np.eye(6, 8))
    (tmp_path / "names.json").write_text(json.dumps(["ground", "cat", "dog"]))
    return tmp_path


def arguments(folder: Path, **more: Any) -> SegmentationDataArguments:
    return SegmentationDataArguments(
        train_images=str(folder / "images"),
        train_masks=str(folder / "masks"),
        class_names=str(folder / "names.json"),
        **more,
    )


def load(folder: Path, **more: Any) -> Any:
    return load_segmentation_data(arguments(folder, **more), training=True, evaluation=False)


def test_images_at_any_depth_with_their_masks(folder: Path) -> None:
    data = load(folder)
    assert data.label_names == ["ground", "cat", "dog"] and data.evaluation is None
    assert [record["file_name"] for record in data.train.images] == ["a.jpg", "deeper/b.jpg"]
    assert data.train.mask(0).tolist()[0] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert set(np.unique(data.train.mask(1))) == {1, 255} and data.train.open(1).size == (8, 6)
    assert load(folder, max_train_samples=1).train.images[0]["file_name"] in ("a.jpg", "deeper/b.jpg")


def test_other_masks_make_another_fingerprint(folder: Path) -> None:
    before = load(folder).fingerprint()
    assert before == load(folder).fingerprint()
    write(folder, "a", np.zeros((6, 8)))
    assert before != load(folder).fingerprint()


def test_a_model_may_number_the_classes_in_its_own_order(folder: Path) -> None:
    data = load(folder).with_label_names(["dog", "bird", "ground", "cat"])
    assert data.numbers == [2, 3, 0]
    with pytest.raises(ValueError, match="dog"):
        load(folder).with_label_names(["ground", "cat"])


def test_palette_and_deep_masks_hold_numbers_too(folder: Path) -> None:
    values = np.full((6, 8), 2, np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    for mask in (palette, Image.fromarray(values.astype(np.int32)), Image.fromarray(values.astype(np.uint16))):
        write(folder, "a", mask)
        assert (load(folder).train.mask(0) == 2).all()


def test_a_mask_of_another_size(folder: Path) -> None:
    write(folder, "c", np.zeros((6, 9)))
    with pytest.raises(ValueError, match=r"1 of 3 masks.*c\.png \(mask of \(9, 6\) pixels.*its image has \(8, 6\)"):
        load(folder)


def test_class_numbers_outside_the_names(folder: Path) -> None:
    write(folder, "c", np.full((6, 8), 7))
    with pytest.raises(
        ValueError, match=r"c\.png \(has the values 7; the 3 classes are 0 to 2, and --ignore_index is 255"
    ):
        load(folder)


def test_a_missing_mask(folder: Path) -> None:
    (folder / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images.*have no mask in.*a\.jpg must be a\.png.*--skip_bad_images"):
        load(folder)
    assert len(load(folder, skip_bad_images=True).train) == 1


def test_masks_in_colour(folder: Path) -> None:
    write(folder, "c", Image.new("RGB", (8, 6), (200, 0, 0)))
    with pytest.raises(ValueError, match="a colour image of mode RGB; a mask has one channel"):
        load(folder)
    assert len(load(folder, skip_bad_images=True).train) == 2


def test_what_is_no_mask_at_all(folder: Path) -> None:
    (folder / "masks" / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"a\.png \(not a mask"):
        load(folder)


def test_masks_without_any_class(folder: Path) -> None:
    for name in ("a", "deeper/b"):
        write(folder, name, np.full((6, 8), 255))
    with pytest.raises(ValueError, match="no pixel of .* has a class, all are 255"):
        load(folder)


def test_two_images_of_one_name(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "images" / "a.png")
    with pytest.raises(ValueError, match="several images of one name with other endings: a;"):
        load(folder)


def test_folders_that_are_not_there(folder: Path) -> None:
    given = arguments(folder)
    given.train_masks = str(folder / "gone")
    with pytest.raises(FileNotFoundError, match="--train_masks .*gone is not there"):
        load_segmentation_data(given, training=True, evaluation=False)
    with pytest.raises(ValueError, match="no data for the validation split; give --validation_images"):
        load_segmentation_data(arguments(folder), training=True, evaluation=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('["a", "b", "a"]', "repeats 'a'"),
        ('["a"]', "names 1 class"),
        ('{"0": "a", "2": "b"}', "name 0 to 1 without a gap"),
        ('"a"', "must hold a list of names"),
        ("[1, 2]", "must hold a list of names"),
        ("[", "is not JSON"),
        (json.dumps([f"c{number}" for number in range(9)]), "--ignore_index 8 is the number of 'c8'"),
    ],
)
def test_files_of_names_that_cannot_be_used(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_class_names(tmp_path / "names.json", 8)
    with pytest.raises(FileNotFoundError, match="--class_names .*gone.json is not there"):
        read_class_names(tmp_path / "gone.json", 255)


def test_numbered_names(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"1": "b", "0": "a"}')
    assert read_class_names(tmp_path / "names.json", 255) == ["a", "b"]


def test_generated_scenes() -> None:
    given = SegmentationDataArguments(dataset="scenes", train_scenes=4, validation_scenes=3, scene_size=32)
    data = load_segmentation_data(given, training=True, evaluation=True)
    assert data.label_names == list(SCENE_CLASSES)
    assert len(data.train or ()) == 4 and len(data.evaluation or ()) == 3
    clash = SegmentationDataArguments(dataset="scenes", ignore_index=2)
    with pytest.raises(ValueError, match="--ignore_index 2 is the number of 'square'"):
        load_segmentation_data(clash, training=True, evaluation=False)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "there is no data; give --train_images and --train_masks"),
        ({"train_images": "a"}, "--train_masks is missing beside a"),
        ({"train_images": "a", "train_masks": "b"}, "--class_names is missing"),
        ({"dataset": "scenes", "train_images": "a", "train_masks": "b"}, "several sources of data"),
        ({"dataset": "scenes", "ignore_index": 300}, "--ignore_index 300 is outside 0 to 255"),
        ({"dataset": "scenes", "train_scenes": 0}, "--train_scenes 0 is below 1"),
        ({"dataset": "scenes", "scene_size": 8}, "--scene_size 8 is below 32"),
    ],
)
def test_arguments_of_the_data(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SegmentationDataArguments(**given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "none of them: give one of --model_name_or_path"),
        ({"backbone": "vit", "model_name_or_path": "x"}, "--model_name_or_path x, --backbone vit: give one"),
        ({"backbone": "swin"}, "--backbone swin is not one of vit, t2t_vit, volo, ceit"),
        ({"model_name_or_path": "x", "hidden_size": 8}, "fixes the shape of the model; leave out --hidden_size 8"),
        (
            {"backbone": "vit", "image_size": 50},
            "--image_size 50 is not a multiple of the patches' 8 pixels; choose 48 or 56",
        ),
        ({"backbone": "volo", "image_size": 8}, "not a multiple of the patches' 16 pixels; choose 16"),
        ({"backbone": "volo", "patch_size": 8}, "the patches of volo are 16 pixels"),
        ({"backbone": "vit", "num_hidden_layers": 2}, "--num_hidden_layers 2 is below 3"),
    ],
)
def test_arguments_of_the_model(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SegmentationModelArguments(**given)


def test_a_mask_is_read_from_bytes_as_from_files(folder: Path) -> None:
    content = (folder / "masks" / "a.png").read_bytes()
    cells = [{"bytes": content, "path": None}, {"bytes": None, "path": str(folder / "masks" / "a.png")}]
    one, other = (read_mask(cell, (8, 6), 3, 255) for cell in cells)
    assert np.array_equal(one, other)
