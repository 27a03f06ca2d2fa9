"""The project's `Trainer`: guards against what goes wrong in a run, different masks on each process, whole checkpoints."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.trainer import HubTrainer
from .callbacks import DropKeySeedCallback
from .finetune import split_groups
from .guards import LossGuard, check_engine, named_save, note_where_to_resume
from .lora import merged
from .record import RunRecord, loss_of_process, run_settings
from .samples import IdCollator, NumberedRows, masks_of


logger = logging.getLogger(__name__)

# a release that calls them otherwise would log other averages and times after a resume, without a word
for _replaced in ("_finalize_training", "_run_epoch", "_save_checkpoint"):
    if not hasattr(Trainer, _replaced):
        raise ImportError(
            f"Trainer of Transformers {transformers.__version__} has no {_replaced}, which GuardedTrainer needs. Use a "
            "release that hf_dropkey is tested with (constraints.txt)"
        )


class SkipStep(TrainerCallback):
    """Takes away the gradients of a step that is to be skipped."""

    def __init__(self, guard: LossGuard) -> None:
        """`guard` is the one that looks at the losses."""
        self.guard = guard

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without gradients an optimiser changes neither weights nor its own state."""
        # with fp16 the scaler skips the step itself, and misses gradients that are gone
        if self.guard.end_step() and not args.fp16:
            kwargs["model"].zero_grad(set_to_none=True)


class MaskEpoch(TrainerCallback):
    """Tells the trainer the epoch, which masks by sample depend on."""

    def __init__(self, trainer: "GuardedTrainer") -> None:
        """`trainer` is the one whose epochs are counted."""
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also runs in the middle of an epoch after a resume."""
        self.trainer.mask_epoch = int(state.epoch or 0)


class TakeUp(TrainerCallback):
    """Lets a resumed run go on with the averages and times of the checkpoint, which `Trainer` begins anew."""

    def __init__(self, trainer: "GuardedTrainer") -> None:
        """`trainer` is the one whose run is resumed."""
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads what the checkpoint keeps, before this run's own record takes its place."""
        callbacks: Any = state.stateful_callbacks
        found = callbacks.get("RunRecord") if state.global_step else None
        self.trainer.take_up(found.get("attributes", {}) if isinstance(found, dict) else {})


class GuardedTrainer(HubTrainer):
    """`HubTrainer` that names what goes wrong, writes whole checkpoints, and lets processes drop different keys.

    `Trainer` shows the mean of the other losses for one that is NaN, and has all processes draw the same masks. After a
    resume it averages losses and counts seconds from there, and takes a step too many if there is none left.
    """

    def __init__(
        self,
        *args: Any,
        on_nonfinite_loss: str = "stop",
        merge_adapter: bool = False,
        learning_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `Trainer`, with three arguments more.

        Args:
            args: As `Trainer`.
            on_nonfinite_loss: "stop" or "skip".
            merge_adapter: Makes a trained adapter a plain model at the end.
            learning_rates: Factors on the learning rate, by the name of the parameter; 1 for those that are left out.
            kwargs: As `Trainer`.
        """
        self.merge_adapter = merge_adapter
        self.learning_rates = dict(learning_rates or {})
        self.loss_guard = LossGuard(on_nonfinite_loss)
        self._begun, self._seconds_before = time.time(), 0.0
        self.mask_epoch = 0
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator, os.environ)
        record = RunRecord(run_settings(self.args))
        for callback in (DropKeySeedCallback(), TakeUp(self), record, SkipStep(self.loss_guard)):
            self.add_callback(callback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, with the learning rates of the parameters."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made and self.learning_rates:
            trained: Any = self.model if model is None else model
            split_groups(optimizer, trained, self.learning_rates)
        return optimizer

    @property
    def record(self) -> RunRecord:
        """What the run keeps of itself in checkpoints."""
        # `Trainer` may have put another one in its place, from a checkpoint
        return next(one for one in self.callback_handler.callbacks if isinstance(one, RunRecord))

    def take_up(self, kept: dict[str, Any]) -> None:
        """Goes on with sums and seconds that a checkpoint has kept; `Trainer` has set its own to 0.

        Raises:
            ValueError: The checkpoint is of a step after the last one of this run.
        """
        step, last = self.state.global_step, self.state.max_steps
        if step > last:
            raise ValueError(
                f"the checkpoint is of step {step}, and this run ends at step {last}; raise --max_steps or "
                "--num_train_epochs, or resume from an earlier checkpoint"
            )
        self._begun, self._seconds_before = time.time(), 0.0
        if not step:
            return
        resumed = kept.get("resumed", [])
        self.record.resumed = [*(resumed if isinstance(resumed, list) else []), step]
        progress = kept.get("progress") or {}
        if not progress:
            return
        self._tr_loss += loss_of_process(progress["losses"], self.args.process_index, self.args.world_size)
        self._total_loss_scalar = progress["logged_losses"]
        self._globalstep_last_logged = progress["logged_step"]
        # in 5.23 and later the steps before are else left out of the averages
        self._initial_global_step = 0
        self._seconds_before = progress["seconds"]

    def progress(self) -> dict[str, Any]:
        """Sums of losses and seconds since step 0; call it on every process."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1))
        return {
            "losses": losses.tolist(),
            "logged_losses": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._begun,
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # `Trainer` looks only after a step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; an error says which checkpoint to go on from."""
        with note_where_to_resume(Path(str(self.args.output_dir))):
            output = super().train(*args, **kwargs)
        if self.merge_adapter:
            # what is evaluated and saved from now on; checkpoints hold the adapter
            self.model = self.model_wrapped = merged(self.accelerator.unwrap_model(self.model))
        return output

    def mask_by_sample(self) -> None:
        """Makes masks depend on the rows of the data set, not on their places in a batch (`models/sample_masks.py`)."""
        data: Any = self.train_dataset
        self.train_dataset = data and NumberedRows(data)
        self.data_collator = IdCollator(self.data_collator)
        self.add_callback(MaskEpoch(self))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`, with a look at the loss.

        Raises:
            FloatingPointError: As `LossGuard.look_at`.
        """
        with masks_of(inputs, epoch=self.mask_epoch, seed=self.args.seed):
            loss = super().training_step(model, inputs, *args, **kwargs)
        losses = self.accelerator.gather(loss.reshape(1))
        self.loss_guard.look_at(losses.tolist(), step=self.state.global_step + 1)
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, with every image once in the loss too.

        `Trainer` (5.23) takes the mean over batches, and the last one repeats images so that all processes have as many.
        """
        output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for name in [name for name in metrics if name.endswith("_nll")]:
            if self.args.world_size > 1 and not self.args.label_smoothing_factor:
                metrics[name.replace("_nll", "_loss")] = metrics[name]
        return output

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.record.progress, self.record.folder = self.progress(), folder
        with named_save(folder):
            if self.is_fsdp_enabled and self.args.should_save:
                # beside the parts of the weights, of which `Trainer` saves nothing else
                self.accelerator.unwrap_model(self.model).config.save_pretrained(folder)
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; the model of the whole run is whole too where processes share the weights (FSDP).

        `Trainer` (5.23) saves nothing then, unless the configuration says FULL_STATE_DICT.
        """
        shared = self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if shared and output_dir in (None, self.args.output_dir):
            self._save(str(self.args.output_dir), state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the first process goes on to the file that says that all is there, and to deleting older checkpoints
        self.accelerator.wait_for_everyone()
