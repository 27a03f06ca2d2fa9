"""What a training loop of one's own needs beside the loop: arguments, accelerator, optimizer, log, checkpoints.

`scripts/train_image_classification_accelerate.py` is such a loop. Its log, checkpoints and results are those of `Trainer`.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import speed_metrics

from ..extras import needed
from ..hub.cards import RunFacts, shown_command
from ..patching.adapters import ADAPTER_WEIGHTS
from .checkpoints import checkpoints_in
from .finetune import split_groups
from .guards import check_engine
from .record import STATE, RunRecord, earlier_resumes, loss_of_process, recorded


with needed("train"):
    from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
    from accelerate.tracking import get_available_trackers


# the arguments of `Trainer` that the loop follows; the others must be left alone
FOLLOWED = frozenset(
    [
        "output_dir",
        "do_train",
        "do_eval",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "optim",
        "optim_args",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "bf16",
        "fp16",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "eval_delay",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "seed",
        "data_seed",
        "use_cpu",
        "ddp_backend",
        "report_to",
        "run_name",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_drop_last",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "disable_tqdm",
        "log_level",
        "remove_unused_columns",
    ]
)


def check_followed(training: TrainingArguments) -> None:
    """Raises ValueError for arguments that the loop does not follow, or if there is nothing to do."""
    usual = TrainingArguments(output_dir=training.output_dir, use_cpu=training.use_cpu)
    names = {entry.name for entry in fields(TrainingArguments) if entry.init}
    changed = {name for name in names if getattr(training, name) != getattr(usual, name)}
    foreign = sorted(changed - FOLLOWED)
    if foreign:
        raise ValueError(
            f"this loop has no {', '.join(foreign)}; leave out --{foreign[0]}, or use train_image_classification.py"
        )
    if not (training.do_train or training.do_eval):
        raise ValueError("nothing to do; pass --do_train, --do_eval or both")
    if training.save_strategy == "best" or training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            "this loop keeps no best metric, which --save_strategy best and schedules that wait for one need; choose "
            "others, or use train_image_classification.py"
        )
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = sorted(set(training.report_to or []) - available)
    if missing:
        raise ValueError(
            f"--report_to {' '.join(missing)}: not installed, or not a tracker of accelerate, which has "
            f"{', '.join(sorted(available)) or 'none'} here; install it, or pass --report_to none"
        )


def make_accelerator(training: TrainingArguments) -> Accelerator:
    """The accelerator of a run; its checkpoints leave the weights to `save_pretrained`, except where processes share them.

    Raises:
        ValueError: The engine of the launcher is one that a loop does not run on.
    """
    accelerator = Accelerator(
        cpu=training.use_cpu,
        mixed_precision="bf16" if training.bf16 else "fp16" if training.fp16 else None,
        # epochs that shuffle the same way after a resume
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=training.data_seed),
        # it would step once for each process
        step_scheduler_with_optimizer=False,
        log_with=training.report_to or None,
        project_dir=training.output_dir,
    )
    check_engine(accelerator, os.environ)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed has a loop of its own; launch train_image_classification.py with it")
    # what the model is saved with, under names that do not depend on the number of processes
    if accelerator.distributed_type != DistributedType.FSDP:
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    return accelerator


def make_optimizer(
    model: PreTrainedModel, training: TrainingArguments, rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The optimizer that `Trainer` makes: no weight decay on biases and norms, `rates` as in `split_groups`."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(training, model)
    without = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], without))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for name, parameter in trained if (name in decayed) == decays],
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    split_groups(optimizer, model, rates)
    return optimizer


def load_saved_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Gives a model the weights that `save_pretrained` wrote to a checkpoint, of an adapter those of the adapter.

    Where processes share the weights, the checkpoint has none of these, and the accelerator loads their parts.
    """
    # copied, because a file in memory is aligned otherwise, and with it the rounding of products
    if (checkpoint / ADAPTER_WEIGHTS).is_file():
        with needed("peft"):
            from peft import set_peft_model_state_dict
        set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER_WEIGHTS))
    elif any(checkpoint.glob("model*.safetensors")):
        model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())


def delete_old_checkpoints(output: Path, limit: int | None) -> None:
    """Deletes all but the newest `limit` checkpoints of a run; None or 0 keeps all."""
    for old in checkpoints_in(output)[:-limit] if limit else []:
        shutil.rmtree(old)


