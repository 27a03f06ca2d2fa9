"""Bad image files are found, named and counted, and nothing else is."""

import io
import logging
import re

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from hf_dropkey.images.checks import NAMES_SHOWN, drop_bad_images, name_some


def file_of(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=kind)
    return file.getvalue()


def split_of(*contents: bytes | None) -> Dataset:
    cells = [None if content is None else {"bytes": content, "path": None} for content in contents]
    features = Features({"image": datasets.Image(), "row": Value("int64")})
    return Dataset.from_dict({"image": cells, "row": list(range(10, 10 + len(cells)))}, features=features)


GOOD = [
    file_of("PNG"),
    file_of("JPEG"),
    file_of("PNG", "L"),
    file_of("PNG", "RGBA"),
    file_of("PNG", "1"),
    file_of("GIF", "P"),
]
BAD = {
    "(empty file)": b"",
    "(not an image file)": b"not an image, but long enough to be mistaken for one",
    "(no image)": None,
    "(mode I;16, more than 8 bits per channel; convert it to 8 bits)": file_of("PNG", "I;16"),
    "(image file is truncated)": file_of("PNG")[:400],
    "(image file is truncated (98 bytes not processed))": file_of("JPEG")[:-200],
}


def test_good_images_stay_as_they_are():
    split = split_of(*GOOD)
    assert drop_bad_images(split, "train") is split


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_image_is_named_with_its_reason(reason):
    with pytest.raises(
        ValueError, match=re.escape(f"1 of 7 images in the train split cannot be used: row 16 {reason}.")
    ):
        drop_bad_images(split_of(*GOOD, BAD[reason]), "train")


def test_skipping_leaves_the_good_images_and_says_so(caplog):
    split = split_of(GOOD[0], *BAD.values(), GOOD[1])
    with caplog.at_level(logging.WARNING):
        kept = drop_bad_images(split, "train", skip=True)
    assert kept["row"][:] == [10, 17]
    assert "6 of 8 images in the train split cannot be used: row 11 (empty file)" in caplog.text


def test_skipping_everything_is_an_error():
    with pytest.raises(ValueError, match="2 of 2 images"):
        drop_bad_images(split_of(b"", None), "train", skip=True)


def test_files_are_named_by_path(tmp_path):
    (tmp_path / "empty.png").touch()
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("empty.png", "gone.png")]
    features = Features({"image": datasets.Image(), "row": Value("int64")})
    split = Dataset.from_dict({"image": cells, "row": [0, 1]}, features=features)
    with pytest.raises(ValueError, match="2 of 2") as caught:
        drop_bad_images(split, "test")
    assert f"{tmp_path / 'empty.png'} (empty file)" in str(caught.value)
    assert f"{tmp_path / 'gone.png'} (" in str(caught.value)


def test_long_lists_are_cut_and_counted():
    names = [f"n{number}" for number in range(NAMES_SHOWN + 5)]
    assert name_some(names).endswith(f"n{NAMES_SHOWN - 1} and 5 more")
    assert name_some(names[:2]) == "n0, n1"
