"""One training job: from a command line to a trained, evaluated, described and shared model.

What every task does stands here once, in the order in which it happens. A task is a subclass that says which arguments
it takes and how they become data, a model and a `Trainer`.
"""

import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, get_type_hints

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..hub.cards import shown_command
from ..hub.trainer import check_training_arguments, output_folder
from ..images.folders import check_writable
from ..pages.observed import Observed
from ..patching.adapters import is_adapted
from ..patching.sites import transformers_model
from ..saved import config_file
from .arguments import RunArguments, parse_arguments
from .checkpoints import check_same_model, check_same_settings, prepare_output_folder
from .guards import check_devices
from .lock import forget_complete, is_complete, locked_output, write_complete
from .observe import observed_drops
from .record import Fingerprint, run_settings, tell_changes
from .trainer import GuardedTrainer


logger = logging.getLogger(__name__)

Data = TypeVar("Data")

# clients that log a line for every request; the second is of newer releases of huggingface_hub
CHATTY = ("httpx", "httpx2")
# arguments of `Trainer` that do not change the trained weights: where things go, what is shown and shared, how many
# workers read. all others do, those of later releases of Transformers too
INDIFFERENT = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_timeout",
        "disable_tqdm",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "output_dir",
        "project",
        "push_to_hub",
        "report_to",
        "resume_from_checkpoint",
        "run_name",
        "save_on_each_node",
        "save_total_limit",
        "skip_memory_metrics",
        "trackio_space_id",
    }
)
# with these a run that is complete goes on: what for
CONTINUES = {
    "num_train_epochs": "longer with --num_train_epochs or --max_steps",
    "max_steps": "longer with --num_train_epochs or --max_steps",
    "do_eval": "evaluated with --do_eval",
    "uncertainty": "measured with --uncertainty",
    "push_to_hub": "shared with --push_to_hub",
}


