"""A training job for image classification: from its arguments to the model and the `Trainer`.

`scripts/train_image_classification.py` and `lab/grids.py` both use it, so that a cell of a grid is the run that its
command names.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..images.augmentation import Augmentation, AugmentationEpoch
from ..images.mixing import Mixing, MixingCollator, mixed_loss
from ..images.sources import is_local
from ..images.tables import matching_files
from ..pages.observed import Observed
from ..saved import check_attention, quiet_loading
from ..training.arguments import RampArguments, RunArguments
from ..training.defaults import STARTS, default_words, start_of
from ..training.finetune import FineTuningArguments, freeze, learning_rates
from ..training.job import TrainingJob, public_name
from ..training.lora import LoraArguments, add_lora
from ..training.record import Fingerprint
from ..training.trainer import GuardedTrainer
from .arguments import AugmentationArguments, ClassificationDropKeyArguments, DataArguments, ModelArguments
from .data import ImageData, load_image_data
from .metrics import classification_metrics
from .mistakes import KeptPredictions, save_predictions
from .model import check_loss, fit_classes, is_native, made_size, make_config, make_image_processor, make_model
from .pretrained import add_drop_path, add_patch_dropout, head_modules, pretrained_model
from .transform import ImageTransform, collate_images, transform_rows
from .uncertainty import MeasuringArguments, save_uncertainty


logger = logging.getLogger(__name__)

Collator = Callable[[Any], dict[str, torch.Tensor]]


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
    files = matching_files(pattern)
    for file in files:
        with Path(file).open("rb") as data:
            found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()[:16] if files else ""


@dataclass
class ClassificationJob(TrainingJob[ImageData]):
    """A training job for image classification.

    Attributes:
        config: The configuration; without the classes until the data is loaded.
        size: Height and width of the images that the model gets, in pixels.
        augmentation: How training images vary.
        mixing: How the images of a batch are mixed.
        processor: The image processor.
        new_modules: Names of the modules of the model with new weights, the classifier among them.
    """

    TASK = "image-classification"

    model: ModelArguments
    dropkey: ClassificationDropKeyArguments
    ramp: RampArguments
    data: DataArguments
    augmentation_arguments: AugmentationArguments
    fine_tuning: FineTuningArguments
    lora: LoraArguments
    measuring: MeasuringArguments
    run: RunArguments
    training: TrainingArguments

    @classmethod
    def defaults(cls, command: Sequence[str]) -> list[str]:
        """Defaults by kind of start, for a command without a recipe."""
        return default_words(command)

    def begin(self) -> None:
        """As `TrainingJob.begin`, with the defaults in the log."""
        super().begin()
        if self.added:
            kind = STARTS[start_of(self.start_words())]
            logger.info("defaults for %s, where the command says nothing: %s", kind, " ".join(self.added))

    def start_words(self) -> list[str]:
        """The arguments that decide about the kind of start."""
        source, rank = self.model.model_name_or_path, self.lora.lora_r
        return [*(["--model_name_or_path"] if source else []), *(["--lora_r"] if rank else [])]

    def check(self) -> None:
        """Makes configuration, augmentation and image processor.

        Raises:
            ValueError, FileNotFoundError: As `make_config`, `check_loss` and `make_image_processor`.
        """
        check_attention(self.model.attn_implementation)
        self.measuring.check(self.training)
        digits = self.data.is_digits
        self.fine_tuning.check(source=self.model.model_name_or_path, lora=self.lora.lora_r is not None)
        self.lora.check(source=self.model.model_name_or_path, trains=self.training.do_train)
        self.config: PreTrainedConfig = make_config(self.model, self.dropkey, digits=digits)
        self.mixing: Mixing = self.augmentation_arguments.mixing()
        check_loss(self.config, label_smoothing=self.training.label_smoothing_factor, mixes=bool(self.mixing))
        self.processor: BaseImageProcessor = make_image_processor(self.config, self.model, digits=digits)
        made: Any = made_size(self.processor)
        self.size: tuple[int, int] = made
        self.augmentation: Augmentation = self.augmentation_arguments.augmentation(made, digits=digits)
        self.callbacks = self.ramp.callbacks()
        self.new_modules: list[str] = []
        self.kept = KeptPredictions(classification_metrics)

    def load(self) -> ImageData:
        """The images; the configuration gets their classes."""
        data = load_image_data(self.data, training=self.training.do_train)
        return fit_classes(data, self.config, self.model)

    def make_model(self, data: ImageData) -> PreTrainedModel:
        """The model, with pretrained weights or new ones; with `--lora_r` a `PeftModel` around it."""
        # what is new or resized is in our own log
        with quiet_loading():
            if is_native(self.config):
                model = make_model(self.config, self.model)
                new = head_modules(model)
            else:
                model, new = pretrained_model(self.config, self.model, self.dropkey, self.size)
        self.new_modules = new
        freeze(model, self.fine_tuning.freeze_layers, new)
        if self.lora.lora_r is not None:
            source, revision = str(self.model.model_name_or_path), self.model.revision
            model = add_lora(model, self.lora, source=source, revision=revision, trained=new)
        # behind adapters, whose outputs are parts of the branches
        add_drop_path(model, self.model.drop_path_rate)
        add_patch_dropout(model, self.model.patch_dropout)
        return model

    def make_trainer(self, model: PreTrainedModel, data: ImageData) -> GuardedTrainer:
        """The `Trainer`; the data sets give tensors from now on."""
        transform = self.transform(data)
        return GuardedTrainer(
            model=model,
            args=self.training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=self.processor,
            data_collator=self.collator(data, transform),
            compute_loss_func=self.loss(),
            compute_metrics=self.kept,
            callbacks=[AugmentationEpoch(transform), *self.callbacks],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
            merge_adapter=self.lora.merge_adapter,
            learning_rates=self.rates(model),
        )

    def transform(self, data: ImageData) -> ImageTransform:
        """Makes the data sets give tensors from now on; returns the transform of the training rows."""
        return transform_rows(
            data, self.processor, self.config, self.augmentation, seed=self.data_seed, with_rows=bool(self.mixing)
        )

    def collator(self, data: ImageData, transform: ImageTransform) -> Collator:
        """Makes batches of rows, those of training mixed if that is asked for."""
        if not self.mixing:
            return collate_images
        classes = len(data.label_names)
        return MixingCollator(collate_images, self.mixing, classes=classes, transform=transform, seed=self.data_seed)

    def rates(self, model: PreTrainedModel) -> dict[str, float]:
        """Factors on the learning rate by parameter; empty if all are 1."""
        return learning_rates(model, self.fine_tuning, self.new_modules, float(self.training.learning_rate))

    def loss(self) -> Callable[..., Any] | None:
        """The loss in place of the model's own; None for that."""
        return partial(mixed_loss, label_smoothing=self.training.label_smoothing_factor) if self.mixing else None

    def fixed(self) -> dict[str, Any]:
        """Which layers are trained and how fast, and how images are mixed, erased and augmented."""
        augmentation = self.augmentation_arguments
        names = ("augment", "random_erasing", "mixup", "cutmix", "mixing_probability")
        return {**asdict(self.fine_tuning), **{name: getattr(augmentation, name) or 0 for name in names}}

    def draw(self, trainer: GuardedTrainer, data: ImageData) -> None:
        """Writes how uncertain the model is on evaluation images, if that was requested."""
        if self.measuring.uncertainty and trainer.is_world_process_zero():
            self.output.mkdir(parents=True, exist_ok=True)
            save_uncertainty(self.output, trainer, data)

    def observe(self, trainer: GuardedTrainer, data: ImageData) -> Observed:
        """As `TrainingJob.observe`, with every prediction of the last evaluation and pictures of the worst mistakes."""
        mistakes = save_predictions(self.output, self.kept, data)
        classes = data.label_names if self.kept.kept is not None else []
        return replace(super().observe(trainer, data), classes=classes, mistakes=mistakes)

    def fingerprint(self, data: ImageData) -> Fingerprint:
        """Rows and hashes of names, labels and sizes of each split."""
        return data.fingerprint()

    def describe(self, data: ImageData) -> None:
        """Logs the number of classes and of images."""
        logger.info("%d classes", len(data.label_names))
        logger.info("evaluation on %s: %d images", data.evaluation_split, len(data.evaluation))

    def card(self, data: ImageData) -> dict[str, Any]:
        """Data set, what was evaluated on, and starting point."""
        separate = self.data.evaluation_name
        return {
            "tags": ["vision"],
            "dataset": self.data.name,
            "dataset_tags": self.dataset_id,
            "dataset_split": None if separate else data.evaluation_split,
            "evaluation_dataset": separate,
            "finetuned_from": public_name(self.model.model_name_or_path),
        }

    @property
    def dataset_id(self) -> str | None:
        """The data set's id on the Hub; None for others."""
        name = self.data.dataset_name
        return None if self.data.is_digits or name != self.data.name or is_local(name) else name

    def settings(self) -> dict[str, str]:
        """All settings that determine the trained weights, as JSON values; data files by name and content hash."""
        groups: list[Any] = [self.model, self.dropkey, self.ramp, self.data, self.augmentation_arguments]
        groups += [self.fine_tuning, self.lora]
        values = {name: str(value) for group in groups for name, value in asdict(group).items()}
        values |= super().settings()
        for name in ("train_file", "validation_file", "train_dir", "validation_dir"):
            if self.data.hold_out_validation and name.startswith("validation"):
                # images outside of the training split are not used
                del values[name]
                continue
            values[f"{name}_contents"], values[name] = _contents(values[name]), Path(values[name]).name
        return values
