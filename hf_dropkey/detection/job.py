"""From the arguments of a job for object detection to its model, its `Trainer` and a figure of what it finds."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..hub.cards import COUNTED_BY
from ..hub.trainer import output_folder
from ..images.augmentation import AugmentationEpoch
from ..images.boxes import BoxAugmentation
from ..images.sources import data_name
from ..training.arguments import BoxAugmentationArguments, RunArguments
from ..training.detr import DetrTrainer
from ..training.job import EvaluationJob, TrainingJob, public_name
from ..training.record import Fingerprint
from ..training.trainer import GuardedTrainer
from .arguments import (
    FIGURE,
    DetectionDataArguments,
    DetectionDropKeyArguments,
    DetectionModelArguments,
    DetectionRunArguments,
)
from .data import DetectionData, DetectionSplit, load_detection_data
from .figures import detections
from .metrics import CocoMetrics, coco_package, package_version, post_process
from .model import fit_classes, make_config, make_model, make_processor, needs_mask
from .transform import DetectionCollator, DetectionDataset


logger = logging.getLogger(__name__)

# images looked at for each one drawn, and boxes of an image where none reaches the threshold
CHOSEN_FROM, SUREST = 8, 3


@dataclass
class DetectionJob(TrainingJob[DetectionData]):
    """A training job for object detection.

    Attributes:
        config: The configuration; without the classes until the data is loaded.
        box_augmentation: How training images vary.
        processor: The image processor.
    """

    TASK = "object-detection"

    model: DetectionModelArguments
    dropkey: DetectionDropKeyArguments
    data: DetectionDataArguments
    augmentation: BoxAugmentationArguments
    detection: DetectionRunArguments
    run: RunArguments
    training: TrainingArguments

    def check(self) -> None:
        """Makes configuration, augmentation and image processor.

        Raises:
            ImportError, FileNotFoundError, ValueError: As `coco_package`, `make_config` and `make_processor`.
        """
        self.package = coco_package(self.detection.coco_package)
        logger.info("detections are counted by %s", package_version(self.package))
        self.box_augmentation = BoxAugmentation(**asdict(self.augmentation))
        self.config: PreTrainedConfig = make_config(self.model)
        self.processor: BaseImageProcessor = make_processor(self.config, self.model)

    def load(self) -> DetectionData:
        """The images and boxes, with the class numbers of the model."""
        evaluates = self.training.do_eval or self.training.eval_strategy != "no"
        data = load_detection_data(self.data, training=self.training.do_train, evaluation=evaluates)
        return fit_classes(data, self.config, self.model)

    def make_model(self, data: DetectionData) -> PreTrainedModel:
        """The model with DropKey, pretrained or new."""
        model = make_model(self.config, self.model)
        self.dropkey.apply(model)
        return model

    def make_trainer(self, model: PreTrainedModel, data: DetectionData) -> "DetectionTrainer":
        """The `Trainer`, which draws what it finds when asked to."""
        self.train_set, self.evaluation_set = make_datasets(
            data, self.processor, self.box_augmentation, seed=self.data_seed
        )
        # what `labels` hold is gone once the loss is computed
        self.training.label_names = ["labels"]
        epochs: Any = self.train_set
        return DetectionTrainer(
            model=model,
            args=self.training,
            train_dataset=self.train_set,
            eval_dataset=self.evaluation_set,
            processing_class=self.processor,
            data_collator=DetectionCollator(with_mask=needs_mask(model, self.processor)),
            compute_metrics=data.evaluation and CocoMetrics(data.evaluation, data.category_ids, package=self.package),
            callbacks=[AugmentationEpoch(epochs)] if self.train_set is not None else [],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
            backbone_learning_rate=self.detection.backbone_learning_rate,
        )

    def fingerprint(self, data: DetectionData) -> Fingerprint:
        """Rows and hashes of names, labels and sizes of each split."""
        return data.fingerprint()

    def describe(self, data: DetectionData) -> None:
        """Logs the number of classes, images and boxes."""
        logger.info("%d classes", len(data.label_names))
        for name, split in (("training", data.train), ("evaluation", data.evaluation)):
            if split is not None:
                logger.info("%s on %s: %d images, %d boxes", name, split.name, len(split), split.box_counts()[0])

    def draw(self, trainer: GuardedTrainer, data: DetectionData) -> None:
        """Draws evaluation images with their boxes and the model's, if `--draw_images` is above 0."""
        if self.evaluation_set is not None and self.detection.draw_images:
            draw_predictions(
                trainer,
                self.evaluation_set,
                data.label_names,
                count=self.detection.draw_images,
                threshold=self.detection.draw_threshold,
            )

    def card(self, data: DetectionData) -> dict[str, Any]:
        """Data set, what was evaluated on, and starting point."""
        files = self.data.validation_annotations
        # of a hub data set the split is called "the <split> split of <data set>"
        split = data.evaluation.name.removeprefix("the ").split(" split of ")[0] if data.evaluation else None
        return {
            "tags": ["vision"],
            "dataset": self.data.name,
            "dataset_split": None if files else split,
            "evaluation_dataset": data_name(Path(files).with_suffix("")) if files else None,
            "finetuned_from": public_name(self.model.model_name_or_path),
        }


