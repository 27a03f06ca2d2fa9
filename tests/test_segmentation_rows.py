"""Images and masks in the rows of data sets: the same as in folders, from the Hub, a folder or parquet files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image

from hf_dropkey.segmentation.arguments import SegmentationDataArguments
from hf_dropkey.segmentation.data import load_segmentation_data


NAMES = ["ground", "cat", "dog"]
SIZE = (8, 6)


def png(values: Any) -> bytes:
    content = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values, np.uint8))
    image.save(content, "PNG")
    return content.getvalue()


def masks(count: int = 4) -> list[Any]:
    return [np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) % (row % 2 + 2) for row in range(count)]


def rows(found: Sequence[Any], image: str = "image", mask: str = "label", *, raw: bool = False) -> datasets.Dataset:
    """Rows with images and masks, as bytes in a binary column (`raw`) or as the library has images."""
    images = [png(np.full((*SIZE[::-1], 3), 40 * row, np.uint8)) for row in range(len(found))]
    contents = [None if one is None else png(one) for one in found]
    if raw:
        return datasets.Dataset.from_dict({image: images, mask: contents, "more": list(range(len(found)))})
    cells = {
        image: [{"bytes": one, "path": None} for one in images],
        mask: [None if one is None else {"bytes": one, "path": f"{row}.png"} for row, one in enumerate(contents)],
    }
    features = datasets.Features({image: datasets.Image(), mask: datasets.Image()})
    return datasets.Dataset.from_dict(cells, features=features)


def save(folder: Path, found: datasets.Dataset, name: str = "train") -> Path:
    """A parquet file, beside the names of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names.json").write_text(json.dumps(NAMES))
    found.to_parquet(folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def load(training: bool = True, evaluation: bool = False, **given: Any) -> Any:
    return load_segmentation_data(SegmentationDataArguments(**given), training=training, evaluation=evaluation)


def from_file(file: Path, **more: Any) -> Any:
    return load(train_file=str(file), class_names=str(file.parent / "names.json"), **more)


@pytest.mark.parametrize(("image", "mask"), [("image", "label"), ("pixel_values", "annotation"), ("image", "mask")])
@pytest.mark.parametrize("raw", [False, True], ids=["images", "bytes"])
def test_the_rows_of_parquet_files(image: str, mask: str, raw: bool, tmp_path: Path) -> None:
    data = from_file(save(tmp_path, rows(masks(), image, mask, raw=raw)))
    assert data.label_names == NAMES and len(data.train) == 4 and data.evaluation is None
    for row, expected in enumerate(masks()):
        assert (data.train.mask(row) == expected).all()
        assert np.asarray(data.train.open(row))[0, 0, 0] == 40 * row and data.train.open(row).size == SIZE


def test_columns_of_other_names_are_given(tmp_path: Path) -> None:
    file = save(tmp_path, rows(masks(), "photo", "classes"))
    with pytest.raises(
        ValueError, match=r"has none of the columns image, pixel_values, only photo, classes; pass --im"
    ):
        from_file(file)
    with pytest.raises(ValueError, match="--image_column_name picture is not a column of .*which has photo, classes"):
        from_file(file, image_column_name="picture")
    with pytest.raises(ValueError, match="'photo' of .* is for images and for masks; name two columns"):
        from_file(file, image_column_name="photo", label_column_name="photo")
    assert len(from_file(file, image_column_name="photo", label_column_name="classes").train) == 4


def test_a_column_of_something_else(tmp_path: Path) -> None:
    file = save(tmp_path, datasets.Dataset.from_dict({"image": [png(masks()[0])], "label": [3]}))
    with pytest.raises(
        ValueError, match=r"the column 'label' of .* holds .*int64.*, not images .*--label_column_name"
    ):
        from_file(file)


def test_several_files_and_both_ends(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path, rows(masks(3)), f"train-{number}")
    save(tmp_path, rows(masks(2)), "test")
    names = str(tmp_path / "names.json")
    files = {"train_file": str(tmp_path / "train-*.parquet"), "validation_file": str(tmp_path / "test.parquet")}
    data = load(evaluation=True, class_names=names, **files)
    assert (len(data.train), len(data.evaluation)) == (6, 2)
    assert [record["file_name"] for record in data.evaluation.images] == ["row 0", "row 1"]
    with pytest.raises(FileNotFoundError, match="--train_file .*gone.parquet matches no file"):
        load(class_names=names, train_file=str(tmp_path / "gone.parquet"))
    with pytest.raises(ValueError, match="--train_file takes parquet files, and matches .*names.json"):
        load(class_names=names, train_file=names)
    with pytest.raises(ValueError, match="no data for the validation split; give --validation_file"):
        load(evaluation=True, class_names=names, train_file=files["train_file"])


def test_every_mask_is_checked_and_named_by_its_row(tmp_path: Path) -> None:
    bad = [*masks(1), None, np.zeros((6, 9)), np.full((6, 8), 7), Image.new("RGB", SIZE)]
    file = save(tmp_path, rows(bad))
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the texts below
        from_file(file)
    told = str(raised.value)
    for text in (
        "4 of 5 masks of train.parquet (train) cannot be used",
        "the mask of row 1 (no mask)",
        "the mask of row 2 (mask of (9, 6) pixels",
        "the mask of row 3 (has the values 7; the 3 classes are 0 to 2",
    ):
        assert text in told
    assert len(from_file(file, skip_bad_images=True).train) == 1
    damaged = datasets.Dataset.from_dict({"image": [png(masks()[0])] * 2, "label": [png(masks()[0]), b"text"]})
    with pytest.raises(ValueError, match=r"the mask of row 1 \(not a mask"):
        from_file(save(tmp_path, damaged))


def test_labels_that_begin_at_one(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2, 3], [255, 3, 2, 1]])
    found = datasets.Dataset.from_dict({"image": [png(np.zeros((2, 4, 3), np.uint8))], "label": [png(values)]})
    file = save(tmp_path, found)
    data = from_file(file, do_reduce_labels=True)
    # as Transformers' example script reduces them
    assert data.train.mask(0).tolist() == [[255, 0, 1, 2], [255, 2, 1, 0]]
    with pytest.raises(ValueError, match="has the values 3; the 3 classes are 0 to 2"):
        from_file(file)
    with pytest.raises(ValueError, match="--ignore_index 3 is the number of 'dog' in masks with --do_reduce_labels"):
        from_file(file, do_reduce_labels=True, ignore_index=3)


