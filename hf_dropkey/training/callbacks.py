"""DropKey over the steps of training: warm-up, other schedules, the alignment fine-tune, seeds of processes, logging.

Each aid is a plain function for one's own loop and a `TrainerCallback`. All of them are functions of the step alone, so
a resumed run goes on as if it had not stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..patching.adapters import ADAPTER_CONFIG, is_adapted, save_adapter_settings
from ..patching.apply import apply_dropkey, dropkey_modules, forgotten_ratio, warn_if_forgotten
from ..patching.drop_path import DROP_PATH, apply_drop_path
from ..patching.patch_dropout import PATCH_DROPOUT, apply_patch_dropout


# (step, total steps) -> factor on every ratio, in [0, 1]; step counts the finished optimiser steps
StepSchedule = Callable[[int, int], float]


def ratio_factor(step: int, total_steps: int, *, warmup: float = 0.0, alignment: float = 0.0) -> float:
    """The factor on all drop ratios at a step: a linear warm-up from 0, then 1, then 0 to the end.

    The paper's second alignment trains on without DropKey at the end, because it acts in training only.

    Args:
        step: Finished optimiser steps, from 0.
        total_steps: Optimiser steps of the whole training.
        warmup: Fraction of the steps over which the ratios grow to their values, [0, 1).
        alignment: Fraction of the steps, the last ones, without DropKey, [0, 1).

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: A fraction is outside [0, 1), or both together leave no step in between.
    """
    for name, value in (("warmup", warmup), ("alignment", alignment)):
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` is a fraction of the training and must lie in [0, 1), got {value!r}.")
    if warmup + alignment >= 1:
        raise ValueError(
            f"`warmup` ({warmup}) and `alignment` ({alignment}) must leave a part of the training: their sum has to be "
            "below 1."
        )
    warmup_steps = round(warmup * total_steps)
    if step >= total_steps - round(alignment * total_steps):
        return 0.0
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def scale_ratios(model: nn.Module, factor: float) -> None:
    """Sets every drop ratio of a model to `factor` times what it was before the first scaling.

    `scale_ratios(model, 1.0)` puts the ratios back exactly. `apply_dropkey` starts afresh.

    Raises:
        ValueError: The factor is outside [0, 1], or the model has no DropKey.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"A factor on drop ratios must lie in [0, 1], got {factor!r}.")
    modules = [module for _, module in dropkey_modules(model)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no DropKey. Call apply_dropkey(model, ratio=...) first.")
    for module in modules:
        base: Any = vars(module).get("dropkey_base_ratio", module.dropkey_ratio)
        if factor == 1:
            module.dropkey_ratio = base
            vars(module).pop("dropkey_base_ratio", None)
        else:
            module.dropkey_base_ratio = base
            module.dropkey_ratio = base * factor


def dropkey_log(model: nn.Module) -> dict[str, float]:
    """The largest, smallest and mean drop ratio of a model now, for a log."""
    ratios: list[Any] = [module.dropkey_ratio for _, module in dropkey_modules(model)]
    if not ratios:
        return {}
    return {
        "dropkey_ratio_max": max(ratios),
        "dropkey_ratio_min": min(ratios),
        "dropkey_ratio_mean": sum(ratios) / len(ratios),
    }


def seed_process(seed: int, process_index: int) -> None:
    """Seeds torch's generators so that each process of a distributed training drops other keys, reproducibly.

    Call it once before the first step, on every process, when not resuming: checkpoints hold the state of each process's
    generators. Initialise the weights before, since they must be the same on all processes.
    """
    # far apart, so that seed + 1 on one process is not the stream of another
    torch.manual_seed(seed + 1_000_003 * process_index)


class DropKeyScheduleCallback(TrainerCallback):
    """Scales all drop ratios over the steps of training: warm-up, alignment fine-tune, and any schedule of one's own.

    The ratios are put back when training ends, so the configuration and what is saved keep the settings.

    Args:
        warmup: As `ratio_factor`.
        alignment: As `ratio_factor`: DropKey is off for this last fraction of the steps.
        schedule: A further factor in [0, 1], from the finished steps and their total.
    """

    def __init__(self, *, warmup: float = 0.0, alignment: float = 0.0, schedule: StepSchedule | None = None):
        ratio_factor(0, 1, warmup=warmup, alignment=alignment)
        self.warmup = warmup
        self.alignment = alignment
        self.schedule = schedule

    def factor(self, step: int, total_steps: int) -> float:
        """The factor on all ratios in the optimiser step after `step` finished ones."""
        factor = ratio_factor(step, total_steps, warmup=self.warmup, alignment=self.alignment)
        return factor * (1.0 if self.schedule is None else self.schedule(step, total_steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the ratios of the step."""
        scale_ratios(kwargs["model"], self.factor(state.global_step, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the ratios back."""
        scale_ratios(kwargs["model"], 1.0)


class DropKeySeedCallback(TrainerCallback):
    """Lets the processes of a distributed training drop different keys, reproducibly.

    `Trainer` seeds all processes alike, so that without this they draw the same masks for different images. Data order is
    not concerned. `Trainer` then loads the generators' states from a checkpoint; where it holds none for this process,
    because another number of processes wrote it, the masks go on as new ones.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seeds the process, each start of a run otherwise."""
        if state.global_step > 0 or args.world_size > 1:
            seed_process(args.seed, args.process_index + args.world_size * state.global_step)


class DropKeyGuardCallback(TrainerCallback):
    """Notices a model whose configuration has DropKey settings while none of its attentions drops keys.

    A patched stock model is in this state after `from_pretrained`: it would train without DropKey. The same of drop path
    (`apply_drop_path`) and patch dropout (`apply_patch_dropout`). The adapters in the checkpoints of PEFT's models get
    their settings, which PEFT does not save (`save_adapter_settings`).

    Args:
        reapply: Apply the settings of the configuration, instead of a warning.
    """

    def __init__(self, *, reapply: bool = False):
        self.reapply = reapply

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns, or applies the settings."""
        model = kwargs["model"]
        if not self.reapply:
            warn_if_forgotten(model)
            DROP_PATH.warn_if_forgotten(model)
            PATCH_DROPOUT.warn_if_forgotten(model)
            return
        if forgotten_ratio(model) is not None:
            apply_dropkey(model)
        if DROP_PATH.forgotten(model) is not None:
            apply_drop_path(model)
        if PATCH_DROPOUT.forgotten(model) is not None:
            apply_patch_dropout(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Completes the adapter of the checkpoint, if it is one."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and is_adapted(kwargs["model"]) and (folder / ADAPTER_CONFIG).is_file():
            save_adapter_settings(kwargs["model"], folder)


class DropKeyLogCallback(TrainerCallback):
    """Adds the drop ratios to what `Trainer` logs about training: progress output and `trainer_state.json`.

    Reporters such as TensorBoard run before a user's callbacks. They see the ratios if this callback is first:
    `trainer.callback_handler.callbacks.insert(0, DropKeyLogCallback())`.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the ratios of the step to the entry and to the history."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        ratios = dropkey_log(kwargs["model"])
        logs.update(ratios)
        if state.log_history:
            state.log_history[-1].update(ratios)
