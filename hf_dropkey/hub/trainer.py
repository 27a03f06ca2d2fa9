"""`HubTrainer`: a `Trainer` whose pushes are complete and hold nothing private.

Stock `Trainer` (Transformers 5.23) uploads `training_args.bin` at every push, a pickle that holds the token; pushes in
training have `auto_map` without the code it names; optimizer states go with `hub_strategy` "checkpoint" and
"all_checkpoints"; and it replaces the card. Its list of files that are not uploaded is fixed inside two methods, out
of reach of callbacks, so these two are replaced, and the two that make the repository and the card.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..extras import needed
from ..patching.adapters import is_adapted, save_adapter_settings
from ..patching.apply import warn_if_forgotten
from ..patching.drop_path import DROP_PATH
from ..patching.patch_dropout import PATCH_DROPOUT
from .cards import README, RunFacts, is_hub_id, read_readme, write_card
from .push import PushResult, api, check_target, prepare_repository, push_folder
from .push_plan import chosen


with needed("train"):
    import accelerate


logger = logging.get_logger(__name__)

STAGE = "_push-"
RECORDED = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "optim",
    "label_smoothing_factor",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "world_size",
)
# a release with other names for these would push as stock `Trainer` does
for _replaced in (
    "_save",
    "_push_from_checkpoint",
    "_finish_current_push",
    "init_hf_repo",
    "push_to_hub",
    "create_model_card",
):
    if not hasattr(Trainer, _replaced):
        raise ImportError(
            f"Trainer of Transformers {transformers.__version__} has no {_replaced}, so it would push without HubTrainer. "
            "Use a release that hf_dropkey is tested with (constraints.txt)"
        )


def check_training_arguments(training: TrainingArguments) -> None:
    """Raises ValueError for a token among the arguments, a bad name on the Hub, or if there is nothing to do.

    Raises PermissionError if the run is to be pushed and no token is set.
    """
    if training.hub_token is not None:
        raise ValueError(
            "--hub_token would be saved in training_args.bin as plain text; "
            "log in with `hf auth login` or set the environment variable HF_TOKEN"
        )
    if not (training.do_train or training.do_eval):
        raise ValueError("nothing to do; pass --do_train, --do_eval or both")
    if training.push_to_hub:
        check_target(training.hub_model_id or output_folder(training).absolute().name, revision=training.hub_revision)


def output_folder(training: TrainingArguments) -> Path:
    """The folder of the run."""
    return Path(str(training.output_dir))


@contextmanager
def completed_adapter(model: Any, folder: Path, *, writes: bool = True) -> Iterator[None]:
    """Completes an adapter that is saved inside the block: its DropKey settings, and no empty template of PEFT's as a card.

    Args:
        model: The model that is saved; one without adapters is left to itself.
        folder: Where to.
        writes: Whether this process is the one that writes.
    """
    if not is_adapted(model):
        yield
        return
    card = read_readme(folder)
    yield
    if not writes:
        return
    save_adapter_settings(model, folder)
    if card is None:
        (folder / README).unlink(missing_ok=True)
    else:
        (folder / README).write_bytes(card.encode())


class HubTrainer(Trainer):
    """`Trainer`, with pushes through `push_folder`: code beside `auto_map`, no pickles, one commit, the card merged.

    Every `hub_strategy` is followed. "checkpoint" and "all_checkpoints" upload weights, configuration, code, image
    processor and trainer state of the checkpoint, for others to load (`subfolder="last-checkpoint"`) or to start from.
    Optimizer, learning rate schedule and random states are not uploaded, so `resume_from_checkpoint` needs the run's
    own folder. A failed push during training is logged and does not stop it; the last one raises.
    """

    hub_model_id: Any
    push_in_progress: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; warns if the model's configuration has DropKey, drop path or patch dropout that nothing follows."""
        model = self.accelerator.unwrap_model(self.model)
        warn_if_forgotten(model)
        DROP_PATH.warn_if_forgotten(model)
        PATCH_DROPOUT.warn_if_forgotten(model)
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As `Trainer`; an adapter is saved with its DropKey settings, and without PEFT's empty template of a card."""
        folder = Path(output_dir or str(self.args.output_dir))
        with completed_adapter(self.accelerator.unwrap_model(self.model), folder, writes=self.args.should_save):
            super()._save(output_dir, state_dict)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository and the branch, or raises as `prepare_repository` before any training."""
        if not self.is_world_process_zero():
            return
        output = self._output()
        for stage in output.glob(f"{STAGE}*"):
            # of a run that was killed in the middle of a push
            shutil.rmtree(stage)
        self.hub_model_id = prepare_repository(
            self.args.hub_model_id or output.absolute().name,
            revision=self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            token=self.args.hub_token if token is None else token,
        )
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Starts the upload of a checkpoint in the background."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        busy = running is not None and not running.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        under = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        stage = self._stage(Path(checkpoint_folder))
        push = partial(
            self._push, commit_message=f"Training in progress, {when}", copy_under=under.get(HubStrategy(strategy))
        )
        job = api.run_as_future(_push_and_clear, push, stage)
        job.add_done_callback(partial(_log_failure, when))
        if busy:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # it takes a list

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves and pushes the model with its card. Keyword arguments are those of `create_model_card`.

        Returns:
            The commit, a `CommitInfo`; with `blocking=False` its future; None on other processes than the first.

        Raises:
            ValueError, PermissionError, ConnectionError: As `push_folder`. The saved folder is whole.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        # on all processes, as they may each hold a part of the weights
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = partial(self._push, self._output(), commit_message=commit_message or "End of training", token=token)
        if revision is not None:
            push = partial(push, revision=revision)
        return push().info if blocking else api.run_as_future(lambda: push().info)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        dataset_split: str | None = None,
        evaluation_dataset: str | None = None,
        command: str | None = None,
    ) -> None:
        """Writes the facts of the run to `run_facts.json`, and the card to `README.md`, whose hand-written parts stay.

        As `Trainer.create_model_card`; `dataset_tags` are ids on the Hub; `model_name` and `dataset_args` are unused.
        """
        if not self.is_world_process_zero():
            return
        folder = self._output()
        model: Any = self.accelerator.unwrap_model(self.model)
        if is_adapted(model):
            model = model.get_base_model()
        if not isinstance(model, PreTrainedModel):
            # `Trainer`'s own card
            if not (folder / README).exists():
                super().create_model_card(
                    language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset
                )
            return
        loaded = str(getattr(model.config, "_name_or_path", ""))
        source = finetuned_from or (loaded if is_hub_id(loaded) and not Path(loaded).exists() else None)
        facts = self._facts(
            dataset=_first(dataset) or _first(dataset_tags),
            dataset_id=_first(dataset_tags),
            dataset_split=dataset_split,
            evaluation_dataset=evaluation_dataset,
            base_model=source,
            from_scratch=not (source or loaded),
            license=license,
            language=language,
            pipeline_tag=_first(tasks),
            command=command,
            tags=[*_list(tags), *(getattr(model, "model_tags", None) or [])],
        )
        write_card(folder, repo_id=self.hub_model_id, facts=facts)

    def _facts(self, **new: Any) -> RunFacts:
        """The new facts, those recorded before, and the settings that are needed to train the same way."""
        args = self.args
        length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        values = {name: getattr(args, name) for name in (length, *RECORDED)}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        return replace(
            RunFacts.load(self._output()),
            hyperparameters={name: value for name, value in values.items() if value not in (None, False)},
            versions={module.__name__: module.__version__ for module in (transformers, torch, accelerate)},
            **{name: value for name, value in new.items() if value},
        )

    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def _stage(self, checkpoint: Path) -> Path:
        """A folder with what a push needs of a checkpoint, which may be deleted before the upload has ended."""
        output = self._output()
        output.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=output))
        for entry in chosen(checkpoint)[0]:
            staged = stage / entry.name
            staged.parent.mkdir(parents=True, exist_ok=True)
            if entry.leaves:
                # stays a link, so that the push refuses it
                staged.symlink_to(entry.leaves)
                continue
            try:
                os.link(entry.path, staged)
            except OSError:
                # a file system without hard links
                shutil.copyfile(entry.path, staged)
        self._facts().save(stage)
        return stage

    def _push(self, folder: Path, **kwargs: Any) -> PushResult:
        passed = {name: value for name, value in kwargs.items() if value is not None}
        settings = {"token": self.args.hub_token, "revision": self.args.hub_revision, **passed}
        # the repository already exists, so that `private` has no effect any more
        return push_folder(folder, str(self.hub_model_id), **settings)


def _push_and_clear(push: Any, stage: Path) -> PushResult:
    try:
        result: PushResult = push(stage)
        return result
    finally:
        shutil.rmtree(stage)


def _log_failure(when: str, job: Future) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(f"the push of {when} failed; training continues, and the next push has everything: {error}")


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _first(value: str | list[str] | None) -> str | None:
    return next(iter(_list(value)), None)
