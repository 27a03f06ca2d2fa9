"""Trains a ViT, T2T-ViT, VOLO or CeiT with DropKey to classify images, and saves a folder that anyone can load.

From a recipe, with anything after it taking precedence:
    python scripts/train_image_classification.py scripts/recipes/digits_vit.json --output_dir runs/digits --seed 1
From scratch on your own folders of images, one sub-folder per class:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/mine \
        --train_dir images/train --validation_dir images/validation --model_size small --dropkey_ratio 0.1
The same with another architecture, here with VOLO's mixing of tokens:
        ... --model_family volo --model_size volo_d1 --config_overrides '{"mix_token": true}'
From a pretrained ViT, on a data set of the hub:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/beans \
        --dataset_name beans --model_name_or_path google/vit-base-patch16-224-in21k --dropkey_ratio 0.1
Without a data argument it trains on the built-in handwritten digits. --help lists everything.

With --resume_from_checkpoint auto the same command starts a run and, after whatever stopped it, goes on from the last
whole checkpoint. On several devices or nodes, with a configuration of scripts/accelerate/ or with torchrun:
    accelerate launch --config_file scripts/accelerate/several_gpus.yaml scripts/train_image_classification.py ...

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, in clear.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import load_image_data
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.classification.model import set_classes
from hf_dropkey.hub.cards import shown_command
from hf_dropkey.hub.trainer import HubTrainer, check_training_arguments, output_folder
from hf_dropkey.training.checkpoints import check_same_model, prepare_output_folder, run_settings, tell_changes
from hf_dropkey.training.guards import check_devices


logger = logging.getLogger(__name__)


def train_and_save(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if there is one; saves model, image processor, metrics and trainer state."""
    model: Any = trainer.model
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", {**metrics, "parameters": model.num_parameters()})
    trainer.save_state()


def evaluate_and_save(trainer: Trainer) -> None:
    """Evaluates, prints and saves the metrics."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def write_card(trainer: HubTrainer, data: DataArguments, *, split: str, finetuned_from: str | None) -> None:
    """Writes the model card beside the weights, and uploads everything if asked to."""
    card: dict[str, Any] = {
        "tasks": "image-classification",
        "tags": ["vision"],
        "dataset": data.name,
        "dataset_tags": data.dataset_name if data.dataset_name == data.name and not data.is_digits else None,
        "dataset_split": split,
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
    job = ClassificationJob.parse(sys.argv[1:])
    training = job.training
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if training.should_log else "WARN")
    # one line for every request to the hub; the second is of newer releases
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel("WARN")

    # everything that can be wrong is looked at first, from the cheapest on
    check_training_arguments(training)
    job.check()
    checkpoint = None
    if training.do_train:
        # one process renames and deletes, and the others find it done
        with training.main_process_first(training.save_on_each_node, desc="preparing the output folder"):
            checkpoint = prepare_output_folder(
                output_folder(training),
                resume=training.resume_from_checkpoint,
                overwrite=job.run.overwrite_output_dir,
            )
    with training.main_process_first(desc="loading the data"):
        data = load_image_data(job.data, training=training.do_train)
    set_classes(job.config, job.model, data.label_names)
    if checkpoint is not None:
        check_same_model(job.config, checkpoint)
        if training.should_log:
            tell_changes(checkpoint, run_settings(training))

    trainer = job.trainer(data)
    model: Any = trainer.model
    logger.info("%d classes, %d parameters", len(data.label_names), model.num_parameters())
    logger.info("evaluation on %s: %d images", data.evaluation_split, len(data.evaluation))

    if training.do_train:
        train_and_save(trainer, checkpoint)
    if training.do_eval:
        evaluate_and_save(trainer)
    source = job.model.model_name_or_path
    if source is not None and Path(source).is_dir():
        # the card is for others, whom the rest of a local path does not concern
        source = Path(source).resolve().name
    write_card(trainer, job.data, split=data.evaluation_split, finetuned_from=source)


if __name__ == "__main__":
    main()
