"""Every file that somebody may send is read, or gets a sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_demos import bad_files, noise

from hf_dropkey.demo import uploads
from hf_dropkey.demo.uploads import LONGEST_SIDE, read_upload


def test_a_picture_is_read_as_it_is(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    found = read_upload(tmp_path / "a.png")
    assert np.array_equal(np.asarray(found.image), np.asarray(noise())) and found.remarks == ()


def test_every_bad_file_gets_a_sentence_without_its_place(tmp_path: Path) -> None:
    for word, file in bad_files(tmp_path / "bad").items():
        with pytest.raises(ValueError, match=word) as raised:
            read_upload(file)
        assert file.name in str(raised.value) and str(tmp_path) not in str(raised.value)
        assert str(raised.value).endswith((".", ";")) or "at least" in str(raised.value)


def test_a_large_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_MEGABYTES", 0)
    noise().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png has 0 MB; at most 0 MB are read"):
        read_upload(tmp_path / "a.png")


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    found = read_upload(tmp_path / "a.gif")
    assert found.image.getpixel((5, 5)) == (255, 0, 0)
    assert "first of its 3 frames" in found.remarks[0]


def test_grey_and_transparent_pictures_come_with_a_remark(tmp_path: Path) -> None:
    Image.new("L", (20, 20), 100).save(tmp_path / "grey.png")
    found = read_upload(tmp_path / "grey.png")
    assert found.image.mode == "RGB" and "grey" in found.remarks[0]
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert "transparent" in read_upload(tmp_path / "clear.png").remarks[0]


def test_a_photograph_is_turned_and_made_smaller(tmp_path: Path) -> None:
    image = Image.new("RGB", (3000, 1500))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_upload(tmp_path / "a.jpg").image.size == (LONGEST_SIDE // 2, LONGEST_SIDE)