@dataclass
class DetectionEvaluation(EvaluationJob[DetectionData], DetectionJob):
    """Scores a saved detector on annotated images; nothing is trained."""

    NAME = "detection"


def make_datasets(
    data: DetectionData, processor: BaseImageProcessor, augmentation: BoxAugmentation, *, seed: int
) -> tuple[DetectionDataset | None, DetectionDataset | None]:
    """The data sets to train on, with augmentation, and to evaluate on, without."""
    numbers = data.class_numbers
    train = evaluation = None
    if data.train is not None:
        train = DetectionDataset(data.train, processor, numbers, augmentation=augmentation, seed=seed)
    if data.evaluation is not None:
        evaluation = DetectionDataset(data.evaluation, processor, numbers)
    return train, evaluation


class DetectionTrainer(DetrTrainer):
    """`DetrTrainer` whose predictions are detections `[N, K, 6]` (`post_process`).

    `processing_class` must be the image processor of the model's family.
    """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Trainer.evaluate`; the results say which package has counted."""
        found: dict[str, Any] = super().evaluate(*args, **kwargs)
        counted: Any = self.compute_metrics
        if isinstance(counted, CocoMetrics):
            prefix = kwargs.get("metric_key_prefix", "eval")
            found[f"{prefix}_{COUNTED_BY}"] = package_version(coco_package(counted.package))
        return found

    def found(self, outputs: Any, labels: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The detections of a batch."""
        processor: Any = self.processing_class
        return post_process(processor, outputs, torch.stack([label["frame"] for label in labels]))


def draw_predictions(
    trainer: GuardedTrainer, dataset: DetectionDataset, names: list[str], *, count: int, threshold: float
) -> None:
    """Draws images of a data set with their boxes and the model's, into the folder of the run.

    Of the first images those in which the model finds something are drawn; if it finds nothing anywhere, the title says
    so and the surest boxes are drawn.
    """
    looked_at = list(range(min(CHOSEN_FROM * count, len(dataset))))
    found: Any = trainer.predict(Subset(dataset, looked_at)).predictions
    if not trainer.is_world_process_zero():
        return
    split = dataset.split
    scored = [
        sorted(((score, int(number), box) for score, number, *box in one.tolist()), reverse=True) for one in found
    ]
    rows, shown = choose_examples(scored, count=count, threshold=threshold)
    most = max((one[0][0] for one in scored if one), default=0.0)
    kind = f"predicted with a score of {threshold:g} or more"
    if most < threshold:
        kind = f"predicted: no score reaches {threshold:g}, so the surest boxes (largest score {most:.2f})"
    figure = detections(
        [split.open(row) for row in rows],
        [annotated_boxes(split, row) for row in rows],
        [[(names[number], box, score) for score, number, box in one] for one in shown],
        title=f"{Path(split.name).name}: annotated (above) and {kind} (below)",
    )
    file = output_folder(trainer.args) / FIGURE
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    logger.info("%d images with their boxes are in %s", len(rows), file)


Scored = list[tuple[float, int, list[float]]]


def choose_examples(scored: list[Scored], *, count: int, threshold: float) -> tuple[list[int], list[Scored]]:
    """Which images are drawn, and the boxes of each.

    Args:
        scored: For each image score, class and box of its detections, the surest first.
        count: Largest number of images.
        threshold: Smallest score that is drawn, unless no image has one.
    """
    kept = [[box for box in one if box[0] >= threshold] for one in scored]
    if not any(kept):
        # so many that a figure can be read
        kept = [one[:SUREST] for one in scored]
    # the sort is stable: images with a box in their order, then the others
    rows = sorted(sorted(range(len(kept)), key=lambda row: not kept[row])[:count])
    return rows, [kept[row] for row in rows]


def annotated_boxes(split: DetectionSplit, row: int) -> list[tuple[str, list[float]]]:
    """Class name and corners of each annotation of an image."""
    names = {category["id"]: category["name"] for category in split.categories}
    return [
        (names[one["category_id"]], [x, y, x + width, y + height])
        for one in split.boxes[split.images[row]["id"]]
        for x, y, width, height in [one["bbox"]]
    ]
