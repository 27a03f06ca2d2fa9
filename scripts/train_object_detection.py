"""Trains DETR, Conditional DETR, YOLOS or RT-DETR with DropKey to find objects, and saves a plain Transformers folder.

From a pretrained model, on your own images with annotations in COCO's format:
    python scripts/train_object_detection.py --do_train --do_eval --output_dir runs/mine \
        --train_images images/train --train_annotations train.json \
        --validation_images images/val --validation_annotations val.json \
        --model_name_or_path PekingU/rtdetr_r18vd --ignore_mismatched_sizes --dropkey_ratio 0.1
On a data set of the hub whose rows list their boxes in `objects`:
    python scripts/train_object_detection.py --do_train --do_eval --output_dir runs/cppe5 --dataset_name cppe-5 \
        --model_name_or_path hustvl/yolos-tiny --ignore_mismatched_sizes
A small model from scratch, from a recipe, with anything after it taking precedence:
    python scripts/train_object_detection.py scripts/recipes/detection_overfit.json --output_dir runs/few \
        --train_images ... --train_annotations ... --validation_images ... --validation_annotations ...
--help lists everything. It needs pycocotools and scipy: pip install "hf_dropkey[coco]".

Besides the model, its image processor and COCO's metrics it saves `predictions.png`: validation images with the boxes
that were annotated and those that the model found. The checkpoint loads without this package; apply_dropkey(model)
puts the same DropKey on it again.

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import BaseImageProcessor, TrainingArguments, set_seed

from hf_dropkey.detection.arguments import (
    MASKED_TYPES,
    DetectionDataArguments,
    DetectionDropKeyArguments,
    DetectionModelArguments,
)
from hf_dropkey.detection.data import DetectionData, DetectionSplit, load_detection_data
from hf_dropkey.detection.figures import detections
from hf_dropkey.detection.job import DetectionTrainer
from hf_dropkey.detection.metrics import CocoMetrics, check_coco_packages
from hf_dropkey.detection.model import fit_classes, make_config, make_model, make_processor
from hf_dropkey.detection.transform import BoxAugmentation, DetectionCollator, DetectionDataset
from hf_dropkey.hub.cards import shown_command
from hf_dropkey.hub.trainer import check_training_arguments, output_folder
from hf_dropkey.images.augmentation import AugmentationEpoch
from hf_dropkey.training.arguments import RunArguments, parse_arguments
from hf_dropkey.training.checkpoints import check_same_model, prepare_output_folder, run_settings, tell_changes
from hf_dropkey.training.guards import check_devices


logger = logging.getLogger(__name__)

FIGURE = "predictions.png"


@dataclass
class BoxAugmentationArguments:
    """How training images vary."""

    _argument_group_name = "Augmentation"

    flip_probability: float = field(default=0.5, metadata={"help": "Probability of a mirror image, [0, 1]."})
    crop_scale: float = field(
        default=1.0, metadata={"help": "Smallest share of the area that a random crop keeps, (0, 1]; 1: no crops."}
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Largest change of brightness, contrast and saturation, [0, 1]."}
    )


@dataclass
class DetectionRunArguments:
    """How the model is trained and what is drawn."""

    _argument_group_name = "Detection"

    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the backbone. Default: --learning_rate. DETR: a tenth of it."},
    )
    draw_images: int = field(
        default=8, metadata={"help": f"Validation images drawn in {FIGURE} with their boxes; 0: no figure."}
    )
    draw_threshold: float = field(default=0.5, metadata={"help": "Smallest score of a drawn box, [0, 1]."})

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.draw_images < 0:
            raise ValueError(f"draw_images={self.draw_images} is below 0")
        if not 0 <= self.draw_threshold <= 1:
            raise ValueError(f"draw_threshold={self.draw_threshold} is outside [0, 1]")


ARGUMENT_GROUPS: Any = (
    DetectionModelArguments,
    DetectionDropKeyArguments,
    DetectionDataArguments,
    BoxAugmentationArguments,
    DetectionRunArguments,
    RunArguments,
    TrainingArguments,
)


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


def train_and_save(trainer: DetectionTrainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if there is one; saves model, image processor, metrics and trainer state."""
    model: Any = trainer.model
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", {**metrics, "parameters": model.num_parameters()})
    trainer.save_state()


