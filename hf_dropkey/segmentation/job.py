"""From the arguments of a job for semantic segmentation to its model, its `Trainer` and a figure of what it predicts."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..images.augmentation import AugmentationEpoch
from ..images.sources import data_name, is_local
from ..inference import eval_mode, monte_carlo_predict
from ..models.configuration_dropkey_host import dropkey_backbones
from ..patching.apply import dropkey_modules
from ..training.arguments import BoxAugmentationArguments, RunArguments
from ..training.job import EvaluationJob, TrainingJob, public_name
from ..training.record import Fingerprint
from ..training.trainer import GuardedTrainer
from .arguments import (
    CLASS_TABLE,
    FIGURE,
    SegmentationDataArguments,
    SegmentationDropKeyArguments,
    SegmentationModelArguments,
    SegmentationRunArguments,
)
from .data import SegmentationData, load_segmentation_data
from .figures import Segmented, segmentations
from .metrics import SegmentationMetrics, pixel_counts
from .model import (
    MASK_TYPES,
    PixelScores,
    fit_classes,
    image_side,
    make_config,
    make_model,
    make_processor,
    mask_targets,
    pixel_logits,
)
from .transform import MaskAugmentation, SegmentationDataset, collate


logger = logging.getLogger(__name__)

# of the masks whose disagreement is drawn
DRAW_SEED = 0


@dataclass
class SegmentationJob(TrainingJob[SegmentationData]):
    """A training job for semantic segmentation.

    Attributes:
        config: The configuration; without the classes until the data is loaded.
        processor: The image processor.
        side: Side of the images in pixels.
    """

    TASK = "image-segmentation"

    model: SegmentationModelArguments
    dropkey: SegmentationDropKeyArguments
    data: SegmentationDataArguments
    augmentation: BoxAugmentationArguments
    segmentation: SegmentationRunArguments
    run: RunArguments
    training: TrainingArguments

    def check(self) -> None:
        """Makes configuration, augmentation and image processor.

        Raises:
            FileNotFoundError, ValueError: As `make_config`, `make_processor`, `image_side` and `MaskAugmentation`.
        """
        self.mask_augmentation = MaskAugmentation(**asdict(self.augmentation))
        self.config: PreTrainedConfig = make_config(self.model, self.dropkey, self.data.ignore_index)
        self.processor: BaseImageProcessor = make_processor(self.config, self.model)
        self.side = image_side(self.config, self.processor, self.model)

    def load(self) -> SegmentationData:
        """The images and masks, with the class numbers of the model."""
        evaluates = self.training.do_eval or self.training.eval_strategy != "no"
        data = load_segmentation_data(self.data, training=self.training.do_train, evaluation=evaluates)
        return fit_classes(data, self.config, self.model)

    def make_model(self, data: SegmentationData) -> PreTrainedModel:
        """The model with DropKey, pretrained or new."""
        model = make_model(self.config, self.model)
        if dropkey_backbones(self.config):
            # they have DropKey by themselves
            sites = [(name, float(module.dropkey_ratio)) for name, module in dropkey_modules(model)]
            logger.info("DropKey in the backbone: %s", ", ".join(f"{name} {ratio:.3g}" for name, ratio in sites))
        else:
            self.dropkey.apply(model)
        return model

    def make_trainer(self, model: PreTrainedModel, data: SegmentationData) -> "SegmentationTrainer":
        """The `Trainer`, which counts pixels where it evaluates."""
        self.train_set = self.evaluation_set = None
        if data.train is not None:
            check_batches(model, len(data.train), self.training)
            self.train_set = SegmentationDataset(
                data.train,
                self.processor,
                self.side,
                data.numbers,
                augmentation=self.mask_augmentation,
                seed=self.data_seed,
            )
        if data.evaluation is not None:
            self.evaluation_set = SegmentationDataset(data.evaluation, self.processor, self.side, data.numbers)
        self.metrics = SegmentationMetrics()
        self.training.label_names = ["labels"]
        epochs: Any = self.train_set
        return SegmentationTrainer(
            model=model,
            args=self.training,
            train_dataset=self.train_set,
            eval_dataset=self.evaluation_set,
            processing_class=self.processor,
            data_collator=collate,
            compute_metrics=self.metrics if data.evaluation is not None else None,
            callbacks=[AugmentationEpoch(epochs)] if self.train_set is not None else [],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
            ignore_index=self.data.ignore_index,
        )

    def fingerprint(self, data: SegmentationData) -> Fingerprint:
        """Rows and hashes of names, masks and sizes of each split."""
        return data.fingerprint()

    def describe(self, data: SegmentationData) -> None:
        """Logs the number of classes and images."""
        logger.info("%d classes", len(data.label_names))
        for name, split in (("training", data.train), ("evaluation", data.evaluation)):
            if split is not None:
                logger.info("%s on %s: %d images", name, Path(split.name).name, len(split))

    def draw(self, trainer: GuardedTrainer, data: SegmentationData) -> None:
        """Writes the score of each class, and draws evaluation images with masks, predictions and uncertainty."""
        if self.evaluation_set is None or not trainer.is_world_process_zero():
            return
        self.output.mkdir(parents=True, exist_ok=True)
        if self.metrics.scores is not None:
            (self.output / CLASS_TABLE).write_text(
                "IoU of each class\n" + self.metrics.scores.table(data.label_names) + "\n", encoding="utf-8"
            )
        if self.segmentation.draw_images:
            draw_predictions(
                trainer.accelerator.unwrap_model(trainer.model),
                self.evaluation_set,
                data.label_names,
                self.output / FIGURE,
                count=self.segmentation.draw_images,
                samples=self.segmentation.draw_samples,
            )

    def card(self, data: SegmentationData) -> dict[str, Any]:
        """Data set, what was evaluated on, and starting point."""
        path, named = self.data.evaluation_path, self.data.dataset_name
        # of a data set the split is called "<data set> (<split>)"
        split = data.evaluation.name.rpartition(" (")[2][:-1] if named and data.evaluation else None
        return {
            "tags": ["vision", "semantic-segmentation"],
            "dataset": self.data.name,
            "dataset_tags": named if named and not is_local(named) else None,
            "dataset_split": split,
            "evaluation_dataset": data_name(path) if path else None,
            "finetuned_from": public_name(self.model.model_name_or_path or self.model.backbone_name_or_path),
        }


@dataclass
class SegmentationEvaluation(EvaluationJob[SegmentationData], SegmentationJob):
    """Scores a saved model on images with masks; nothing is trained."""

    NAME = "segmentation"


def check_batches(model: PreTrainedModel, images: int, training: TrainingArguments) -> None:
    """Raises ValueError if UperNet would train on a batch of one image, of which the norm of its pooled map cannot be computed."""
    batch = training.train_batch_size
    if model.config.model_type != "upernet" or training.world_size > 1 or training.dataloader_drop_last:
        return
    if 0 < training.max_steps * training.gradient_accumulation_steps <= images // batch and batch > 1:
        # the last batch of an epoch is never reached
        return
    if batch == 1 or images % batch == 1:
        last = "each batch has" if batch == 1 else f"the last batch of {images} images in batches of {batch} has"
        raise ValueError(
            f"{last} one image, and UperNet's batch norms need two: choose another --per_device_train_batch_size, or leave "
            "such a batch out with --dataloader_drop_last"
        )


class SegmentationTrainer(GuardedTrainer):
    """`GuardedTrainer` whose predictions are pixel counts `[N, 3, C]` at the masks' own sizes, and whose labels are rows."""

    def __init__(self, *args: Any, ignore_index: int, **kwargs: Any) -> None:
        """`ignore_index` is the value of pixels without a class."""
        super().__init__(*args, **kwargs)
        self.ignore_index = ignore_index
        # they take any keyword argument and leave the number of items out, so `Trainer` must divide by the steps
        self.model_accepts_loss_kwargs = False

    def compute_loss(  # type: ignore[override]  # another number of items changes nothing
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The model's own loss; Mask2Former's from the mask of each class."""
        inputs = {name: value for name, value in inputs.items() if name != "rows"}
        plain: Any = self.accelerator.unwrap_model(model)
        if plain.config.model_type in MASK_TYPES:
            inputs |= mask_targets(inputs.pop("labels"), self.ignore_index)
        outputs = model(**inputs)
        loss = outputs["loss"].mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """Loss, pixel counts and rows of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        dataset: Any = self.eval_dataset
        rows = inputs["rows"]
        logits = pixel_logits(outputs, inputs["pixel_values"].shape[-2:])
        counts = [
            count_row(one, dataset.classes(row), self.ignore_index)
            for one, row in zip(logits, rows.tolist(), strict=True)
        ]
        return loss.detach(), torch.tensor(np.stack(counts), device=rows.device), rows


def count_row(logits: torch.Tensor, truth: NDArray[np.int64], ignore_index: int) -> NDArray[np.int64]:
    """The pixel counts `[3, C]` of an image's logits `[C, height, width]`, at the size of its mask."""
    full = nn.functional.interpolate(logits[None], size=truth.shape, mode="bilinear", align_corners=False)[0]
    return pixel_counts(full.argmax(0).cpu().numpy(), truth, logits.shape[0], ignore_index)


def draw_predictions(
    model: nn.Module,
    dataset: SegmentationDataset,
    names: Sequence[str],
    file: Path,
    *,
    count: int,
    samples: int,
) -> None:
    """Draws the first images of a data set with masks, predictions and, with DropKey, uncertainty."""
    examples = []
    drops = any(module.dropkey_ratio for _, module in dropkey_modules(model))
    for row in range(min(count, len(dataset))):
        truth = dataset.classes(row)
        pixels = dataset[row]["pixel_values"][None]
        predicted, uncertainty = segmented(model, pixels, truth.shape, samples=samples if drops else 0)
        examples.append(Segmented(dataset.split.open(row), truth, predicted, uncertainty))
    note = f"; entropy of the mean over {samples} random masks" if drops else ""
    figure = segmentations(
        examples,
        names,
        title=f"{Path(dataset.split.name).name}: annotated and predicted classes{note}",
        ignore_index=dataset.split.ignore_index,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    logger.info("%d images with their classes are in %s", len(examples), file)


def segmented(
    model: nn.Module, pixels: torch.Tensor, size: tuple[int, ...], *, samples: int
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """The classes of an image's pixels, and how uncertain they are.

    Args:
        model: In any mode; left as it was.
        pixels: `[1, 3, side, side]`.
        size: Height and width of the results.
        samples: Random masks of DropKey; 0 for the plain prediction alone, which has no uncertainty.

    Returns:
        Class numbers of the plain prediction, and entropies in nats of the mean over the masks, of that size each.
    """
    scores = PixelScores(model)
    pixels = pixels.to(next(model.parameters()).device)
    with eval_mode(model), torch.no_grad():
        logits = scores(pixels).logits
    larger = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    classes = larger[0].argmax(0).cpu().numpy()
    if not samples:
        return classes, None
    found = monte_carlo_predict(scores, {"pixel_values": pixels}, samples=samples, seed=DRAW_SEED, class_dim=1)
    spread = nn.functional.interpolate(found.entropy[None], size=size, mode="bilinear", align_corners=False)
    return classes, spread[0, 0].cpu().numpy().astype(np.float64)