def test_other_masks_make_another_fingerprint(tmp_path: Path) -> None:
    file = save(tmp_path, rows(masks()))
    before = from_file(file).fingerprint()
    assert before == from_file(file).fingerprint() and before["train"]["rows"] == 4
    after = from_file(save(tmp_path / "other", rows([*masks(3), np.zeros(SIZE[::-1])]))).fingerprint()
    changed = [part for part in before["train"] if before["train"][part] != after["train"][part]]
    assert "labels" in changed and "names" not in changed


def data_set(folder: Path, *, names: bool = True) -> Path:
    """A data set in a folder, as one on the Hub, with its class names."""
    for split, count in (("train", 4), ("validation", 2)):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows(masks(count)).to_parquet(folder / "data" / f"{split}-00000.parquet")
    if names:
        (folder / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def test_a_data_set_in_a_folder_with_its_class_names(tmp_path: Path) -> None:
    folder = str(data_set(tmp_path / "shapes"))
    data = load(evaluation=True, dataset_name=folder)
    assert data.label_names == NAMES and (len(data.train), len(data.evaluation)) == (4, 2)
    assert data.train.name == "shapes (train)" and SegmentationDataArguments(dataset_name=folder).name == "shapes"
    with pytest.raises(ValueError, match="no split 'dev' among .*; choose with --eval_split_name"):
        load(dataset_name=folder, eval_split_name="dev")
    with pytest.raises(ValueError, match="split 'train' is for training and evaluation"):
        load(dataset_name=folder, eval_split_name="train")
    bare = str(data_set(tmp_path / "bare", names=False))
    with pytest.raises(ValueError, match=r"bare has no id2label.json with the names of its classes; .*--class_names"):
        load(dataset_name=bare)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    assert len(load(dataset_name=bare, class_names=str(tmp_path / "names.json")).train) == 4


HUB_CODE = """
    import sys
    from pathlib import Path
    from huggingface_hub import HfApi
    from hf_dropkey.segmentation.arguments import SegmentationDataArguments
    from hf_dropkey.segmentation.data import load_segmentation_data

    api = HfApi()
    for name in ("shapes", "bare"):
        api.create_repo(f"tester/{name}", repo_type="dataset")
        api.upload_folder(repo_id=f"tester/{name}", folder_path=name, repo_type="dataset")
    given = SegmentationDataArguments(dataset_name="tester/shapes")
    data = load_segmentation_data(given, training=True, evaluation=True)
    print(data.label_names, len(data.train), len(data.evaluation), data.train.name, data.train.mask(1).max())
    try:
        bare = SegmentationDataArguments(dataset_name="tester/bare")
        load_segmentation_data(bare, training=True, evaluation=False)
    except ValueError as error:
        print(error)
"""


def test_a_data_set_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    data_set(tmp_path / "shapes")
    data_set(tmp_path / "bare", names=False)
    done = hub.run(HUB_CODE, tmp_path, HF_DATASETS_OFFLINE="0")
    lines = done.stdout.splitlines()
    assert lines[-2] == "['ground', 'cat', 'dog'] 4 2 tester/shapes (train) 2"
    assert "tester/bare has no id2label.json" in lines[-1] and "--class_names" in lines[-1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dataset_name": "a/b", "dataset": "scenes"}, "--dataset scenes and --dataset_name a/b are several sources"),
        ({"train_file": "a.parquet"}, "--class_names is missing"),
        ({"dataset": "scenes", "do_reduce_labels": True}, "--do_reduce_labels is for data of your own"),
        ({"train_file": "a", "train_images": "b", "train_masks": "c"}, "are several sources of data; keep one"),
    ],
)
def test_sources_that_do_not_go_together(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SegmentationDataArguments(**given)
