"""The scripts of the page in the browser give the numbers and sentences of Python: pictures to the bit, answers, refusals."""

import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser_scripts import array, call, node, scripts
from PIL import Image
from small_demos import bad_files, noise
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from hf_dropkey.demo.answers import Answer, Settings
from hf_dropkey.demo.image_numbers import RESAMPLINGS, image_numbers
from hf_dropkey.demo.sentences import answer_sentence, votes
from hf_dropkey.hub.static_folder import PAGE, PAGE_FILES
from hf_dropkey.inference import MonteCarloMoments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripts(tmp_path_factory.mktemp("scripts"))


def picture(image: Image.Image) -> dict[str, Any]:
    values = np.asarray(image)
    channels = 1 if values.ndim == 2 else values.shape[2]
    return {"width": image.width, "height": image.height, "channels": channels, "values": values}


def decoded(image: Image.Image) -> dict[str, Any]:
    """As a browser decodes an image."""
    return {"width": image.width, "height": image.height, "data": np.asarray(image.convert("RGBA"))}


@pytest.mark.parametrize("name", sorted(file.name for file in PAGE.glob("*.js")))
def test_a_script_is_whole_and_asks_no_other_host(name: str, folder: Path) -> None:
    done = subprocess.run([node(), "--check", str(folder / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # the name of SVG's elements is not an address that anything asks
    text = (PAGE / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text and "innerHTML" not in text and "eval(" not in text


def test_the_page_is_these_files() -> None:
    assert {file.name for file in PAGE.iterdir()} == set(PAGE_FILES)
    for name in PAGE_FILES[1:]:
        used = any(f'"{prefix}{name}"' in (PAGE / other).read_text() for other in PAGE_FILES for prefix in ("", "./"))
        assert used, f"nothing uses {name}"


def test_pictures_are_resized_as_pillow_does_it_to_the_bit(folder: Path) -> None:
    sizes = [((97, 61), (32, 32)), ((8, 8), (12, 12)), ((33, 50), (33, 17)), ((50, 33), (20, 33)), ((5, 300), (40, 7))]
    cases: list[list[Any]] = []
    expected = []
    for resampling, name in RESAMPLINGS.items():
        for size, target in sizes:
            for mode in ("RGB", "L"):
                image = noise(*size, seed=len(cases)).convert(mode)
                # edges as sharp as they can be, at which some filters leave the range of grey levels
                image = image.point(lambda level: 255 * (level > 127)) if len(cases) % 3 else image
                cases.append([picture(image), *target, name])
                expected.append(np.asarray(image.resize(target, resampling)))
    assert len(cases) == 60
    for found, right, case in zip(call(folder, "resample.js", "resized", cases), expected, cases, strict=True):
        got = array(found["values"], np.uint8).reshape(right.shape)
        assert np.array_equal(got, right), (case[1:], int(np.abs(got.astype(int) - right).max()))


PROCESSORS = {
    "square": (ViTImageProcessorPil(size={"height": 24, "width": 20}), 3),
    "crop": (BitImageProcessorPil(size={"shortest_edge": 29}, crop_size={"height": 24, "width": 21}), 3),
    "larger crop": (BitImageProcessorPil(size={"shortest_edge": 17}, crop_size={"height": 24, "width": 40}), 3),
    "plain": (ViTImageProcessorPil(size={"height": 9, "width": 9}, do_normalize=False, resample=1), 3),
    "nothing but a crop": (ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=16), 3),
    "grey": (ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.3], image_std=[0.7]), 1),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_prepared_as_the_processor_does_it(name: str, folder: Path) -> None:
    processor, channels = PROCESSORS[name]
    numbers = image_numbers(processor, channels)
    images = [noise(101, 67), noise(21, 40, seed=1), noise(24, 24, seed=2), noise(300, 30, seed=3)]
    found = call(folder, "preparing.js", "prepared", [[decoded(image), numbers.settings()] for image in images])
    for one, image in zip(found, images, strict=True):
        given = image if channels == 3 else image.convert("L")
        expected = np.asarray(processor([given], return_tensors="np")["pixel_values"])[0]
        got = array(one["values"], np.float32).reshape(expected.shape)
        assert np.abs(got - expected).max() <= 1e-6
        assert np.abs(numbers.follow(image) - expected).max() <= 1e-6
        assert (one["seen"]["height"], one["seen"]["width"]) == expected.shape[1:]


@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_answers_have_the_numbers_and_the_words_of_python(spread: float, folder: Path) -> None:
    logits = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * spread
    moments = MonteCarloMoments(-1)
    for row in logits:
        moments.add(row)
    right = moments.prediction()
    by_mask = call(folder, "certainty.js", "softmax", [[row] for row in logits.tolist()])
    np.testing.assert_allclose(by_mask, logits.softmax(-1).numpy(), atol=1e-12)
    (found,) = call(folder, "certainty.js", "certainty", [[by_mask]])
    np.testing.assert_allclose(found["probabilities"], right.probabilities.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["std"], right.std.numpy(), atol=1e-6)
    assert found["mutualInformation"] == pytest.approx(float(right.mutual_information), abs=1e-6)
    names = tuple("abcde")
    nothing: Any = None
    answer = Answer(
        Settings(0.1, "score"),
        names,
        np.array(by_mask),
        np.array(found["probabilities"]),
        np.array(found["std"]),
        found["mutualInformation"],
        None,
        (),
        None,
        nothing,
    )
    settings: dict[str, Any] = {"classes": names, "masks": 20, "uncertainty": None}
    for values, rank in [(None, None), ([0.0, 0.0, 0.0, 9.0], 0.75), ([0.0, 8.0, 9.0], 1 / 3)]:
        if values is not None:
            settings["uncertainty"] = {"split": "test", "mutual_information_nats": values}
        (words,) = call(folder, "certainty.js", "sentence", [[found, 20, settings]])
        assert words == answer_sentence(answer, rank)
    assert call(folder, "certainty.js", "votes", [[by_mask, names]]) == [votes(answer)]


CHECK = """
import { checked } from "./picture_file.js";
export const look = async (content, name) => checked(new Blob([content]), name);
"""


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def test_the_size_of_every_kind_of_file_is_read_before_it_is_decoded(folder: Path) -> None:
    (folder / "look.js").write_text(CHECK)
    line, good = noise(210, 10), noise(210, 100)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(30)}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0"}),
    ]
    refused = call(folder, "look.js", "look", [[encoded(line, kind, **more), "it"] for kind, more in kinds])
    assert set(refused) == {"BadPicture: it has 210 x 10 pixels, a line rather than a picture; cut out a part of it."}
    taken = call(folder, "look.js", "look", [[encoded(good, kind, **more), "it"] for kind, more in kinds])
    assert [words for words in taken if words] == [["it is a GIF: of an animation the first frame is used."]]
    moving = encoded(good, "WEBP", save_all=True, append_images=[noise(210, 100, seed=1)])
    assert call(folder, "look.js", "look", [[moving, "it"]]) == [["it is animated: the first frame is used."]]


