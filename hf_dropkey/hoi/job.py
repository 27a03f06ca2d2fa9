"""From the arguments of a job for human-object interaction detection to its model, its `Trainer` and its figures."""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel, TrainingArguments

from ..images.augmentation import AugmentationEpoch
from ..images.boxes import BoxAugmentation
from ..images.sources import data_name
from ..models.configuration_dropkey_hoi import HOI_TASK
from ..models.pairs_dropkey_hoi import pair_arrays
from ..training.arguments import BoxAugmentationArguments, RunArguments
from ..training.detr import DetrTrainer
from ..training.job import EvaluationJob, TrainingJob, public_name
from ..training.record import Fingerprint
from ..training.trainer import GuardedTrainer
from .arguments import (
    CLASS_TABLE,
    GROUND_TRUTH,
    PREDICTIONS,
    HoiDataArguments,
    HoiDropKeyArguments,
    HoiModelArguments,
    HoiRunArguments,
    HoiScoreArguments,
)
from .data import HoiData, HoiSplit, load_hoi_data, read_allowed
from .figures import interactions
from .metrics import FoundPairs, HicoScores, hico_scores, qpic_vcoco_scores, rare_classes
from .model import fit_names, make_config, make_model, make_processor
from .transform import HoiDataset, collate
from .vcoco import ActionTruth, action_predictions, read_truths, vcoco_actions, vcoco_scores


logger = logging.getLogger(__name__)

SHOWN_IMAGES = 8
# the last number in the name of a COCO image is its id
IMAGE_ID = re.compile(r"(\d+)\.\w+$")


@dataclass
class HoiJob(TrainingJob[HoiData]):
    """A training job for human-object interaction detection.

    Attributes:
        config: The configuration; without the names until the data is loaded.
        processor: The image processor.
    """

    TASK = HOI_TASK

    model: HoiModelArguments
    dropkey: HoiDropKeyArguments
    data: HoiDataArguments
    augmentation: BoxAugmentationArguments
    score: HoiScoreArguments
    interactions: HoiRunArguments
    run: RunArguments
    training: TrainingArguments

    def check(self) -> None:
        """Makes configuration, augmentation and image processor.

        Raises:
            FileNotFoundError, ValueError: As `make_config`, `make_processor` and `BoxAugmentation`.
        """
        self.box_augmentation = BoxAugmentation(**asdict(self.augmentation), keep_cut=True)
        self.config = make_config(self.model, self.dropkey.given())
        self.config.validate_dropkey()
        scene_size = self.data.scene_size if self.data.dataset == "scenes" else None
        self.processor: BaseImageProcessor = make_processor(self.model, scene_size)

    def load(self) -> HoiData:
        """The images and interactions, with the numbers of the model's names.

        Raises:
            ValueError: As `load_hoi_data` and `fit_names`, or an image has more pairs than the model has queries.
        """
        evaluates = self.training.do_eval or self.training.eval_strategy != "no"
        data = load_hoi_data(self.data, training=self.training.do_train, evaluation=evaluates)
        data = fit_names(data, self.config, self.model)
        for split in (data.train, data.evaluation):
            if split is not None:
                check_queries(split, self.config.num_queries)
        self.allowed = read_allowed(self.score.allowed_pairs, len(data.objects), len(data.verbs))
        self.vcoco = read_vcoco(self.score, data.evaluation) if self.score.vcoco_file else None
        return data

    def make_model(self, data: HoiData) -> PreTrainedModel:
        """The model, pretrained, from a DETR, or new."""
        return make_model(self.config, self.model)

    def make_trainer(self, model: PreTrainedModel, data: HoiData) -> "HoiTrainer":
        """The `Trainer`, which draws what it finds when asked to."""
        missing = self.config.missing_label
        self.train_set = self.evaluation_set = None
        if data.train is not None:
            self.train_set = HoiDataset(
                data.train,
                self.processor,
                missing_label=missing,
                augmentation=self.box_augmentation,
                seed=self.data_seed,
            )
        if data.evaluation is not None:
            self.evaluation_set = HoiDataset(data.evaluation, self.processor, missing_label=missing)
        if self.interactions.show_data and data.train is not None and self.training.should_save:
            draw_annotations(data.train, self.output / GROUND_TRUTH)
        # what `labels` hold is gone once the loss is computed
        self.training.label_names = ["labels"]
        self.metrics = data.evaluation and HoiMetrics(
            data.evaluation,
            self.score,
            data.person_label,
            self.allowed,
            train=data.train,
            missing_label=missing,
            vcoco=self.vcoco,
        )
        epochs: Any = self.train_set
        return HoiTrainer(
            model=model,
            args=self.training,
            train_dataset=self.train_set,
            eval_dataset=self.evaluation_set,
            processing_class=self.processor,
            data_collator=collate,
            compute_metrics=self.metrics,
            callbacks=[AugmentationEpoch(epochs)] if self.train_set is not None else [],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
            backbone_learning_rate=self.interactions.backbone_learning_rate,
        )

    def fingerprint(self, data: HoiData) -> Fingerprint:
        """Rows and hashes of names, annotations and sizes of each split."""
        return data.fingerprint()

    def describe(self, data: HoiData) -> None:
        """Logs counts of images, pairs, verbs and classes, and what was left out."""
        for name, split in (("training on", data.train), ("evaluation on", data.evaluation)):
            if split is not None:
                logger.info("%s %s", name, split.summary())

    def draw(self, trainer: GuardedTrainer, data: HoiData) -> None:
        """Writes the table of classes, and draws evaluation images with annotated and predicted pairs."""
        if self.evaluation_set is None:
            return
        scores: HicoScores | None = getattr(self.metrics, "scores", None)
        if scores is not None and trainer.is_world_process_zero():
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / CLASS_TABLE).write_text(scores.table(data.objects, data.verbs) + "\n", encoding="utf-8")
            logger.info("the score of each class is in %s", self.output / CLASS_TABLE)
        if self.interactions.draw_images:
            draw_predictions(
                trainer,
                self.evaluation_set,
                self.output / PREDICTIONS,
                count=self.interactions.draw_images,
                threshold=self.interactions.draw_threshold,
            )

    def card(self, data: HoiData) -> dict[str, Any]:
        """Data set, what was evaluated on, and starting point."""
        files = self.data.validation_annotations
        return {
            "tags": ["vision", "human-object-interaction"],
            "dataset": self.data.name,
            "evaluation_dataset": data_name(Path(files).with_suffix("")) if files else None,
            "finetuned_from": public_name(self.model.model_name_or_path or self.model.detr),
        }


