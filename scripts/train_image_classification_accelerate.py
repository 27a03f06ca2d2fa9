"""Trains as `train_image_classification.py` does, from the same recipes, in a loop that is all here to read and change.

    python scripts/train_image_classification_accelerate.py recipe:digits_vit --output_dir runs/digits
    accelerate launch --config_file scripts/accelerate/several_gpus.yaml \
        scripts/train_image_classification_accelerate.py recipe:digits_vit --output_dir runs/digits
On one process the losses are those of the other script, for the same seed. Arguments of `Trainer` that this loop does
not have are an error: label smoothing, `load_best_model_at_end`, pushing (use `hf-dropkey push`) and so on.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    BaseImageProcessor,
    DefaultFlowCallback,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import speed_metrics

from hf_dropkey.classification.data import ImageData
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.classification.metrics import classification_metrics
from hf_dropkey.classification.transform import ImageTransform
from hf_dropkey.extras import needed
from hf_dropkey.hub.cards import RunFacts, shown_command, write_card
from hf_dropkey.training.callbacks import seed_process
from hf_dropkey.training.checkpoints import checkpoints_in, step_of
from hf_dropkey.training.defaults import default_words
from hf_dropkey.training.finetune import split_groups
from hf_dropkey.training.guards import LossGuard, check_devices, check_engine, named_save, note_where_to_resume
from hf_dropkey.training.job import started_command
from hf_dropkey.training.record import STATE, RunRecord, earlier_resumes, recorded, run_settings
from hf_dropkey.training.samples import IdCollator, NumberedRows, masks_of


with needed("train"):
    from accelerate import (
        Accelerator,
        DataLoaderConfiguration,
        DistributedType,
        skip_first_batches,
    )
    from accelerate.tracking import get_available_trackers


logger = logging.getLogger(__name__)

# what the loop below does with the arguments of Trainer; the others must be left alone
KNOWN_ARGUMENTS = {
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
}


def check_training_arguments(training: TrainingArguments) -> None:
    """Raises ValueError for arguments that the loop does not have, or if there is nothing to do."""
    usual = TrainingArguments(output_dir=training.output_dir, use_cpu=training.use_cpu)
    names = {entry.name for entry in fields(TrainingArguments) if entry.init}
    changed = {name for name in names if getattr(training, name) != getattr(usual, name)}
    foreign = sorted(changed - KNOWN_ARGUMENTS)
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
            f"--report_to {' '.join(missing)}: not installed, or no tracker of accelerate, which has "
            f"{', '.join(sorted(available)) or 'none'} here; install it, or pass --report_to none"
        )


class LoopJob(ClassificationJob):
    """The job of `train_image_classification.py`, with the arguments of `Trainer` that the loop below has."""

    @classmethod
    def defaults(cls, command: Sequence[str]) -> list[str]:
        """As of `ClassificationJob`, without those that the loop does not have."""
        return default_words(command, without=("load_best_model_at_end", "metric_for_best_model"))

    def check_training_arguments(self) -> None:
        """As the function of that name."""
        check_training_arguments(self.training)

    def check(self) -> None:
        """As `ClassificationJob.check`; raises ValueError for LoRA, which this loop does not have."""
        if self.lora.lora_r is not None:
            raise ValueError(
                f"this loop has no LoRA; leave out --lora_r {self.lora.lora_r}, or use train_image_classification.py"
            )
        super().check()

    def run_to_the_end(self, command: Sequence[str]) -> None:
        """Trains, evaluates and describes, in the locked output folder."""
        checkpoint = self.prepare_output()
        model, data = self.prepare(checkpoint)
        if checkpoint is not None and (checkpoint / "model.safetensors").is_file():
            # copied, because a file in memory is aligned otherwise, and with it the rounding of products
            model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())
        loop = make_loop(self, model, data)
        metrics = {}
        if self.training.do_train:
            with note_where_to_resume(self.output):
                loop.start(checkpoint)
                metrics["train"] = {**loop.train(), "parameters": model.num_parameters()}
                loop.save_model()
        if self.training.do_eval:
            metrics["eval"] = loop.evaluate()
        if loop.accelerator.is_main_process:
            for split, values in metrics.items():
                logger.info("%s: %s", split, values)
                save_results(self.output, split, values)
            if self.training.do_train:
                write_card(self.output, facts=facts_of(self, data, command))
        # not end_training, which ends the process group while the model still uses it: gloo hangs then
        for tracker in loop.accelerator.trackers:
            tracker.finish()


@dataclass
class Loop:
    """A run on this process, with what it has in common with the other processes."""

    accelerator: Accelerator
    args: TrainingArguments
    model: Any
    processor: BaseImageProcessor
    optimizer: Any
    scheduler: Any
    train_batches: Any
    evaluation_batches: Any
    transform: ImageTransform
    guard: LossGuard
    max_steps: int
    record: RunRecord
    callbacks: list[Any]
    loss: Any
    state: TrainerState = field(default_factory=TrainerState)

    def __post_init__(self) -> None:
        """Works out when to log, evaluate and save."""
        self.state.max_steps = self.max_steps
        self.state.compute_steps(self.args, self.max_steps)
        self.state.stateful_callbacks = {"RunRecord": self.record.state()}  # type: ignore[assignment]
        # the moments are those of Trainer, because they are its code's
        self.flow, self.control = DefaultFlowCallback(), TrainerControl()
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        # of all steps, on all processes
        self.total = torch.zeros((), device=self.accelerator.device)
        self.images, self.logged_step, self.logged_time = 0, 0, time.time()
        self.started = time.time()
        self.learning_rate = 0.0

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    def unwrapped(self) -> PreTrainedModel:
        """The model itself."""
        found: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return found

    def start(self, checkpoint: Path | None) -> None:
        """Gives each process its own masks, and goes on from a checkpoint if there is one."""
        step = 0 if checkpoint is None else step_of(checkpoint) or 0
        if self.accelerator.num_processes > 1 or step:
            # a checkpoint's random states replace them
            index, count = self.accelerator.process_index, self.accelerator.num_processes
            seed_process(self.args.seed, index + count * step)
        if checkpoint is not None:
            self.resume(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Takes up optimiser, schedule, random states, step and log; the weights too where they are in parts."""
        self.accelerator.load_state(checkpoint)
        found = TrainerState.load_from_json(str(checkpoint / STATE))
        self.state.global_step, self.state.log_history = found.global_step, found.log_history
        self.state.epoch = found.epoch
        self.logged_step = found.global_step
        self.record.resumed = [*earlier_resumes(checkpoint), found.global_step]
        self.take_up(recorded(checkpoint, "progress"))

    def take_up(self, progress: dict[str, Any]) -> None:
        """Goes on with the sums and times of a checkpoint, so that averages and speeds are those of the whole run."""
        if not progress:
            return
        losses, processes = progress["losses"], self.accelerator.num_processes
        same = len(losses) == processes
        self.loss_sum += losses[self.accelerator.process_index] if same else sum(losses) / len(losses)
        self.total += progress["logged_losses"]
        # the same number on each process is summed at the end
        self.images += round(progress.get("images", 0) / processes)
        self.logged_step = progress["logged_step"]
        self.started = time.time() - progress["seconds"]
        self.logged_time = time.time() - progress.get("seconds_since_log", 0.0)

    def progress(self) -> dict[str, Any]:
        """What `take_up` needs; call it on every process."""
        images = torch.tensor(self.images, device=self.accelerator.device)
        return {
            "losses": self.accelerator.gather(self.loss_sum.reshape(1)).tolist(),
            "logged_losses": float(self.total),
            "logged_step": self.logged_step,
            "images": int(self.accelerator.gather(images).sum()),
            "seconds": time.time() - self.started,
            "seconds_since_log": time.time() - self.logged_time,
        }

    def train(self) -> dict[str, float]:
        """Trains to the last step; returns what it took, with what was done before a resume."""
        steps = math.ceil(len(self.train_batches) / self.args.gradient_accumulation_steps)
        if self.args.eval_on_start:
            self.evaluate()
        while self.state.global_step < self.max_steps:
            for batches in self.updates(*divmod(self.state.global_step, steps)):
                for callback in self.callbacks:
                    callback.on_step_begin(self.args, self.state, self.control, model=self.unwrapped())
                self.total += self.update(batches)
                self.state.global_step += 1
                self.state.epoch = self.state.global_step / steps
                self.flow.on_step_end(self.args, self.state, self.control)
                self.act()
                if self.state.global_step == self.max_steps:
                    break
            self.flow.on_epoch_end(self.args, self.state, self.control)
            self.act()
        for callback in self.callbacks:
            callback.on_train_end(self.args, self.state, self.control, model=self.unwrapped())
        done = self.state.global_step
        images = self.accelerator.gather(torch.tensor(self.images, device=self.accelerator.device)).sum().item()
        metrics = speed_metrics("train", self.started, num_samples=images, num_steps=done)
        return {**metrics, "train_loss": float(self.total) / max(done, 1), "epoch": float(self.state.epoch or 0)}

    def updates(self, epoch: int, done: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The batches of each optimiser step of an epoch, after the steps that are done."""
        self.transform.epoch.fill_(epoch)
        self.train_batches.set_epoch(epoch)
        batches = self.train_batches
        if done:
            batches = skip_first_batches(batches, done * self.args.gradient_accumulation_steps)
        source = iter(batches)
        # a loader draws when it starts, which the run that wrote the checkpoint had behind it
        with torch.random.fork_rng(devices=[], enabled=bool(done)):
            group = list(islice(source, self.args.gradient_accumulation_steps))
        while group:
            yield group
            group = list(islice(source, self.args.gradient_accumulation_steps))

    def update(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """One optimiser step on some batches; returns the mean loss of the images of all processes."""
        self.model.train()
        count = (
            torch.stack([torch.tensor(len(batch["labels"])) for batch in batches]).sum().to(self.accelerator.device)
        )
        self.images += int(count)
        count = self.accelerator.gather(count).sum()
        loss_of_step = torch.zeros((), device=self.accelerator.device)
        before = self.loss_sum.clone()
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            masks = masks_of(batch, epoch=int(self.transform.epoch), seed=self.args.seed)
            with self.accelerator.no_sync(self.model) if not last else torch.enable_grad(), masks:
                # a sum over images, divided by all images of the step, on a mean over processes
                loss = self.loss_of(batch, count) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            self.guard.look_at(
                self.accelerator.gather(loss.detach().reshape(1)).tolist(), step=self.state.global_step + 1
            )
            loss_of_step += loss.detach()
            # one by one, as Trainer adds them, for the same rounding
            self.loss_sum += loss.detach()
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        if self.guard.end_step():
            loss_of_step.zero_()
            self.loss_sum.copy_(before)
            # with fp16 the scaler skips the step itself, and misses gradients that are gone
            if not self.args.fp16:
                self.optimizer.zero_grad()
        self.optimizer.step()
        self.learning_rate = self.scheduler.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return self.accelerator.gather(loss_of_step).mean()

    def loss_of(self, batch: dict[str, torch.Tensor], count: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a sum over images divided by `count`: the model's own, or that of mixed images."""
        if self.loss is None:
            own: torch.Tensor = self.model(**batch, num_items_in_batch=count).loss
            return own
        labels = batch["labels"]
        found: torch.Tensor = self.loss(
            self.model(pixel_values=batch["pixel_values"]), labels, count * labels.shape[1]
        )
        return found

    def act(self) -> None:
        """Logs, evaluates and saves, as it is time to."""
        if self.control.should_log and self.state.global_step > self.logged_step:
            self.log_loss()
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self.save()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def log_loss(self) -> None:
        """Logs the mean loss of the steps since the last time, the learning rate of the last one, and the speed."""
        steps = self.state.global_step - self.logged_step
        loss = self.accelerator.gather(self.loss_sum).mean().item() / steps
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        images = steps * batch * self.accelerator.num_processes
        now = time.time()
        self.loss_sum.zero_()
        self.log(
            {
                "loss": loss,
                "learning_rate": self.learning_rate,
                "images_per_second": round(images / (now - self.logged_time), 1),
            }
        )
        self.logged_step, self.logged_time = self.state.global_step, now

    def log(self, values: dict[str, float]) -> None:
        """Keeps values in the history, shows them, and hands them to the trackers."""
        entry = {**values, "epoch": float(self.state.epoch or 0), "step": self.state.global_step}
        self.state.log_history.append(entry)
        self.accelerator.log(values, step=self.state.global_step)
        self.accelerator.print(entry)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluates on every image once: what the last batch repeats so that all processes have one is left out."""
        start = time.time()
        self.model.eval()
        logits: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        for batch in self.evaluation_batches:
            found = self.model(pixel_values=batch["pixel_values"]).logits
            for kept, values in ((logits, found), (labels, batch["labels"])):
                kept.append(self.accelerator.gather_for_metrics(values).float().cpu())
        prediction = EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).long().numpy())
        found_metrics = classification_metrics(prediction)
        # the mean over batches would count what the last one repeats
        found_metrics["loss"] = found_metrics["nll"]
        metrics = {f"eval_{name}": value for name, value in found_metrics.items()}
        metrics |= {"eval_samples": len(prediction.label_ids)}
        metrics |= speed_metrics("eval", start, num_samples=len(prediction.label_ids))
        self.log(metrics)
        return {**metrics, "epoch": float(self.state.epoch or 0)}

    def save(self) -> None:
        """Writes a checkpoint, whose last file says that it is whole, and deletes those beyond the limit."""
        folder = self.output / f"checkpoint-{self.state.global_step}"
        self.record.progress, self.record.folder = self.progress(), folder
        with named_save(folder):
            self.accelerator.save_state(folder)
            if self.sharded and self.accelerator.is_main_process:
                self.unwrapped().config.save_pretrained(folder)
            elif not self.sharded:
                self.unwrapped().save_pretrained(folder, is_main_process=self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.processor.save_pretrained(folder)
                self.state.stateful_callbacks = {"RunRecord": self.record.state()}  # type: ignore[assignment]
                self.state.save_to_json(str(folder / STATE))
        if self.accelerator.is_main_process and self.args.save_total_limit:
            kept = checkpoints_in(self.output)
            for old in kept[: -self.args.save_total_limit]:
                shutil.rmtree(old)

    def save_model(self) -> None:
        """Saves the model for others, with its image processor."""
        state = self.accelerator.get_state_dict(self.model)
        main = self.accelerator.is_main_process
        with named_save(self.output):
            self.unwrapped().save_pretrained(self.output, state_dict=state, is_main_process=main)
            if main:
                self.processor.save_pretrained(self.output)
                self.state.save_to_json(str(self.output / STATE))


def make_loop(job: LoopJob, model: PreTrainedModel, data: ImageData) -> Loop:
    """Optimiser, schedule and loaders, prepared by accelerate; trackers are started."""
    training = job.training
    transform = job.transform(data)
    set_seed(training.seed)
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
    collate = job.collator(data, transform)
    workers: dict[str, Any] = {
        "collate_fn": IdCollator(collate) if job.run.masks_by_sample else collate,
        "num_workers": training.dataloader_num_workers,
        "pin_memory": training.dataloader_pin_memory and torch.accelerator.is_available(),
        "persistent_workers": training.dataloader_persistent_workers,
        "prefetch_factor": training.dataloader_prefetch_factor,
    }
    train_batches, max_steps = None, 0
    if data.train is not None:
        train: Any = NumberedRows(data.train) if job.run.masks_by_sample else data.train
        train_batches = accelerator.prepare(
            DataLoader(
                train,
                training.per_device_train_batch_size,
                sampler=RandomSampler(train),
                drop_last=training.dataloader_drop_last,
                **workers,
            )
        )
        steps = math.ceil(len(train_batches) / training.gradient_accumulation_steps)
        max_steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps)
    evaluation: Any = data.evaluation
    evaluation_batches = accelerator.prepare(DataLoader(evaluation, training.per_device_eval_batch_size, **workers))
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(training, model)
    optimizer = optimizer_class(decay_groups(model, training.weight_decay), **settings)
    split_groups(optimizer, model, job.rates(model))
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=training.get_warmup_steps(max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,  # type: ignore[arg-type]  # read by now
        )
    )
    if training.report_to:
        accelerator.init_trackers(training.run_name or "hf_dropkey", run_settings(training))
    return Loop(
        accelerator,
        training,
        model,
        job.processor,
        optimizer,
        scheduler,
        train_batches,
        evaluation_batches,
        transform,
        LossGuard(job.run.on_nonfinite_loss),
        max_steps,
        RunRecord({**run_settings(training), "fixed": job.fixed()}, job.fingerprint(data)),
        job.callbacks,
        job.loss(),
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, which biases and norms do without, as in `Trainer`."""
    without = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], without))
    named = list(model.named_parameters())
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]


def save_results(output: Path, split: str, metrics: dict[str, float]) -> None:
    """Writes `<split>_results.json`, and adds to `all_results.json`."""
    everything = output / "all_results.json"
    before = json.loads(everything.read_text(encoding="utf-8")) if everything.is_file() else {}
    for file, values in ((output / f"{split}_results.json", metrics), (everything, {**before, **metrics})):
        file.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def facts_of(job: LoopJob, data: ImageData, command: Sequence[str]) -> RunFacts:
    """What the card says about the run."""
    facts = job.card(data)
    return RunFacts(
        dataset=facts["dataset"],
        dataset_id=facts["dataset_tags"],
        dataset_split=facts["dataset_split"],
        evaluation_dataset=facts["evaluation_dataset"],
        base_model=facts["finetuned_from"],
        from_scratch=facts["finetuned_from"] is None,
        command=shown_command(command),
        tags=facts["tags"],
    )


def main() -> None:
    """Runs the job, once."""
    check_devices(os.environ, sys.argv[1:])
    job = LoopJob.parse(sys.argv[1:])
    # accelerate logs every file that it writes
    logging.getLogger("accelerate").setLevel("WARN")
    job.execute(started_command())


if __name__ == "__main__":
    main()
