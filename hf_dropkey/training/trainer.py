"""The project's `Trainer`: guards against what goes wrong in a run, different masks on each process, whole checkpoints."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.trainer import HubTrainer
from .callbacks import DropKeySeedCallback
from .checkpoints import RunRecord, run_settings
from .guards import LossGuard, check_engine, named_save, note_where_to_resume


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


class GuardedTrainer(HubTrainer):
    """`HubTrainer` that names what goes wrong, writes whole checkpoints, and lets processes drop different keys.

    `Trainer` shows the mean of the other losses for one that is NaN, and has all processes draw the same masks.
    """

    def __init__(self, *args: Any, on_nonfinite_loss: str = "stop", **kwargs: Any) -> None:
        """As `Trainer`; `on_nonfinite_loss` is "stop" or "skip"."""
        self.loss_guard = LossGuard(on_nonfinite_loss)
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator, os.environ)
        for callback in (DropKeySeedCallback(), RunRecord(run_settings(self.args)), SkipStep(self.loss_guard)):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; an error says which checkpoint to go on from."""
        with note_where_to_resume(Path(str(self.args.output_dir))):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`, with a look at the loss.

        Raises:
            FloatingPointError: As `LossGuard.look_at`.
        """
        loss = super().training_step(*args, **kwargs)
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
