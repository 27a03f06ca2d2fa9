"""Trains as `train_image_classification.py` does, from the same recipes, in a loop that is all here to read and change.

    python scripts/train_image_classification_accelerate.py recipe:digits_vit --output_dir runs/digits
    accelerate launch --config_file scripts/accelerate/several_gpus.yaml \
        scripts/train_image_classification_accelerate.py recipe:digits_vit --output_dir runs/digits
On one process the losses are those of the other script, for the same seed. Arguments of `Trainer` that this loop does
not have are an error: label smoothing, `load_best_model_at_end`, pushing (use `hf-dropkey push`) and so on. Its log and
its optimizer are in `hf_dropkey/training/loop.py`, its data and its model in `hf_dropkey/classification/`.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    DefaultFlowCallback,
    EvalPrediction,
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    get_scheduler,
    set_seed,
)
from transformers.trainer_utils import speed_metrics

from hf_dropkey.classification.data import ImageData
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.classification.metrics import classification_metrics
from hf_dropkey.extras import needed
from hf_dropkey.hub.cards import write_card
from hf_dropkey.hub.trainer import completed_adapter
from hf_dropkey.training.callbacks import seed_process
from hf_dropkey.training.checkpoints import step_of
from hf_dropkey.training.defaults import default_words
from hf_dropkey.training.guards import LossGuard, check_devices, named_save, note_where_to_resume
from hf_dropkey.training.job import started_command
from hf_dropkey.training.loop import (
    RunLog,
    check_followed,
    delete_old_checkpoints,
    load_saved_weights,
    make_accelerator,
    make_optimizer,
    run_facts,
    save_results,
)
from hf_dropkey.training.lora import merged
from hf_dropkey.training.record import STATE, RunRecord, run_settings
from hf_dropkey.training.samples import IdCollator, NumberedRows, masks_of


with needed("train"):
    from accelerate import DistributedType, skip_first_batches


logger = logging.getLogger(__name__)


class LoopJob(ClassificationJob):
    """The job of `train_image_classification.py`, with the arguments of `Trainer` that the loop below has."""

    @classmethod
    def defaults(cls, command: Sequence[str]) -> list[str]:
        """As of `ClassificationJob`, without those that the loop does not have."""
        return default_words(command, without=("load_best_model_at_end", "metric_for_best_model"))

    def check_training_arguments(self) -> None:
        """As `check_followed`."""
        check_followed(self.training)

    def run_to_the_end(self, command: Sequence[str]) -> None:
        """Trains, evaluates and describes, in the locked output folder."""
        checkpoint = self.prepare_output()
        model, data = self.prepare(checkpoint)
        if checkpoint is not None:
            load_saved_weights(model, checkpoint)
        loop = Loop(self, model, data)
        metrics = {}
        if self.training.do_train:
            with note_where_to_resume(self.output):
                loop.start(checkpoint)
                metrics["train"] = {**loop.train(), "parameters": model.num_parameters()}
                if self.lora.merge_adapter:
                    loop.merge_adapter()
                loop.save_model()
        if self.training.do_eval:
            metrics["eval"] = loop.evaluate()
        if loop.accelerator.is_main_process:
            for split, values in metrics.items():
                logger.info("%s: %s", split, values)
                save_results(self.output, split, values)
            if self.training.do_train:
                write_card(self.output, facts=run_facts(self.card(data), command))
        # not end_training, which ends the process group while the model still uses it: gloo hangs then
        for tracker in loop.accelerator.trackers:
            tracker.finish()


class Loop:
    """A run on this process, with what it has in common with the other processes."""

    def __init__(self, job: LoopJob, model: PreTrainedModel, data: ImageData) -> None:
        """Optimiser, schedule and loaders, prepared by accelerate; trackers are started."""
        training = self.args = job.training
        self.output, self.processor, self.callbacks, self.loss = job.output, job.processor, job.callbacks, job.loss()
        self.transform = job.transform(data)
        set_seed(training.seed)
        self.accelerator = make_accelerator(training)
        collate = job.collator(data, self.transform)
        self.collate = IdCollator(collate) if job.run.masks_by_sample else collate
        self.train_batches, self.max_steps = None, 0
        if data.train is not None:
            rows: Any = NumberedRows(data.train) if job.run.masks_by_sample else data.train
            order, batch = RandomSampler(rows), training.per_device_train_batch_size
            self.train_batches = self.batches(rows, batch, sampler=order, drop_last=training.dataloader_drop_last)
            steps = self.steps_of_an_epoch()
            self.max_steps = (
                training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps)
            )
        self.evaluation_batches = self.batches(data.evaluation, training.per_device_eval_batch_size)
        optimizer = make_optimizer(model, training, job.rates(model))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = self.accelerator.prepare(
            get_scheduler(
                training.lr_scheduler_type,
                optimizer=self.optimizer,
                num_warmup_steps=training.get_warmup_steps(self.max_steps),
                num_training_steps=self.max_steps,
                scheduler_specific_kwargs=training.lr_scheduler_kwargs,  # type: ignore[arg-type]  # read by now
            )
        )
        if training.report_to:
            self.accelerator.init_trackers(training.run_name or "hf_dropkey", run_settings(training))
        record = RunRecord({**run_settings(training), "fixed": job.fixed()}, job.fingerprint(data))
        self.log = RunLog(self.accelerator, training, self.max_steps, record)
        self.guard = LossGuard(job.run.on_nonfinite_loss)
        # the moments to log, evaluate and save are those of Trainer, because they are its code's
        self.flow, self.control = DefaultFlowCallback(), TrainerControl()
        self.learning_rate = 0.0

    @property
    def state(self) -> TrainerState:
        """Step, epoch and history."""
        return self.log.state

    def batches(self, rows: Any, size: int, **order: Any) -> Any:
        """A loader of some rows, each process's part of them."""
        training = self.args
        loader: DataLoader[Any] = DataLoader(
            rows,
            size,
            collate_fn=self.collate,
            num_workers=training.dataloader_num_workers,
            pin_memory=training.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=training.dataloader_persistent_workers,
            prefetch_factor=training.dataloader_prefetch_factor,
            **order,
        )
        return self.accelerator.prepare(loader)

    def steps_of_an_epoch(self) -> int:
        """Optimiser steps in one pass over the training images."""
        return math.ceil(len(self.train_batches or ()) / self.args.gradient_accumulation_steps)

    def unwrapped(self) -> PreTrainedModel:
        """The model itself, a `PeftModel` with `--lora_r`."""
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
            # optimiser, schedule and random states; the weights too where they are in parts
            self.accelerator.load_state(checkpoint)
            self.log.resume(checkpoint)

    def train(self) -> dict[str, float]:
        """Trains to the last step; returns what it took, with what was done before a resume."""
        steps = self.steps_of_an_epoch()
        if self.args.eval_on_start:
            self.evaluate()
        while self.state.global_step < self.max_steps:
            for batches in self.updates(*divmod(self.state.global_step, steps)):
                for callback in self.callbacks:
                    callback.on_step_begin(self.args, self.state, self.control, model=self.unwrapped())
                self.log.total += self.update(batches)
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
        return self.log.summary()

    def updates(self, epoch: int, done: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The batches of each optimiser step of an epoch, after the steps that are done."""
        self.transform.epoch.fill_(epoch)
        batches: Any = self.train_batches
        batches.set_epoch(epoch)
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
        count = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=self.accelerator.device)
        self.log.images += int(count)
        count = self.accelerator.gather(count).sum()
        loss_of_step = torch.zeros((), device=self.accelerator.device)
        before = self.log.loss_sum.clone()
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            masks = masks_of(batch, epoch=int(self.transform.epoch), seed=self.args.seed)
            with self.accelerator.no_sync(self.model) if not last else torch.enable_grad(), masks:
                # a sum over images, divided by all images of the step, on a mean over processes
                loss = self.loss_of(batch, count) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            losses = self.accelerator.gather(loss.detach().reshape(1)).tolist()
            self.guard.look_at(losses, step=self.state.global_step + 1)
            loss_of_step += loss.detach()
            # one by one, as Trainer adds them, for the same rounding
            self.log.loss_sum += loss.detach()
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        if self.guard.end_step():
            loss_of_step.zero_()
            self.log.loss_sum.copy_(before)
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
        outputs = self.model(pixel_values=batch["pixel_values"])
        found: torch.Tensor = self.loss(outputs, labels, count * labels.shape[1])
        return found

    def act(self) -> None:
        """Logs, evaluates and saves, as it is time to."""
        if self.control.should_log and self.state.global_step > self.log.logged_step:
            self.log.losses(self.learning_rate)
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self.save()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

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
        self.log.write(metrics)
        return {**metrics, "epoch": float(self.state.epoch or 0)}

    def save(self) -> None:
        """Writes a checkpoint, whose last file says that it is whole, and deletes those beyond the limit."""
        folder, main = self.output / f"checkpoint-{self.state.global_step}", self.accelerator.is_main_process
        self.log.record_progress(folder)
        with named_save(folder):
            self.accelerator.save_state(folder)
            if self.accelerator.distributed_type != DistributedType.FSDP:
                with completed_adapter(self.unwrapped(), folder, writes=main):
                    self.unwrapped().save_pretrained(folder, is_main_process=main)
            elif main:
                # each process has saved its part of the weights
                self.unwrapped().config.save_pretrained(folder)
            self.accelerator.wait_for_everyone()
            if main:
                self.processor.save_pretrained(folder)
                self.log.save(folder)
        if main:
            delete_old_checkpoints(self.output, self.args.save_total_limit)

    def merge_adapter(self) -> None:
        """Makes the trained adapter a plain model, which is evaluated and saved from now on."""
        self.model = self.accelerator.prepare_model(merged(self.unwrapped()), evaluation_mode=True)

    def save_model(self) -> None:
        """Saves the model for others, with its image processor."""
        state = self.accelerator.get_state_dict(self.model)
        main = self.accelerator.is_main_process
        with named_save(self.output):
            with completed_adapter(self.unwrapped(), self.output, writes=main):
                self.unwrapped().save_pretrained(self.output, state_dict=state, is_main_process=main)
            if main:
                self.processor.save_pretrained(self.output)
                self.state.save_to_json(str(self.output / STATE))


def main() -> None:
    """Runs the job, once."""
    check_devices(os.environ, sys.argv[1:])
    job = LoopJob.parse(sys.argv[1:])
    # accelerate logs every file that it writes
    logging.getLogger("accelerate").setLevel("WARN")
    job.execute(started_command())


if __name__ == "__main__":
    main()
