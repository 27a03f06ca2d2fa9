"""Draws the figures of docs/mesh.md: generated people with their meshes, and the bodies in rest and in poses.

    python scripts/draw_bodies.py --out docs/figures --bodies procedural anny

Everything follows from seeds; `anny` needs pip install 'hf_dropkey[body]'.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from hf_dropkey.mesh.bodies import Body, procedural_body
from hf_dropkey.mesh.data import GeneratedPeople
from hf_dropkey.mesh.figures import alone, sheet, with_joints
from hf_dropkey.mesh.model import make_body


SIDE = 160
PEOPLE = 6


@dataclass
class FigureArguments:
    """Where the figures go, and of which bodies."""

    out: Path = field(default=Path("docs/figures"), metadata={"help": "Folder for the figures."})
    bodies: list[str] = field(default_factory=lambda: ["procedural"], metadata={"help": "As --body of the training."})


def people() -> Image.Image:
    """Generated people of 64 pixels, with their joints, and their meshes from the front and the side."""
    body = procedural_body()
    split = GeneratedPeople(body, PEOPLE, 7, 64)
    rows: list[list[Image.Image]] = [[], [], [], []]
    for row in range(PEOPLE):
        image, person = split.draw(row)
        large = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        # of generated people everything is known
        mesh, joints = cast(np.ndarray, person.vertices), cast(np.ndarray, person.joints_2d)
        rows[0].append(large)
        rows[1].append(with_joints(large, joints[:, :2] * SIDE / 64))
        rows[2].append(alone(mesh, body.faces, SIDE, reach=1.15))
        rows[3].append(alone(mesh, body.faces, SIDE, turn=90, reach=1.15))
    return sheet(rows, ["image, joints, mesh, mesh from the side", *[""] * (PEOPLE - 1)], side=SIDE)


def poses(body: Body) -> list[Image.Image]:
    """A body in rest, from the front and the side, and in three poses."""
    pose, shape = body.sample(3, np.random.default_rng(3))
    meshes, _ = body(pose, shape)
    rest = [alone(body.template, body.faces, SIDE, turn=turn, reach=1.15) for turn in (0.0, 90.0)]
    return [*rest, *(alone(mesh, body.faces, SIDE, reach=1.15) for mesh in meshes)]


def main() -> None:
    """Draws the figures."""
    (arguments,) = HfArgumentParser(cast(Any, FigureArguments)).parse_args_into_dataclasses()
    arguments.out.mkdir(parents=True, exist_ok=True)
    people().quantize(256).save(arguments.out / "mesh_people.png", optimize=True)
    rows = [poses(make_body(name)) for name in arguments.bodies]
    titles = ["rest", "from the side", "pose", "pose", "pose"]
    sheet(rows, titles, side=SIDE).quantize(256).save(arguments.out / "mesh_bodies.png", optimize=True)


if __name__ == "__main__":
    main()
