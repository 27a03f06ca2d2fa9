"""Uploaded files: read as training reads images, or refused in one sentence."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..images.checks import READER_ERRORS, read_image, transparency


# bytes of a file, pixels of an image: what a camera makes is smaller
MOST_MEGABYTES = 20
MOST_PIXELS = 50_000_000
# pixels on the shorter side, and sides of which one is not a line
LEAST_SIDE, MOST_STRETCH = 4, 20
# of a picture that is kept and shown; models see far fewer pixels
LONGEST_SIDE = 1024


@dataclass(frozen=True)
class Upload:
    """A picture in colour, at most `LONGEST_SIDE` pixels long, and remarks on it, one sentence each."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def read_upload(file: str | Path) -> Upload:
    """Reads an uploaded file.

    Raises:
        ValueError: It cannot be used; a sentence for the person who sent it, without the place where it lies.
    """
    path = Path(file)
    if path.is_file() and path.stat().st_size > MOST_MEGABYTES * 10**6:
        size = path.stat().st_size / 10**6
        raise ValueError(
            f"{path.name} has {size:.0f} MB; at most {MOST_MEGABYTES} MB are read. Make the picture smaller and send it again."
        )
    frames = _check_header(path)
    try:
        image = read_image({"path": str(path), "bytes": None}, 0)
    except ValueError as error:
        raise ValueError(_refusal(path, str(error).replace(str(path), "").strip(" ()"))) from error
    remarks = []
    if frames > 1:
        remarks.append(f"{path.name} is animated: this is the first of its {frames} frames.")
    try:
        if image.mode in ("1", "L", "LA"):
            remarks.append("The picture is grey; the model sees it in three equal colours.")
        if transparency(image) is not None:
            remarks.append("The picture has transparent parts; the model sees the colour that the file stores there.")
        image = image.convert("RGB")
    except READER_ERRORS as error:
        raise ValueError(_refusal(path, str(error))) from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return Upload(image, tuple(remarks))


def _check_header(path: Path) -> int:
    """The number of frames; raises ValueError for sides that cannot be used, before any pixel is read."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            frames = int(getattr(opened, "n_frames", 1))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path.name} has more pixels than are read, {MOST_PIXELS // 10**6} million. Make the picture smaller and send it again."
        ) from error
    except READER_ERRORS:
        # `read_image` has the reason
        return 1
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{path.name} has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are read. Make the "
            "picture smaller and send it again."
        )
    if min(width, height) < LEAST_SIDE:
        raise ValueError(
            f"{path.name} has {width} x {height} pixels, too few to see anything; each side needs at least {LEAST_SIDE}."
        )
    if max(width, height) > MOST_STRETCH * min(width, height):
        raise ValueError(
            f"{path.name} has {width} x {height} pixels, a line rather than a picture; cut out a part of it."
        )
    return frames


def _refusal(path: Path, reason: str) -> str:
    return f"{path.name} cannot be read as an image ({reason}). Send a PNG, JPEG or WebP file."
