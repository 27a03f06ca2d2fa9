"""Generated scenes: shapes on a ground with a pattern, and the class of every pixel. A pure function of seed and row.

Shapes of four classes have any colour, size and turn, and lie over each other, so that form and not colour tells the
class; a ring and a disc differ in the middle only.
"""

import io
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


SCENE_CLASSES = ("ground", "disc", "square", "triangle", "ring")
SEEDS = {"train": 0, "validation": 1}
# drawn so many times larger, then shrunk, so that edges are smooth
OVERSAMPLING = 2
NOISE = 12.0

Point = tuple[float, float]


def make_scene(role: str, row: int, size: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """The scene of a row: an RGB image of `size` x `size` pixels, and class numbers `[size, size]`."""
    generator = np.random.default_rng((SEEDS[role], row))
    large = size * OVERSAMPLING
    image = ground(generator, large)
    mask = Image.new("L", (size, size), 0)
    for _ in range(int(generator.integers(2, 5))):
        number = int(generator.integers(1, len(SCENE_CLASSES)))
        center = (float(generator.uniform(0.15, 0.85)), float(generator.uniform(0.15, 0.85)))
        radius, turn = float(generator.uniform(0.12, 0.24)), float(generator.uniform(0, 2 * math.pi))
        color = tuple(int(value) for value in generator.integers(0, 256, 3))
        draw_shape(image, number, center, radius, turn, color)
        draw_shape(mask, number, center, radius, turn, number)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    noisy = np.clip(pixels + generator.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), np.asarray(mask).copy()


def ground(generator: np.random.Generator, size: int) -> Image.Image:
    """Stripes of two colours that are near each other."""
    first = generator.integers(40, 216, 3)
    second = np.clip(first + generator.integers(-40, 41, 3), 0, 255)
    angle, width = generator.uniform(0, math.pi), generator.uniform(0.08, 0.3) * size
    across = np.arange(size)[None] * math.cos(angle) + np.arange(size)[:, None] * math.sin(angle)
    stripe = (np.floor(across / width) % 2)[..., None]
    return Image.fromarray((first * (1 - stripe) + second * stripe).astype(np.uint8))


def draw_shape(
    image: Image.Image, number: int, center: Point, radius: float, turn: float, color: int | tuple[int, ...]
) -> None:
    """Draws a shape of a class; centre and radius are fractions of the side. Through a ring one sees what lies under it."""
    canvas, size = ImageDraw.Draw(image), image.width
    x, y = center[0] * size, center[1] * size
    reach = radius * size
    name = SCENE_CLASSES[number]
    around = (x - reach, y - reach, x + reach, y + reach)
    if name == "disc":
        canvas.ellipse(around, fill=color)
    elif name == "ring":
        canvas.ellipse(around, outline=color, width=max(2, round(0.4 * reach)))
    else:
        corners = 4 if name == "square" else 3
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        canvas.polygon([(x + reach * math.cos(one), y + reach * math.sin(one)) for one in angles], fill=color)


@lru_cache(maxsize=4096)
def drawn_scene(role: str, row: int, size: int) -> tuple[bytes, bytes]:
    """Image and mask of a row as PNG files."""
    image, mask = make_scene(role, row, size)
    return as_png(image), as_png(Image.fromarray(mask))


def as_png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()
