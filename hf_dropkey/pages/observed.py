"""What a job measures for the page about its run, kept in the folder so that the page can be made again.

`report_data.json` has the measured drops, `predictions.csv` one line for each evaluated image, `mistakes/` the pictures
of the worst mistakes. None of them is uploaded by a push: the pictures are the user's.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..inspection.analysis import LayerDrop
from ..saved import read_json


DATA, PREDICTIONS, MISTAKES = "report_data.json", "predictions.csv", "mistakes"
# what `hf-dropkey evaluate` writes into the folder of a model, and a part of it
EVALUATION, ROBUSTNESS = "evaluation.json", "robustness"
# longest side of a saved picture, in pixels
PICTURE_SIDE = 224
COLUMNS = ("row", "class", "predicted", "confidence")


@dataclass(frozen=True)
class Predictions:
    """A classifier's predictions of all evaluated images.

    Attributes:
        rows: B names of images.
        classes: C class names.
        labels: Class numbers, `[B]`.
        predicted: Predicted class numbers, `[B]`.
        confidence: Probability of the predicted class, `[B]`.
    """

    rows: list[str]
    classes: list[str]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def worst(self, count: int) -> list[int]:
        """The places of the wrong predictions of highest confidence."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return [int(place) for place in wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]]

    def save(self, folder: Path) -> None:
        """Writes `predictions.csv`."""
        with (folder / PREDICTIONS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row, label, guess, sure in zip(self.rows, self.labels, self.predicted, self.confidence, strict=True):
                writer.writerow([row, self.classes[label], self.classes[guess], f"{sure:.6f}"])

    @classmethod
    def load(cls, folder: Path, classes: Sequence[str]) -> "Predictions | None":
        """Reads `predictions.csv`; None without it, and for a run that has no classes.

        Raises:
            ValueError: The file has other columns, or classes that are not among `classes`.
        """
        file = folder / PREDICTIONS
        if not classes or not file.is_file():
            return None
        numbers = {name: number for number, name in enumerate(classes)}
        with file.open(newline="", encoding="utf-8") as opened:
            found = list(csv.DictReader(opened))
        try:
            return cls(
                [row["row"] for row in found],
                list(classes),
                np.array([numbers[row["class"]] for row in found], dtype=np.int64),
                np.array([numbers[row["predicted"]] for row in found], dtype=np.int64),
                np.array([float(row["confidence"]) for row in found]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} does not fit {DATA} beside it ({error}); delete both, and evaluate again with hf-dropkey train --do_eval"
            ) from error


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction with its picture."""

    file: str
    side: int
    row: str
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Observed:
    """What `report_data.json` holds.

    Attributes:
        drops: The attentions with DropKey, configured and measured; empty if there are none or nothing was measured.
        drops_note: What was measured on, or why it was not.
        classes: Class names in the order of their numbers; empty for other tasks, and without an evaluation.
        mistakes: The worst mistakes, the most confident first.
    """

    drops: list[LayerDrop] = field(default_factory=list)
    drops_note: str = ""
    classes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the file."""
        (folder / DATA).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Observed | None":
        """Reads the file; None without it.

        Raises:
            ValueError: The file is damaged.
        """
        if not (folder / DATA).is_file():
            return None
        found = read_json(folder / DATA)
        try:
            drops = [LayerDrop(**{**one, "fractions": tuple(one["fractions"])}) for one in found["drops"]]
            return cls(drops, found["drops_note"], found["classes"], [Mistake(**one) for one in found["mistakes"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / DATA} is damaged ({error}); delete it") from error


def save_mistakes(folder: Path, predictions: Predictions, pictures: dict[int, Image.Image]) -> list[Mistake]:
    """Writes the pictures of mistakes, by their place among the predictions, into a folder of their own, made anew."""
    shutil.rmtree(folder / MISTAKES, ignore_errors=True)
    if not pictures:
        return []
    (folder / MISTAKES).mkdir()
    found = []
    for number, (place, image) in enumerate(pictures.items(), start=1):
        shown = image.convert("L" if image.mode in ("1", "L") else "RGB")
        shown.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        file = f"{MISTAKES}/{number:02d}.png"
        shown.save(folder / file)
        names = (predictions.classes[predictions.labels[place]], predictions.classes[predictions.predicted[place]])
        found.append(
            Mistake(file, max(shown.size), predictions.rows[place], *names, float(predictions.confidence[place]))
        )
    return found
