"""Generated scenes: stick people and simple objects, whose arrangement is the verb. A pure function of seed and row.

A person holds, kicks, sits on or balances an object, or looks at it; with the nose towards an object at the side the
person looks at it too, so that a pair may have two verbs. In a fifth of the scenes there are two people, and in half of
them something lies about that nobody acts on. Figures are large: DETR from scratch learns small ones very slowly.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


SCENE_OBJECTS = ("person", "ball", "box", "cup", "stool")
SCENE_VERBS = ("hold", "kick", "sit_on", "balance", "look_at")
# what can be done with what: fourteen (object, verb) classes
POSSIBLE = {
    "ball": ("hold", "kick", "balance", "look_at"),
    "box": ("hold", "sit_on", "balance", "look_at"),
    "cup": ("hold", "balance", "look_at"),
    "stool": ("sit_on", "kick", "look_at"),
}
COLORS = {"ball": (200, 60, 50), "box": (50, 90, 190), "cup": (40, 150, 80), "stool": (150, 100, 40)}
SEEDS = {"train": 0, "validation": 1}
TWO_PEOPLE = 0.2
DISTRACTOR = 0.5
GLANCE = 0.4
# of the image's side
OBJECT_RADIUS = 0.1
LINE_WIDTH = 0.03

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Figure:
    """A person who acts: where its parts are, in shares of the image's side.

    Attributes:
        head: Centre of the head.
        radius: Of the head.
        lines: Ends of the body, arms, legs and nose.
        color: Of all of it.
    """

    head: Point
    radius: float
    lines: tuple[tuple[Point, Point], ...]
    color: tuple[int, int, int]

    def box(self) -> Box:
        """The box around head and lines."""
        x, y = self.head
        points = [point for line in self.lines for point in line]
        half = LINE_WIDTH / 2
        left = min(x - self.radius, *(point[0] - half for point in points))
        right = max(x + self.radius, *(point[0] + half for point in points))
        top = min(y - self.radius, *(point[1] - half for point in points))
        bottom = max(y + self.radius, *(point[1] + half for point in points))
        return left, top, right, bottom


@dataclass(frozen=True)
class Thing:
    """An object: its kind, centre, radius and colour."""

    kind: str
    center: Point
    radius: float
    color: tuple[int, int, int]

    def box(self) -> Box:
        """The box around it."""
        (x, y), radius = self.center, self.radius
        return x - radius, y - radius, x + radius, y + radius


@dataclass(frozen=True)
class Scene:
    """People, things, and who does what: (person, thing, verb) by place and name."""

    background: tuple[int, int, int]
    figures: tuple[Figure, ...]
    things: tuple[Thing, ...]
    acts: tuple[tuple[int, int, str], ...]


def make_scene(seed: int, row: int) -> Scene:
    """The scene of a row."""
    generator = np.random.default_rng((seed, row))
    people = 2 if generator.random() < TWO_PEOPLE else 1
    figures: list[Figure] = []
    things: list[Thing] = []
    acts: list[tuple[int, int, str]] = []
    for number in range(people):
        if people == 1:
            center, height = generator.uniform(0.4, 0.6), generator.uniform(0.6, 0.7)
            side = int(generator.choice([-1, 1]))
        else:
            # back to back, so that nobody's object is between them
            center, height = 0.34 + 0.32 * number, generator.uniform(0.55, 0.62)
            side = 2 * number - 1
        kind = str(generator.choice(list(POSSIBLE)))
        verb = str(generator.choice(POSSIBLE[kind]))
        figure, thing, verbs = arrange(generator, kind, verb, float(center), float(height), side)
        figures.append(figure)
        acts += [(number, len(things), name) for name in verbs]
        things.append(thing)
    if generator.random() < DISTRACTOR:
        idle = distractor(generator, [one.box() for one in figures] + [one.box() for one in things])
        things += [idle] if idle is not None else []
    background = tuple(int(value) for value in generator.integers(190, 250, 3))
    return Scene(background, tuple(figures), tuple(things), tuple(acts))  # type: ignore[arg-type]  # three numbers


def arrange(
    generator: np.random.Generator, kind: str, verb: str, center: float, height: float, side: int
) -> tuple[Figure, Thing, list[str]]:
    """A person of a height around `center` who does `verb` with a thing at the `side` (-1: left), and all verbs of it."""
    radius = 0.11 * height
    bottom = float(generator.uniform(0.9, 0.95))
    top = bottom - height
    size = OBJECT_RADIUS * float(generator.uniform(0.9, 1.15))
    if verb == "balance":
        # room for what is on the head
        top, bottom = max(top, 2 * size + 0.03), max(top, 2 * size + 0.03) + height
        bottom = min(bottom, 0.97)
    head = (center, top + radius)
    neck, hip = (center, top + 2 * radius), (center, top + 0.6 * height)
    shoulder = (center, top + 0.32 * height)
    feet = [(center - 0.13 * height, bottom), (center + 0.13 * height, bottom)]
    hands = [(center - 0.2 * height, hip[1]), (center + 0.2 * height, hip[1])]
    acting = 0 if side < 0 else 1
    legs = [(hip, foot) for foot in feet]
    nose = 0
    if verb == "hold":
        hands[acting] = (center + side * 0.25 * height, shoulder[1] + float(generator.uniform(-0.05, 0.1)) * height)
        place = (hands[acting][0] + side * size, hands[acting][1])
    elif verb == "kick":
        foot = (center + side * 0.27 * height, bottom - 0.1 * height)
        legs[acting] = (hip, foot)
        place = (foot[0] + side * size, foot[1])
    elif verb == "sit_on":
        seat = (center, hip[1] + size)
        knee = (center + side * 0.22 * height, hip[1] + 0.02)
        legs = [(hip, knee), (knee, (knee[0], bottom))]
        place = seat
    elif verb == "balance":
        place = (center, top - size)
    else:
        place = (center + side * float(generator.uniform(0.36, 0.42)) * height, head[1])
        nose = side
    verbs = [verb]
    if verb in ("hold", "kick") and generator.random() < GLANCE:
        nose = side
        verbs.append("look_at")
    lines = [(neck, hip), *((shoulder, hand) for hand in hands), *legs]
    if nose:
        lines.append((head, (head[0] + nose * 2.1 * radius, head[1])))
    shade = tuple(int(value) for value in generator.integers(0, 90, 3))
    figure = Figure(head, radius, tuple(lines), shade)  # type: ignore[arg-type]  # three numbers
    return figure, Thing(kind, place, size, tinted(generator, kind)), verbs


def distractor(generator: np.random.Generator, taken: list[Box]) -> Thing | None:
    """A thing that touches none of the boxes, None if there is no room."""
    for _ in range(20):
        x, y = generator.uniform(0.1, 0.9, 2)
        kind = str(generator.choice(list(POSSIBLE)))
        thing = Thing(kind, (float(x), float(y)), OBJECT_RADIUS, tinted(generator, kind))
        left, top, right, bottom = thing.box()
        gap = 0.04
        if all(
            right + gap < box[0] or box[2] + gap < left or bottom + gap < box[1] or box[3] + gap < top for box in taken
        ):
            return thing
    return None


def tinted(generator: np.random.Generator, kind: str) -> tuple[int, int, int]:
    """The colour of a kind, a little changed."""
    red, green, blue = (int(np.clip(value + generator.integers(-25, 26), 0, 255)) for value in COLORS[kind])
    return red, green, blue


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """The scene as an image of `size` x `size` pixels."""
    image = Image.new("RGB", (size, size), scene.background)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(canvas, thing, size)
    width = max(1, round(LINE_WIDTH * size))
    for figure in scene.figures:
        for start, end in figure.lines:
            canvas.line([start[0] * size, start[1] * size, end[0] * size, end[1] * size], figure.color, width)
        (x, y), radius = figure.head, figure.radius
        canvas.ellipse(scaled((x - radius, y - radius, x + radius, y + radius), size), fill=figure.color)
    return image


def draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, size: int) -> None:
    """Draws a ball, a box, a cup (a trapezium with a handle) or a stool (a seat on legs)."""
    left, top, right, bottom = scaled(thing.box(), size)
    middle, radius = (left + right) / 2, (right - left) / 2
    if thing.kind == "ball":
        canvas.ellipse((left, top, right, bottom), fill=thing.color)
    elif thing.kind == "box":
        canvas.rectangle((left, top, right, bottom), fill=thing.color)
    elif thing.kind == "cup":
        canvas.polygon(
            [(left, top), (right, top), (middle + radius / 2, bottom), (middle - radius / 2, bottom)], thing.color
        )
    else:
        canvas.rectangle((left, top, right, top + radius / 2), fill=thing.color)
        for x in (left, right - radius / 3):
            canvas.rectangle((x, top, x + radius / 3, bottom), fill=thing.color)


def scaled(box: Box, size: int) -> Box:
    """A box in pixels."""
    left, top, right, bottom = (value * size for value in box)
    return left, top, right, bottom


def scene_record(role: str, row: int, size: int) -> dict[str, Any]:
    """An image record of a scene, with `boxes` in pixels, their `labels` and `pairs`."""
    scene = make_scene(SEEDS[role], row)
    shares = [one.box() for one in scene.figures] + [one.box() for one in scene.things]
    boxes = [np.clip(np.array(scaled(box, size)), 0, size).tolist() for box in shares]
    labels = [0] * len(scene.figures) + [SCENE_OBJECTS.index(thing.kind) for thing in scene.things]
    pairs = [
        (person, len(scene.figures) + thing, SCENE_VERBS.index(verb)) for person, thing, verb in sorted(scene.acts)
    ]
    return {
        "id": row,
        "row": row,
        "file_name": f"scene {row}",
        "width": size,
        "height": size,
        "role": role,
        "boxes": boxes,
        "labels": labels,
        "pairs": sorted(pairs),
    }


def scene_cell(image: dict[str, Any]) -> dict[str, Any]:
    """The undecoded image of a record."""
    return {"bytes": drawn_scene(image["role"], image["row"], image["width"]), "path": None}


# a scene takes some kilobytes, and drawing it as long as decoding it
@lru_cache(maxsize=4096)
def drawn_scene(role: str, row: int, size: int) -> bytes:
    """The scene of a row as a PNG file."""
    content = io.BytesIO()
    draw_scene(make_scene(SEEDS[role], row), size).save(content, "PNG", compress_level=1)
    return content.getvalue()


def allowed_scene_pairs() -> NDArray[np.float64]:
    """1 where an object can have a verb, else 0 `[V, O]`."""
    allowed = np.zeros((len(SCENE_VERBS), len(SCENE_OBJECTS)))
    for kind, verbs in POSSIBLE.items():
        for verb in verbs:
            allowed[SCENE_VERBS.index(verb), SCENE_OBJECTS.index(kind)] = 1
    return allowed