class TrainingJob(ABC, Generic[Data]):
    """A task's arguments, one object for each group, and what becomes of them.

    A subclass is a dataclass with a field for each group of arguments, in the order of `--help`; the two below are
    among them. Its methods are called in this order: `check`, `load`, `make_model`, `describe`, `make_trainer`, then
    training and evaluation, then `draw` and `card`.

    Attributes:
        TASK: The Hub's name of the task.
        run: What happens to the output folder and when training goes wrong.
        training: The arguments of `Trainer`.
    """

    TASK: ClassVar[str]
    run: RunArguments
    training: TrainingArguments
    # what `defaults` has added to the command
    added: tuple[str, ...] = ()

    @classmethod
    def parse(cls, command: Sequence[str]) -> Self:
        """Reads a recipe, if the first word names one, and arguments.

        Raises:
            ValueError: An argument or a field of the recipe is unknown or not allowed.
        """
        groups = get_type_hints(cls)
        made: Any = cls
        added = cls.defaults(command)
        job: Self = made(*parse_arguments([groups[group.name] for group in fields(made)], [*command, *added]))
        job.added = tuple(added)
        return job

    @classmethod
    def defaults(cls, command: Sequence[str]) -> list[str]:
        """Words to add to a command that does not say everything; none unless a task has such defaults."""
        return []

    @abstractmethod
    def check(self) -> None:
        """Makes what needs no data, the cheapest first, so that mistakes are found before any data is read."""

    @abstractmethod
    def load(self) -> Data:
        """The data, with the classes of the model; called on one process first."""

    @abstractmethod
    def make_model(self, data: Data) -> PreTrainedModel:
        """The model for the data; the generators are seeded."""

    @abstractmethod
    def make_trainer(self, model: PreTrainedModel, data: Data) -> GuardedTrainer:
        """The `Trainer` of the model on the data."""

    @abstractmethod
    def describe(self, data: Data) -> None:
        """Logs what the run trains and evaluates on."""

    @abstractmethod
    def card(self, data: Data) -> dict[str, Any]:
        """The facts of the task for the model card: arguments of `HubTrainer.create_model_card`."""

    def fingerprint(self, data: Data) -> Fingerprint:
        """Rows and hashes of labels, names and sizes of each split, by which a resumed run notices other data."""
        return {}

    def fixed(self) -> dict[str, Any]:
        """Settings of the task, as JSON values, that a resumed run must share with its checkpoint; none unless a task has some."""
        return {}

    def draw(self, trainer: GuardedTrainer, data: Data) -> None:
        """Draws figures into the output folder, and measures what is no metric; nothing unless a task does."""

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return output_folder(self.training)

    @property
    def data_seed(self) -> int:
        """The seed of the order of images and of augmentation."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    def begin(self) -> None:
        """Sets up logging, and makes every check that needs no data.

        Raises:
            ValueError, OSError: As `check` and `check_writable`.
        """
        logging.basicConfig(
            format="%(levelname)s %(message)s", level=logging.INFO if self.training.should_log else logging.WARNING
        )
        for client in CHATTY:
            logging.getLogger(client).setLevel(logging.WARNING)
        self.check_training_arguments()
        self.check()
        check_writable(self.output, "--output_dir")

    def complete(self) -> bool:
        """Whether the run in the output folder is complete and is to be resumed: nothing is left to do, as the log says.

        Raises:
            ValueError: It is complete, and had other settings.
        """
        resume = str(self.training.resume_from_checkpoint or "false").lower()
        if not self.training.do_train or resume not in ("true", "auto"):
            return False
        done = is_complete(self.output, self.asked(), may_change=CONTINUES)
        if done:
            logger.info(
                "the run in %s is complete, nothing is left to do. Train it further with a larger --num_train_epochs or "
                "--max_steps, or start another run in another --output_dir.",
                self.output,
            )
        return done

    def prepare_output(self) -> Path | None:
        """Prepares the output folder, which is locked, for this run.

        Returns:
            The checkpoint to resume from; None for a new run.

        Raises:
            ValueError, OSError: As `prepare_output_folder`.
        """
        if not self.training.do_train:
            return None
        # one process renames and deletes, and the others find it done
        with self.training.main_process_first(self.training.save_on_each_node, desc="preparing the output folder"):
            checkpoint = prepare_output_folder(
                self.output, resume=self.training.resume_from_checkpoint, overwrite=self.run.overwrite_output_dir
            )
        forget_complete(self.output)
        if checkpoint is not None:
            logger.info("going on from %s", checkpoint)
        return checkpoint

    def check_training_arguments(self) -> None:
        """Raises ValueError or PermissionError for arguments of `Trainer` that this job does not allow."""
        check_training_arguments(self.training)

    def prepare(self, checkpoint: Path | None) -> tuple[PreTrainedModel, Data]:
        """The seeded model and the data; a checkpoint of another model is refused, one of other settings reported.

        Raises:
            ValueError: The data cannot be used, or the checkpoint is of another model.
        """
        with self.training.main_process_first(desc="loading the data"):
            data = self.load()
        set_seed(self.training.seed)
        model = self.make_model(data)
        if checkpoint is not None:
            adapters: Any = getattr(model, "peft_config", {}) if is_adapted(model) else {}
            check_same_model(transformers_model(model).config, checkpoint, next(iter(adapters.values()), None))
            check_same_settings(self.fixed(), checkpoint)
            if self.training.should_log:
                tell_changes(checkpoint, run_settings(self.training), self.fingerprint(data))
        # before the first of the processes trains, so that the others find it built
        with self.training.main_process_first(desc="compiling masks"):
            self.run.start_fast_masks()
        logger.info("%d parameters", model.num_parameters())
        self.describe(data)
        return model, data

    def trainer(self, model: PreTrainedModel, data: Data) -> GuardedTrainer:
        """As `make_trainer`, with what the arguments of `Trainer` need for data sets that make their own tensors."""
        # the transforms read columns that the model does not take
        self.training.remove_unused_columns = False
        # without an accelerator there is nothing to pin for, and every data loader would warn
        self.training.dataloader_pin_memory &= torch.accelerator.is_available()
        # before the data sets give tensors; one process writes checkpoints
        kept = self.fingerprint(data) if self.training.do_train and self.training.should_save else {}
        trainer = self.make_trainer(model, data)
        trainer.record.data = {split: dict(parts) for split, parts in kept.items()}
        trainer.record.settings["fixed"] = self.fixed()
        if self.run.masks_by_sample:
            trainer.mask_by_sample()
        return trainer

    def settings(self) -> dict[str, str]:
        """The arguments of `Trainer` and of the run that determine the trained weights, by name."""
        values = {
            entry.name: getattr(self.training, entry.name)
            for entry in fields(self.training)
            if entry.init and entry.name not in INDIFFERENT
        }
        values["on_nonfinite_loss"] = self.run.on_nonfinite_loss
        values["world_size"] = self.training.world_size
        # named only where it is on, so that runs from before it existed are the same
        values |= {"masks_by_sample": True} if self.run.masks_by_sample else {}
        return {name: str(getattr(value, "value", value)) for name, value in values.items()}

    def asked(self) -> dict[str, str]:
        """All that the command asks for, by name, without what concerns one start of a run alone."""
        values = TrainingJob.settings(self)
        values["push_to_hub"] = str(self.training.push_to_hub)
        # the number of processes does not make another run
        del values["world_size"]
        own: Any = self
        groups = [getattr(self, entry.name) for entry in fields(own) if entry.name not in ("run", "training")]
        return values | {name: str(value) for group in groups for name, value in asdict(group).items()}

    def execute(self, command: Sequence[str]) -> None:
        """Runs the job from beginning to end, once; `command` is what the model card shows."""
        self.begin()
        # the folder of a complete run is not written to, not even by a lock
        if self.complete():
            return
        # before the trainer changes arguments to suit itself
        asked = self.asked()
        with locked_output(self.training):
            self.run_to_the_end(command)
            if self.training.do_train and self.training.should_save:
                write_complete(self.output, asked)

    def run_to_the_end(self, command: Sequence[str]) -> None:
        """Trains, evaluates, draws, describes and shares, in the locked output folder."""
        checkpoint = self.prepare_output()
        model, data = self.prepare(checkpoint)
        trainer = self.trainer(model, data)
        if self.training.do_train:
            train_and_save(trainer, checkpoint)
        if self.training.do_eval:
            evaluate_and_save(trainer)
        self.draw(trainer, data)
        write_card(trainer, {"tasks": self.TASK, "command": shown_command(command), **self.card(data)})
        if self.run.report and trainer.is_world_process_zero():
            self.write_page(trainer, data)

    def observe(self, trainer: GuardedTrainer, data: Data) -> Observed:
        """Measures, and writes beside the model, what `report.html` shows: what DropKey drops; more if a task does."""
        return Observed(*observed_drops(trainer))

    def write_page(self, trainer: GuardedTrainer, data: Data) -> None:
        """Writes `report.html`; a run whose page cannot be written is complete all the same, and the log says why."""
        # a run that only evaluates has no folder of a model
        if not config_file(self.output).is_file():
            return
        try:
            from ..pages.run import write_report

            self.observe(trainer, data).save(self.output)
            logger.info("the page about this run is %s", write_report(self.output))
        except (ImportError, ValueError) as error:
            logger.warning("report.html was not written: %s. Then run hf-dropkey report %s", error, self.output)

    @classmethod
    def main(cls, command: Sequence[str] | None = None) -> None:
        """Runs the job of some arguments, by default those of this process."""
        arguments = sys.argv[1:] if command is None else command
        check_devices(os.environ, arguments)
        cls.parse(arguments).execute(started_command())


class EvaluationJob(TrainingJob[Data]):
    """In front of a task's `TrainingJob` among the bases of a class: scores a saved model; nothing is trained.

    Attributes:
        NAME: The task's name in `hf-dropkey train --task`.
    """

    NAME: ClassVar[str]

    @classmethod
    def parse(cls, command: Sequence[str]) -> Self:
        """As `TrainingJob.parse`, for evaluation alone.

        Raises:
            ValueError: There is no model, or training was requested.
        """
        # a task's group of arguments `model` says where the model is
        job: Any = super().parse(command)
        if job.training.do_train:
            raise ValueError(f"--do_train is of hf-dropkey train --task {cls.NAME}; leave it out to measure a model")
        if not job.model.model_name_or_path:
            raise ValueError("give the model to measure with --model_name_or_path")
        job.training.do_eval = True
        evaluation: Self = job
        return evaluation


def started_command() -> list[str]:
    """The command line of this process, as a reader of the model card would start it: a script from a clone, hf-dropkey, or a module."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [*(["python", f"scripts/{program.name}"] if program.suffix == ".py" else [program.name]), *sys.argv[1:]]


def train_and_save(trainer: GuardedTrainer, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if there is one; saves model, image processor, metrics and trainer state."""
    model: Any = trainer.model
    metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", {**metrics, "parameters": model.num_parameters()})
    trainer.save_state()


def evaluate_and_save(trainer: GuardedTrainer) -> None:
    """Evaluates, prints and saves the metrics."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def write_card(trainer: GuardedTrainer, facts: dict[str, Any]) -> None:
    """Writes the model card beside the weights, and uploads everything if `--push_to_hub` is set."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**facts)
    elif config_file(output_folder(trainer.args)).is_file():
        # a run that only evaluates saves no model
        trainer.create_model_card(**facts)


def public_name(source: str | None) -> str | None:
    """The model that a run started from, as a card shows it: a local path is cut to its last part."""
    return Path(source).resolve().name if source is not None and Path(source).is_dir() else source