def evaluate_and_save(trainer: DetectionTrainer) -> None:
    """Evaluates, prints and saves the metrics."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def draw_predictions(
    trainer: DetectionTrainer, dataset: DetectionDataset, names: list[str], *, count: int, threshold: float
) -> None:
    """Draws the first images of a data set with their boxes and the model's, into the folder of the run."""
    rows = list(range(min(count, len(dataset))))
    found: Any = trainer.predict(Subset(dataset, rows)).predictions
    if not trainer.is_world_process_zero():
        return
    split = dataset.split
    predictions = [
        [(names[int(number)], box, score) for score, number, *box in one.tolist() if score >= threshold]
        for one in found
    ]
    figure = detections(
        [split.open(row) for row in rows],
        [annotated_boxes(split, row) for row in rows],
        predictions,
        title=f"{Path(split.name).name}: annotated (above) and predicted with a score of {threshold:g} or more (below)",
    )
    file = output_folder(trainer.args) / FIGURE
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    logger.info("%d images with their boxes are in %s", len(rows), file)


def annotated_boxes(split: DetectionSplit, row: int) -> list[tuple[str, list[float]]]:
    """Class name and corners of each annotation of an image."""
    names = {category["id"]: category["name"] for category in split.categories}
    return [
        (names[one["category_id"]], [x, y, x + width, y + height])
        for one in split.boxes[split.images[row]["id"]]
        for x, y, width, height in [one["bbox"]]
    ]


def write_card(trainer: DetectionTrainer, *, dataset: str, finetuned_from: str | None) -> None:
    """Writes the model card beside the weights, and uploads everything if asked to."""
    card: dict[str, Any] = {
        "tasks": "object-detection",
        "tags": ["vision"],
        "dataset": dataset,
        "finetuned_from": finetuned_from,
        "command": shown_command(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif (output_folder(trainer.args) / "config.json").is_file():
        # a run that only evaluates saves no model
        trainer.create_model_card(**card)


def main() -> None:
    """Runs the job."""
    check_devices(os.environ, sys.argv[1:])
    model_args, dropkey_args, data_args, augmentation_args, detection_args, run_args, training_args = parse_arguments(
        ARGUMENT_GROUPS, sys.argv[1:]
    )
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if training_args.should_log else "WARN")
    # one line for every request to the hub
    logging.getLogger("httpx").setLevel("WARN")

    # everything that can be wrong is looked at first, from the cheapest on
    check_training_arguments(training_args)
    check_coco_packages()
    augmentation = BoxAugmentation(**asdict(augmentation_args))
    config = make_config(model_args)
    processor = make_processor(config, model_args)
    checkpoint = None
    if training_args.do_train:
        # one process renames and deletes, and the others find it done
        with training_args.main_process_first(training_args.save_on_each_node, desc="preparing the output folder"):
            checkpoint = prepare_output_folder(
                output_folder(training_args),
                resume=training_args.resume_from_checkpoint,
                overwrite=run_args.overwrite_output_dir,
            )
    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    with training_args.main_process_first(desc="loading the data"):
        data = load_detection_data(data_args, training=training_args.do_train, evaluation=evaluates)
    data = fit_classes(data, config, model_args)

    set_seed(training_args.seed)
    model = make_model(config, model_args)
    dropkey_args.apply(model)
    if checkpoint is not None:
        check_same_model(model.config, checkpoint)
        if training_args.should_log:
            tell_changes(checkpoint, run_settings(training_args))
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    train, evaluation = make_datasets(data, processor, augmentation, seed=seed)
    # the batches hold what the model takes
    training_args.remove_unused_columns = False
    # nothing to pin for, and every data loader would warn
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    # what `labels` hold is gone once the loss is computed
    training_args.label_names = ["labels"]
    epochs: Any = train
    trainer = DetectionTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=DetectionCollator(with_mask=config.model_type in MASKED_TYPES),
        compute_metrics=data.evaluation and CocoMetrics(data.evaluation, data.category_ids),
        callbacks=[AugmentationEpoch(epochs)] if train is not None else [],
        on_nonfinite_loss=run_args.on_nonfinite_loss,
        backbone_learning_rate=detection_args.backbone_learning_rate,
    )
    logger.info("%d classes, %d parameters", len(data.label_names), model.num_parameters())
    for name, split in (("training", data.train), ("evaluation", data.evaluation)):
        if split is not None:
            boxes = sum(len(split.boxes[image["id"]]) for image in split.images)
            logger.info("%s on %s: %d images, %d boxes", name, split.name, len(split), boxes)

    if training_args.do_train:
        train_and_save(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_and_save(trainer)
    if evaluation is not None and detection_args.draw_images:
        draw_predictions(
            trainer,
            evaluation,
            data.label_names,
            count=detection_args.draw_images,
            threshold=detection_args.draw_threshold,
        )
    source = model_args.model_name_or_path
    if source is not None and Path(source).is_dir():
        # the card is for others, whom the rest of a local path does not concern
        source = Path(source).resolve().name
    write_card(trainer, dataset=data_args.name, finetuned_from=source)


if __name__ == "__main__":
    main()