def test_a_file_that_cannot_be_used_gets_a_sentence(folder: Path, tmp_path: Path) -> None:
    (folder / "look.js").write_text(CHECK)
    files = bad_files(tmp_path / "bad")
    cases = [[file.read_bytes(), file.name] for file in files.values()] + [[bytes(20_000_001), "large.png"]]
    cases += [[noise_start(2), "start.jpg"], [b"BM" + bytes(4), "start.bmp"]]
    found = dict(zip([str(case[1]) for case in cases], call(folder, "look.js", "look", cases), strict=True))
    # what is damaged further on is for the browser's decoder
    assert found.pop("cut.png") == []
    words = {
        "text.png": "not an image file",
        "empty.png": "an empty file",
        "tiny.png": "2 x 2 pixels, too few",
        "line.png": "a line rather than a picture",
        "huge.png": "12000 x 9000 pixels; at most 50 million",
        "bomb.png": "30000 x 30000 pixels; at most 50 million",
        "deep.png": "more than 8 bits per channel",
        "large.png": "has 20 MB; at most 20 MB are read",
        "start.jpg": "ends before a JPEG file says how large it is",
        "start.bmp": "ends before a BMP file says how large it is",
    }
    assert set(found) == set(words)
    for name, text in found.items():
        assert text.startswith(f"BadPicture: {name} ") and words[name] in text and text.endswith("."), text


def noise_start(length: int) -> bytes:
    """The first bytes of a JPEG file."""
    return encoded(noise(), "JPEG")[: length + 4]
