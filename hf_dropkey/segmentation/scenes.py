"""Generated scenes: shapes on a ground with a pattern, and the class of every pixel. A pure function of seed and row.

Shapes of four classes have any size and turn and lie over each other. Colours vary around one for a class, which
squares and triangles have to themselves; discs and rings share theirs, so that form alone separates them.
"""

import io
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


SCENE_CLASSES = ("ground", "disc", "square", "triangle", "ring")
COLORS = {"disc": (200, 60, 60), "ring": (200, 60, 60), "square": (50, 170, 70), "triangle": (60, 90, 210)}
COLOR_SPREAD = 50
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
        shifts = generator.integers(-COLOR_SPREAD, COLOR_SPREAD + 1, 3)
        color = tuple(np.clip(shifts + COLORS[SCENE_CLASSES[number]], 0, 255).tolist())
        draw_shape(image, number, center, radius, turn, color)
        draw_shape(mask, number, center, radius, turn, number)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    noisy = np.clip(pixels + generator.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), np.asarray(mask).copy()


def ground(generator: np.random.Generator, size: int) -> Image.Image:
    """Stripes of two dull colours that are near each other."""
    first = np.clip(generator.integers(60, 200) + generator.integers(-30, 31, 3), 0, 255)
    second = np.clip(first + generator.integers(-30, 31, 3), 0, 255)
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