class RunLog:
    """The log of a loop: history, averages and speeds, which a resumed run goes on with.

    Attributes:
        state: Step, epoch, history, and when to log, evaluate and save, as `Trainer` has them.
        loss_sum: Sum of the losses of this process since the last line of the log.
        total: Sum of the losses of all steps, on all processes.
        images: Images that this process has trained on.
    """

    def __init__(
        self, accelerator: Accelerator, training: TrainingArguments, max_steps: int, record: RunRecord
    ) -> None:
        """`record` is what checkpoints keep of the run."""
        self.accelerator, self.args, self.record = accelerator, training, record
        self.state = TrainerState(max_steps=max_steps)
        self.state.compute_steps(training, max_steps)
        self.state.stateful_callbacks = {"RunRecord": record.state()}  # type: ignore[assignment]
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.total = torch.zeros((), device=accelerator.device)
        self.images, self.logged_step = 0, 0
        self.started = self.logged_time = time.time()

    def images_of_all(self) -> int:
        """The images that all processes have trained on; call it on every process."""
        return int(self.accelerator.gather(torch.tensor(self.images, device=self.accelerator.device)).sum())

    def losses(self, learning_rate: float) -> None:
        """Logs the mean loss of the steps since the last time, a learning rate, and the speed."""
        steps = self.state.global_step - self.logged_step
        loss = self.accelerator.gather(self.loss_sum).mean().item() / steps
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        images, now = steps * batch * self.accelerator.num_processes, time.time()
        speed = round(images / (now - self.logged_time), 1)
        self.loss_sum.zero_()
        self.write({"loss": loss, "learning_rate": learning_rate, "images_per_second": speed})
        self.logged_step, self.logged_time = self.state.global_step, now

    def write(self, values: dict[str, float]) -> None:
        """Keeps values in the history, shows them, and hands them to the trackers."""
        entry = {**values, "epoch": float(self.state.epoch or 0), "step": self.state.global_step}
        self.state.log_history.append(entry)
        self.accelerator.log(values, step=self.state.global_step)
        self.accelerator.print(entry)

    def summary(self) -> dict[str, float]:
        """What the whole training took; call it on every process."""
        done = self.state.global_step
        metrics = speed_metrics("train", self.started, num_samples=self.images_of_all(), num_steps=done)
        return {**metrics, "train_loss": float(self.total) / max(done, 1), "epoch": float(self.state.epoch or 0)}

    def resume(self, checkpoint: Path) -> None:
        """Goes on with history, sums and times of a checkpoint, so that averages and speeds are those of the whole run."""
        found = TrainerState.load_from_json(str(checkpoint / STATE))
        self.state.global_step, self.state.log_history = found.global_step, found.log_history
        self.state.epoch, self.logged_step = found.epoch, found.global_step
        self.record.resumed = [*earlier_resumes(checkpoint), found.global_step]
        progress = recorded(checkpoint, "progress")
        if not progress:
            return
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.loss_sum += loss_of_process(progress["losses"], index, processes)
        self.total += progress["logged_losses"]
        # the same number on each process is summed at the end
        self.images += round(progress.get("images", 0) / processes)
        self.logged_step = progress["logged_step"]
        self.started = time.time() - progress["seconds"]
        self.logged_time = time.time() - progress.get("seconds_since_log", 0.0)

    def record_progress(self, folder: Path) -> None:
        """Notes what `resume` needs, for the checkpoint in a folder; call it on every process."""
        self.record.folder = folder
        self.record.progress = {
            "losses": self.accelerator.gather(self.loss_sum.reshape(1)).tolist(),
            "logged_losses": float(self.total),
            "logged_step": self.logged_step,
            "images": self.images_of_all(),
            "seconds": time.time() - self.started,
            "seconds_since_log": time.time() - self.logged_time,
        }

    def save(self, folder: Path) -> None:
        """Writes the state to the folder of a checkpoint, whose weights are there by now; the first process calls it."""
        self.state.stateful_callbacks = {"RunRecord": self.record.state()}  # type: ignore[assignment]
        self.state.save_to_json(str(folder / STATE))


def save_results(output: Path, split: str, metrics: Mapping[str, float]) -> None:
    """Writes `<split>_results.json`, and adds to `all_results.json`."""
    everything = output / "all_results.json"
    before = json.loads(everything.read_text(encoding="utf-8")) if everything.is_file() else {}
    for file, values in ((output / f"{split}_results.json", metrics), (everything, {**before, **metrics})):
        file.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def run_facts(card: Mapping[str, Any], command: Sequence[str]) -> RunFacts:
    """What the card says about a run: the facts of `TrainingJob.card`, and the command."""
    return RunFacts(
        dataset=card["dataset"],
        dataset_id=card["dataset_tags"],
        dataset_split=card["dataset_split"],
        evaluation_dataset=card["evaluation_dataset"],
        base_model=card["finetuned_from"],
        from_scratch=card["finetuned_from"] is None,
        command=shown_command(command),
        tags=card["tags"],
    )