@dataclass
class HoiEvaluation(EvaluationJob[HoiData], HoiJob):
    """Scores a saved model on annotated images; nothing is trained."""

    NAME = "hoi"


def check_queries(split: HoiSplit, queries: int) -> None:
    """Raises ValueError if an image has more pairs than a model has queries."""
    for image, annotation in zip(split.images, split.annotations, strict=True):
        pairs = len({(int(person), int(thing)) for person, thing, _ in annotation.pairs})
        if pairs > queries:
            raise ValueError(
                f"image {image['id']} ({image['file_name']}) of {split.name} has {pairs} pairs, and the model "
                f"{queries} queries, each of which finds one; give a new model more with --num_queries {pairs}, or leave "
                "pairs out"
            )


class HoiTrainer(DetrTrainer):
    """`DetrTrainer` whose predictions are (person boxes, object boxes, object classes, verb scores) of all queries."""

    def found(self, outputs: Any, labels: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        """The pairs of a batch, boxes in pixels of the original images."""
        arrays = pair_arrays(outputs, torch.stack([label["frame"] for label in labels]))
        parts = ("person_boxes", "object_boxes", "object_labels", "verb_scores")
        return tuple(torch.stack([getattr(one, part) for one in arrays]) for part in parts)


def read_vcoco(score: HoiScoreArguments, split: HoiSplit | None) -> list[ActionTruth] | None:
    """V-COCO's annotations of the images of a split, whose file names end in the image's id.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is not V-COCO's or COCO's, or names have no id.
    """
    if split is None or score.vcoco_file is None or score.coco_file is None:
        return None
    documents = []
    for file in (score.vcoco_file, score.coco_file):
        if not Path(file).is_file():
            raise FileNotFoundError(f"the annotation file {file} is not there")
        documents.append(json.loads(Path(file).read_text(encoding="utf-8")))
    verbs, coco = documents
    if not isinstance(verbs, list) or "annotations" not in coco:
        raise ValueError(
            f"{score.vcoco_file} must be V-COCO's list of actions, and {score.coco_file} COCO's instances; see "
            "github.com/s-gupta/v-coco"
        )
    ids = []
    for image in split.images:
        found = IMAGE_ID.search(image["file_name"])
        if found is None:
            raise ValueError(
                f"the file name {image['file_name']!r} of {split.name} does not end in the id of a COCO image"
            )
        ids.append(int(found[1]))
    names = [f"{action.name}" for action in vcoco_actions(split.verbs)]
    theirs = {verb["action_name"]: verb for verb in verbs}
    lacking = [name for name in names if name not in theirs]
    if lacking:
        raise ValueError(f"{score.vcoco_file} lacks the actions {lacking} of {split.name}")
    return read_truths([theirs[name] for name in names], coco, ids)


class HoiMetrics:
    """`compute_metrics` for `HoiTrainer`: HICO-DET's numbers on the images that were evaluated, and V-COCO's if requested.

    Attributes:
        scores: Of the last evaluation, class by class; None before.
    """

    def __init__(
        self,
        split: HoiSplit,
        score: HoiScoreArguments,
        person_label: int,
        allowed: NDArray[np.floating] | None,
        *,
        train: HoiSplit | None = None,
        missing_label: int | None = None,
        vcoco: list[ActionTruth] | None = None,
    ) -> None:
        """`train` tells which classes are rare; `vcoco` are V-COCO's own annotations of the split's images."""
        self.split, self.score, self.person_label = split, score, person_label
        self.allowed, self.missing_label, self.vcoco = allowed, missing_label, vcoco
        self.rare = None if train is None else rare_classes(train.truths(), known=hico_classes(split))
        self.scores: HicoScores | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of predictions as `HoiTrainer.found` has them; the labels `[N]` are rows of the split."""
        parts: Any = prediction.predictions
        rows: Any = prediction.label_ids
        found = [FoundPairs(*one) for one in zip(*parts, strict=True)]
        truths = self.split.select(rows.tolist()).truths()
        # for a missing object everything is allowed
        allowed = self.allowed
        if allowed is not None and self.missing_label is not None:
            allowed = np.concatenate([allowed, np.ones((len(allowed), 1))], axis=1)
        self.scores = hico_scores(
            found,
            truths,
            person_label=self.person_label,
            allowed=allowed,
            rare=self.rare,
            count_images_without_boxes=self.score.count_images_without_boxes,
        )
        metrics = self.scores.metrics()
        if self.score.qpic_vcoco:
            qpic = qpic_vcoco_scores(
                found, truths, self.split.verbs, person_label=self.person_label, allowed=self.allowed
            )
            metrics |= {f"qpic_vcoco_{name}": qpic[name] for name in ("mAP_all", "mAP_thesis")}
        if self.vcoco is not None:
            predictions = [
                action_predictions(one, missing_label=self.missing_label, verbs=self.split.verbs, allowed=self.allowed)
                for one in found
            ]
            chosen = [self.vcoco[row] for row in rows.tolist()]
            scores = vcoco_scores(predictions, chosen, vcoco_actions(self.split.verbs))
            metrics |= {name: value for name, value in scores.items() if name.startswith("AP_role")}
        return metrics


def hico_classes(split: HoiSplit) -> set[tuple[int, int]]:
    """The (object, verb) classes of a split."""
    return {
        (int(one.labels[thing]), int(verb)) for one in split.annotations for _, thing, verb in one.pairs if thing >= 0
    }


def annotated_pairs(split: HoiSplit, row: int) -> list[dict[str, Any]]:
    """The annotated pairs of an image, in the form of predicted ones; verbs have no scores."""
    annotation = split.annotations[row]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for person, thing, verb in annotation.pairs.tolist():
        pair = found.setdefault(
            (person, thing),
            {
                "person_box": annotation.boxes[person].tolist(),
                "object_box": annotation.boxes[thing].tolist() if thing >= 0 else None,
                "object": split.objects[annotation.labels[thing]] if thing >= 0 else None,
                "verbs": [],
            },
        )
        pair["verbs"].append(split.verbs[verb])
    return list(found.values())


def draw_annotations(split: HoiSplit, file: Path) -> None:
    """Draws the first eight images that have pairs, with these."""
    rows = [row for row in range(len(split)) if split.count(row)][:SHOWN_IMAGES]
    pairs = [annotated_pairs(split, row) for row in rows]
    figure = interactions(
        [split.open(row) for row in rows],
        [("annotated", pairs)],
        title=f"Training images of {Path(split.name).name} with their annotations",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    logger.info("%d training images with their annotations are in %s", len(rows), file)


def draw_predictions(
    trainer: GuardedTrainer, dataset: HoiDataset, file: Path, *, count: int, threshold: float
) -> None:
    """Draws the first images of a data set with annotated pairs and the model's."""
    rows = list(range(min(count, len(dataset))))
    split, metrics = dataset.split, trainer.compute_metrics
    trainer.compute_metrics = None
    try:
        prediction = trainer.predict(Subset(dataset, rows))
    finally:
        trainer.compute_metrics = metrics
    if not trainer.is_world_process_zero():
        return
    parts: Any = prediction.predictions
    model: Any = trainer.model
    predicted = []
    for persons, things, labels, scores in zip(*parts, strict=True):
        pairs = []
        for query in np.argsort(-scores.max(axis=1), kind="stable"):
            verbs = {
                split.verbs[verb]: float(scores[query, verb])
                for verb in np.argsort(-scores[query], kind="stable")
                if scores[query, verb] >= threshold
            }
            missing = labels[query] == model.config.missing_label
            if verbs:
                pairs.append(
                    {
                        "person_box": persons[query].tolist(),
                        "object_box": None if missing else things[query].tolist(),
                        "object": None if missing else split.objects[labels[query]],
                        "verbs": verbs,
                    }
                )
        predicted.append(pairs)
    figure = interactions(
        [split.open(row) for row in rows],
        [("annotated", [annotated_pairs(split, row) for row in rows]), ("predicted", predicted)],
        title=f"{Path(split.name).name}: annotated, and predicted with a score of {threshold:g} or more",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    logger.info("%d images with their pairs are in %s", len(rows), file)
