"""From what a training job for image classification was told to its `Trainer`, the same for whoever starts the job.

`scripts/train_image_classification.py` trains one model so, and `experiments.py` many, so that a cell of a grid is the run
that its command names.
"""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, TrainingArguments, set_seed

from ..images.augmentation import Augmentation, AugmentationEpoch
from ..training.arguments import RampArguments, RunArguments, parse_arguments
from ..training.trainer import GuardedTrainer
from .arguments import AugmentationArguments, DataArguments, DropKeyArguments, ModelArguments
from .data import ImageData
from .metrics import classification_metrics
from .model import check_loss, image_size, make_config, make_image_processor, make_model
from .transform import collate_images, transform_rows


ARGUMENT_GROUPS: Any = (
    ModelArguments,
    DropKeyArguments,
    RampArguments,
    DataArguments,
    AugmentationArguments,
    RunArguments,
    TrainingArguments,
)
# the arguments of `Trainer` without which a run cannot be told from another one
DECISIVE = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
    "neftune_noise_alpha",
)


@cache
def _contents(pattern: str) -> str:
    """The start of a SHA-256 of the files that a pattern matches, or of the names and sizes in a folder; "" for none.

    Read once in a process, as the data is.
    """
    path = Path(pattern)
    if path.is_dir():
        listing = sorted(
            f"{file.relative_to(path)} {file.stat().st_size}" for file in path.rglob("*") if file.is_file()
        )
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
    found = hashlib.sha256()
    files = sorted(glob.glob(pattern))
    for file in files:
        with Path(file).open("rb") as data:
            found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()[:16] if files else ""


@dataclass
class ClassificationJob:
    """All that a job was told, one group of arguments each, and what of it can be made before the data is read.

    Attributes:
        config: The configuration, without the classes.
        augmentation: How training images vary.
        processor: The image processor.
    """

    model: ModelArguments
    dropkey: DropKeyArguments
    ramp: RampArguments
    data: DataArguments
    augmentation_arguments: AugmentationArguments
    run: RunArguments
    training: TrainingArguments

    @classmethod
    def parse(cls, command: Sequence[str]) -> "ClassificationJob":
        """Reads a recipe, if the first word names one, and arguments.

        Raises:
            ValueError: An argument or a field of the recipe is not known or not allowed.
        """
        return cls(*parse_arguments(ARGUMENT_GROUPS, command))

    def check(self) -> None:
        """Makes what needs no data, so that what is wrong with it is told before any is read.

        Raises:
            ValueError, FileNotFoundError: As `make_config`, `check_loss` and `make_image_processor`.
        """
        digits = self.data.is_digits
        self.config: PreTrainedConfig = make_config(self.model, self.dropkey, digits=digits)
        self.augmentation: Augmentation = self.augmentation_arguments.augmentation(
            image_size(self.config), digits=digits
        )
        check_loss(self.config, label_smoothing=self.training.label_smoothing_factor)
        self.processor: BaseImageProcessor = make_image_processor(self.config, self.model, digits=digits)
        self.callbacks = self.ramp.callbacks()

    def told(self) -> dict[str, Any]:
        """What decides about the trained weights, by name: values as JSON holds them, paths by last part and contents."""
        groups = (self.model, self.dropkey, self.ramp, self.data, self.augmentation_arguments)
        values = {name: value for group in groups for name, value in asdict(group).items()}
        # a release of Transformers need not have all
        values |= {name: getattr(self.training, name, None) for name in DECISIVE}
        values["on_nonfinite_loss"] = self.run.on_nonfinite_loss
        values = {name: str(getattr(value, "value", value)) for name, value in values.items()}
        for name in ("train_file", "validation_file", "train_dir", "validation_dir"):
            if self.data.hold_out_validation and name.startswith("validation"):
                # other images than those of the training rows are not looked at
                del values[name]
                continue
            values[f"{name}_contents"], values[name] = _contents(values[name]), Path(values[name]).name
        return values

    def trainer(self, data: ImageData) -> GuardedTrainer:
        """The seeded model and its `Trainer`, for a checked job whose configuration has the classes of the data."""
        set_seed(self.training.seed)
        model = make_model(self.config, self.model)
        seed = self.training.seed if self.training.data_seed is None else self.training.data_seed
        transform = transform_rows(data, self.processor, self.config, self.augmentation, seed=seed)
        # the transform reads columns that the model does not take
        self.training.remove_unused_columns = False
        # nothing to pin for, and every data loader would warn
        self.training.dataloader_pin_memory &= torch.accelerator.is_available()
        return GuardedTrainer(
            model=model,
            args=self.training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=self.processor,
            data_collator=collate_images,
            compute_metrics=classification_metrics,
            callbacks=[AugmentationEpoch(transform), *self.callbacks],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
        )
