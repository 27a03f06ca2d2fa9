"""Bad image files are found, named and counted, and nothing else is."""

import io
import logging
import random
import re

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from hf_dropkey.images.checks import NAMES_SHOWN, drop_bad_images, image_problem, name_some, transparency


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


def test_a_reader_that_is_not_implemented_is_a_bad_image():
    content = bytearray(file_of("DDS", "RGB"))
    # flags of the pixel format that no reader knows
    content[80:84] = (0x20000000).to_bytes(4, "little")
    assert "(Unknown pixel format flags 536870912)" in str(image_problem({"bytes": bytes(content), "path": None}, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["AVIF", "BLP", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "PCX", "PNG", "TGA", "TIFF"]
)
def test_a_damaged_file_of_any_kind_is_reported_and_never_a_crash(kind):
    chance = random.Random(kind)
    whole = file_of(kind, "P" if kind == "BLP" else "RGB")
    problems = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 4])):
            content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
        content = content[: chance.randrange(1, len(content) + 1)] if chance.random() < 0.3 else content
        problems += image_problem({"bytes": bytes(content), "path": None}, 0) is not None
    assert problems


def icon(mode: str, ground: int, shape: int = 0) -> Image.Image:
    """A square of the grey `shape` on a transparent ground that hides the grey `ground`."""
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[..., :3] = ground
    pixels[8:20, 8:20] = (shape, shape, shape, 255)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_seen_for_what_the_file_stores_there(mode):
    assert transparency(icon(mode, 0)) and transparency(icon(mode, 0)).blank
    assert transparency(icon(mode, 0)).behind == "black"
    assert transparency(icon(mode, 255)).behind == "white" and not transparency(icon(mode, 255)).blank
    assert transparency(icon(mode, 90, shape=200)).behind == "other"
    assert transparency(Image.new(mode, (4, 4))) is not None
    assert transparency(Image.new(mode, (4, 4), "white")) is None and transparency(Image.new("RGB", (4, 4))) is None


def test_a_transparent_palette_colour_counts_too():
    file = io.BytesIO()
    icon("RGBA", 0, shape=200).save(file, format="GIF")
    assert transparency(Image.open(file)) is not None


def test_transparent_images_are_counted_with_what_will_be_seen_and_the_next_step(caplog):
    contents = [GOOD[0]]
    for ground in (0, 0, 255):
        file = io.BytesIO()
        icon("RGBA", ground).save(file, format="PNG")
        contents.append(file.getvalue())
    split = split_of(*contents)
    with caplog.at_level(logging.WARNING):
        assert drop_bad_images(split, "train") is split
    assert "3 of 4 images in the train split have transparent pixels" in caplog.text
    assert "(black in 2, white in 1); 2 of them become one plain colour" in caplog.text
    assert "alpha_composite(Image.new('RGBA', image.size, 'white')" in caplog.text
