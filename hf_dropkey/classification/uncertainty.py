"""How uncertain a classifier is about evaluation images, kept with it, to rank other images by: `--uncertainty`.

`uncertainty_results.json` holds numbers and no image, and goes with the model to the Hub as other results do. It costs
`SAMPLES` passes over at most `MOST_IMAGES` images, so it is measured where it is asked for.
"""

import json
import logging
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..inference import monte_carlo_predict
from ..patching.apply import dropkey, dropkey_modules, forgotten_ratio
from ..patching.sites import transformers_model
from ..saved import read_json
from ..training.trainer import GuardedTrainer
from .data import ImageData


logger = logging.getLogger(__name__)

FILE = "uncertainty_results.json"
# masks, and images of the evaluation: a rank in percent needs no more. an estimate from fewer masks is smaller, so that
# only numbers of as many masks can be compared
SAMPLES, MOST_IMAGES = 20, 200
HELP = (
    f"Also measure how uncertain the model is about evaluation images ({MOST_IMAGES} at most, {SAMPLES} masks of DropKey "
    "each), by which hf-dropkey demo ranks other images."
)


@dataclass
class MeasuringArguments:
    """What is measured at the end beside the metrics. The trained weights do not depend on it."""

    _argument_group_name = "Measurements"

    uncertainty: bool = field(default=False, metadata={"help": HELP})

    def check(self, training: TrainingArguments) -> None:
        """Raises ValueError where it is requested and nothing is evaluated."""
        if self.uncertainty and not training.do_eval:
            raise ValueError("--uncertainty is measured on evaluation images, and nothing is evaluated; add --do_eval")


@dataclass(frozen=True)
class MeasuredUncertainty:
    """Mutual information of prediction and mask for images that were spread over a split.

    Attributes:
        split: Name of the split, such as "test".
        samples: Masks for each image.
        ratio: The largest drop ratio that it was measured with.
        pattern: The pattern that it was measured with.
        mutual_information_nats: A number for each image, ascending.
    """

    split: str
    samples: int
    ratio: float
    pattern: str
    mutual_information_nats: tuple[float, ...]

    def rank(self, value: float) -> float:
        """The fraction of the images that are less uncertain, [0, 1]."""
        return bisect_left(self.mutual_information_nats, value) / len(self.mutual_information_nats)

    def save(self, folder: Path) -> None:
        """Writes the file."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "MeasuredUncertainty | None":
        """Reads the file; None where nothing was measured.

        Raises:
            ValueError: The file is damaged.
        """
        if not (folder / FILE).is_file():
            return None
        found = read_json(folder / FILE)
        try:
            values = tuple(sorted(float(value) for value in found["mutual_information_nats"]))
            split, pattern = str(found["split"]), str(found["pattern"])
            measured = cls(split, int(found["samples"]), float(found["ratio"]), pattern, values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / FILE} is damaged ({type(error).__name__}: {error}); delete it, hf-dropkey evaluate --uncertainty "
                "writes a new one"
            ) from error
        if not values:
            raise ValueError(
                f"{folder / FILE} has no number; delete it, hf-dropkey evaluate --uncertainty writes a new one"
            )
        return measured


def unmeasurable(model: Any) -> str | None:
    """Why a model's uncertainty cannot be measured; None if it can.

    A saved stock model, whose settings nothing follows yet, can be.
    """
    root: Any = transformers_model(model)
    kind = getattr(root.config, "problem_type", None)
    if kind in ("multi_label_classification", "regression"):
        return f"its problem_type is {kind}, and the mutual information is that of one class of several"
    if forgotten_ratio(root) or any(module.dropkey_ratio > 0 for _, module in dropkey_modules(root)):
        return None
    return "no attention of it drops keys, so that its masks are all the same"


def measure_uncertainty(
    model: Any, data: ImageData, collate: Callable[[Any], dict[str, torch.Tensor]], *, batch_size: int
) -> MeasuredUncertainty:
    """Measures a model on images spread over the evaluation split, whose rows give tensors.

    Raises:
        ValueError: The model's uncertainty cannot be measured.
    """
    reason = unmeasurable(model)
    if reason is not None:
        raise ValueError(f"--uncertainty cannot be measured for this model: {reason}; leave it out")
    root: Any = transformers_model(model)
    with dropkey(root) if forgotten_ratio(root) else nullcontext():
        return _measured(root, data, collate, batch_size)


def _measured(
    root: Any, data: ImageData, collate: Callable[[Any], dict[str, torch.Tensor]], batch_size: int
) -> MeasuredUncertainty:
    modules = [module for _, module in dropkey_modules(root)]
    count = min(MOST_IMAGES, len(data.evaluation))
    rows = [number * len(data.evaluation) // count for number in range(count)]
    found: list[float] = []
    for start in range(0, count, batch_size):
        batch = collate([data.evaluation[row] for row in rows[start : start + batch_size]])
        inputs = {"pixel_values": batch["pixel_values"].to(root.device)}
        predicted = monte_carlo_predict(root, inputs, samples=SAMPLES, seed=start)
        found += predicted.mutual_information.tolist()
    ratio = float(max(module.dropkey_ratio for module in modules))
    return MeasuredUncertainty(data.evaluation_split, SAMPLES, ratio, modules[0].dropkey_pattern, tuple(sorted(found)))


def save_uncertainty(folder: Path, trainer: GuardedTrainer, data: ImageData) -> None:
    """Measures the trained model on the evaluation images and writes the file beside it; warns where it cannot be measured."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning(
            "--uncertainty: nothing was measured, because no process has all weights; hf-dropkey evaluate --uncertainty "
            "measures the saved model"
        )
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    reason = unmeasurable(model)
    if reason is not None:
        # a recipe may ask for it whose ratio the command has set to 0
        logger.warning("--uncertainty: nothing was measured: %s", reason)
        return
    collate: Any = trainer.data_collator
    size = trainer.args.per_device_eval_batch_size
    measure_uncertainty(model, data, collate, batch_size=size).save(folder)
