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

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_dropkey.cards import shown_command
from hf_dropkey.checkpoints import check_same_model, prepare_output_folder, run_settings, tell_changes
from hf_dropkey.classification import (
    check_loss,
    image_size,
    make_config,
    make_image_processor,
    make_model,
    set_classes,
    transform_rows,
)
from hf_dropkey.classification_arguments import (
    AugmentationArguments,
    DropKeyArguments,
    ModelArguments,
    RunArguments,
    parse_arguments,
)
from hf_dropkey.data import DataArguments, load_image_data
from hf_dropkey.faults import GuardedTrainer, check_devices
from hf_dropkey.hub_trainer import HubTrainer, check_training_arguments, output_folder
from hf_dropkey.image_transform import AugmentationEpoch, collate_images
from hf_dropkey.metrics import classification_metrics


logger = logging.getLogger(__name__)

ARGUMENT_GROUPS: Any = (
    ModelArguments,
    DropKeyArguments,
    DataArguments,
    AugmentationArguments,
    RunArguments,
    TrainingArguments,
)


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
    model_args, dropkey_args, data_args, augmentation_args, run_args, training_args = parse_arguments(
        ARGUMENT_GROUPS, sys.argv[1:]
    )
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO if training_args.should_log else "WARN")
    # one line for every request to the hub; the second is of newer releases
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel("WARN")

    # everything that can be wrong is looked at first, from the cheapest on
    check_training_arguments(training_args)
    config = make_config(model_args, dropkey_args, digits=data_args.is_digits)
    augmentation = augmentation_args.augmentation(image_size(config), digits=data_args.is_digits)
    check_loss(config, label_smoothing=training_args.label_smoothing_factor)
    processor = make_image_processor(config, model_args, digits=data_args.is_digits)
    checkpoint = None
    if training_args.do_train:
        # one process renames and deletes, and the others find it done
        with training_args.main_process_first(training_args.save_on_each_node, desc="preparing the output folder"):
            checkpoint = prepare_output_folder(
                output_folder(training_args),
                resume=training_args.resume_from_checkpoint,
                overwrite=run_args.overwrite_output_dir,
            )
    with training_args.main_process_first(desc="loading the data"):
        data = load_image_data(data_args, training=training_args.do_train)
    set_classes(config, model_args, data.label_names)
    if checkpoint is not None:
        check_same_model(config, checkpoint)
        if training_args.should_log:
            tell_changes(checkpoint, run_settings(training_args))

    set_seed(training_args.seed)
    model = make_model(config, model_args)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    transform = transform_rows(data, processor, config, augmentation, seed=seed)
    # the transform reads columns that the model does not take
    training_args.remove_unused_columns = False
    # nothing to pin for, and every data loader would warn
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    trainer = GuardedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=processor,
        data_collator=collate_images,
        compute_metrics=classification_metrics,
        callbacks=[AugmentationEpoch(transform)],
        on_nonfinite_loss=run_args.on_nonfinite_loss,
    )
    logger.info("%d classes, %d parameters", len(data.label_names), model.num_parameters())
    logger.info("evaluation on %s: %d images", data.evaluation_split, len(data.evaluation))

    if training_args.do_train:
        train_and_save(trainer, checkpoint)
    if training_args.do_eval:
        evaluate_and_save(trainer)
    source = model_args.model_name_or_path
    if source is not None and Path(source).is_dir():
        # the card is for others, whom the rest of a local path does not concern
        source = Path(source).resolve().name
    write_card(trainer, data_args, split=data.evaluation_split, finetuned_from=source)


if __name__ == "__main__":
    main()
