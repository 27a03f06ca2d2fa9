"""DropKey over the steps of training, alone and in a Trainer that is stopped and resumed."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from stock_architectures import VIT, loss_of, pixels
from torch import nn

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, HubTrainer
from hf_dropkey.patching.apply import apply_dropkey, dropkey_modules, forgotten_ratio
from hf_dropkey.training.callbacks import (
    DropKeyGuardCallback,
    DropKeyLogCallback,
    DropKeyScheduleCallback,
    DropKeySeedCallback,
    dropkey_log,
    ratio_factor,
    scale_ratios,
    seed_process,
)


def vit(ratio: float = 0.4) -> hf.ViTForImageClassification:
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=5))
    apply_dropkey(model, ratio, final_ratio=ratio / 2, verbose=False)
    return model


def ratios(model: nn.Module) -> list[float]:
    return [module.dropkey_ratio for _, module in dropkey_modules(model)]


# --- plain functions --------------------------------------------------------------------------------------------------


def test_the_factor_warms_up_stays_and_ends() -> None:
    factors = [ratio_factor(step, 10, warmup=0.4, alignment=0.2) for step in range(10)]
    assert factors == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 0, 0]
    assert [ratio_factor(step, 3) for step in range(3)] == [1, 1, 1]
    # a short training has no step of a small fraction
    assert ratio_factor(2, 3, alignment=0.1) == 1


@pytest.mark.parametrize("fractions", [{"warmup": 1.0}, {"alignment": -0.1}, {"warmup": 0.6, "alignment": 0.4}])
def test_bad_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="warmup|alignment"):
        ratio_factor(0, 10, **fractions)
    with pytest.raises(ValueError, match="warmup|alignment"):
        DropKeyScheduleCallback(**fractions)


@pytest.mark.parametrize("native", [False, True])
def test_ratios_are_scaled_from_what_they_were_and_put_back(native: bool) -> None:
    settings = {"dropkey_ratio": 0.4, "dropkey_final_ratio": 0.2}
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, **settings)) if native else vit()
    before = ratios(model)
    for factor in (0.5, 0.5, 0.0, 0.25):
        scale_ratios(model, factor)
        assert ratios(model) == [ratio * factor for ratio in before]
    scale_ratios(model, 1.0)
    assert ratios(model) == before
    scale_ratios(model, 0.5)
    apply_dropkey(model, 0.2, final_ratio=0.1, verbose=False)
    scale_ratios(model, 1.0)
    assert ratios(model) == pytest.approx([0.2, 0.15, 0.1])


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        scale_ratios(vit(), 1.5)
    with pytest.raises(ValueError, match="has no DropKey"):
        scale_ratios(hf.ViTModel(hf.ViTConfig(**VIT)), 0.5)


def test_the_log_names_the_ratios() -> None:
    log = dropkey_log(vit())
    assert log == pytest.approx({"dropkey_ratio_max": 0.4, "dropkey_ratio_min": 0.2, "dropkey_ratio_mean": 0.3})
    assert dropkey_log(nn.Linear(2, 2)) == {}


def test_processes_drop_other_keys_and_each_repeats() -> None:
    model = vit().train()
    outputs = []
    for process in (0, 1, 0):
        seed_process(3, process)
        outputs.append(model(**pixels()).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


# --- in a Trainer -----------------------------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": torch.tensor(index % 5)}


class Recorder(hf.TrainerCallback):
    """Keeps the ratios that each step trains with."""

    def __init__(self) -> None:
        self.ratios: dict[int, list[float]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ratios[state.global_step] = ratios(kwargs["model"])


def train(model: nn.Module, out: Path, callbacks: list[Any], resume: str | None = None, **more: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(out),
        max_steps=10,
        save_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = hf.Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_schedule_sets_the_ratios_of_each_step_and_puts_them_back(tmp_path: Path) -> None:
    model, recorder = vit(), Recorder()
    before = ratios(model)
    schedule = DropKeyScheduleCallback(
        warmup=0.4, alignment=0.2, schedule=lambda step, total: 1.0 if step < 6 else (total - step) / total
    )
    trainer = train(model, tmp_path, [schedule, recorder, DropKeyLogCallback()])
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 0.4, 0.3, 0, 0]
    assert list(recorder.ratios) == list(range(10))
    for step, factor in enumerate(expected):
        assert recorder.ratios[step] == pytest.approx([ratio * factor for ratio in before])
    assert ratios(model) == before
    # what is saved in the middle are the settings, not the ratios of the step
    config = json.loads((tmp_path / "checkpoint-5" / "config.json").read_text())
    assert config["dropkey_ratio"] == 0.4 and config["dropkey_final_ratio"] == 0.2

    logged = [entry["dropkey_ratio_max"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.4 * factor for factor in expected])
    assert "dropkey_ratio_max" not in trainer.state.log_history[-1], "the summary at the end is no step"


def test_a_resumed_run_takes_the_schedule_up_where_it_was(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [DropKeyScheduleCallback(warmup=0.7, alignment=0.1), Recorder(), DropKeySeedCallback()]

    model, first = vit(), callbacks()
    train(model, tmp_path / "whole", first)
    # in the process of a crash the ratios stay as the last step had them
    again, second = vit(), callbacks()
    scale_ratios(again, 0.1)
    train(again, tmp_path / "resumed", second, resume=str(tmp_path / "whole" / "checkpoint-5"))
    assert second[1].ratios == {step: first[1].ratios[step] for step in range(5, 10)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_single_process_is_not_seeded_again(tmp_path: Path) -> None:
    arguments = hf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    state = torch.random.get_rng_state()
    DropKeySeedCallback().on_train_begin(arguments, hf.TrainerState(), hf.TrainerControl())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_training_without_dropkey_differs(tmp_path: Path) -> None:
    model = vit()
    plain = vit()
    train(model, tmp_path / "a", [])
    train(plain, tmp_path / "b", [DropKeyScheduleCallback(schedule=lambda step, total: 0.0)])
    assert not torch.equal(loss_of(model.eval(), pixels(), 0), loss_of(plain.eval(), pixels(), 0))


TWO_RANKS = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
import transformers as hf
from hf_dropkey import DropKeySeedCallback
from hf_dropkey.patching import apply_dropkey

class Indices(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": torch.tensor(index % 5), "index": torch.tensor(index)}

seen, draws = [], []

class RecordingForImageClassification(hf.ViTForImageClassification):
    def forward(self, pixel_values=None, labels=None, index=None, **kwargs):
        seen.extend(index.tolist())
        draws.append(torch.random.get_rng_state().sum().item())
        return super().forward(pixel_values=pixel_values, labels=labels, **kwargs)

def run(out, steps, resume=None, callbacks=()):
    seen.clear(), draws.clear()
    arguments = hf.TrainingArguments(
        out, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, seed=5, ddp_backend="gloo", logging_steps=100,
    )
    torch.manual_seed(0)
    model = RecordingForImageClassification(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                   image_size=32, patch_size=8, num_labels=5))
    apply_dropkey(model, 0.5, verbose=False)
    hf.Trainer(model, arguments, train_dataset=Indices(), callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
    everyone = [None, None]
    dist.all_gather_object(everyone, (list(seen), list(draws), model.state_dict()))
    return everyone

out = sys.argv[1]
plain = run(out + "/plain", 4)
assert plain[0][1] == plain[1][1], "Trainer alone seeds all processes alike"
seeded = run(out + "/seeded", 4, callbacks=[DropKeySeedCallback()])
assert not set(seeded[0][1]) & set(seeded[1][1]), "with the callback they drop other keys"
assert [part[0] for part in seeded] == [part[0] for part in plain], "the order of the data is not concerned"
assert not set(seeded[0][0]) & set(seeded[1][0]), "each image is seen by one process"
again = run(out + "/again", 4, callbacks=[DropKeySeedCallback()])
assert [part[1] for part in again] == [part[1] for part in seeded], "the seeds repeat"
resumed = run(out + "/resumed", 4, out + "/seeded/checkpoint-2", [DropKeySeedCallback()])
assert [part[1] for part in resumed] == [part[1][2:] for part in seeded], "a resumed run goes on with its checkpoint"
for name, tensor in seeded[0][2].items():
    assert torch.equal(resumed[0][2][name], tensor) and torch.equal(resumed[1][2][name], tensor), name
"""


@pytest.mark.slow
def test_two_processes_drop_other_keys_reproducibly(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=600)


@pytest.mark.parametrize("reapply", [False, True])
def test_a_model_that_forgot_its_dropkey_is_noticed(tmp_path: Path, reapply: bool) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**shape))
    apply_dropkey(model, 0.3)
    assert forgotten_ratio(model) is None
    model.save_pretrained(tmp_path)
    loaded = hf.Dinov2ForImageClassification.from_pretrained(tmp_path)
    assert forgotten_ratio(loaded) == 0.3
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("transformers.dropkey"), logging.getLogger("transformers.dropkey").level
    logger.addHandler(handler)
    # other tests may have changed what Transformers shows
    logger.setLevel(logging.WARNING)
    try:
        given: Any = (None, None, None)
        DropKeyGuardCallback(reapply=reapply).on_train_begin(*given, model=loaded)
        rows = [{"pixel_values": torch.zeros(3, 28, 28), "labels": 0}] * 4
        args = hf.TrainingArguments(tmp_path / "run", use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
        HubTrainer(model=loaded, args=args, train_dataset=rows).train()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    warnings = [
        line for line in shown if "has dropkey_ratio 0.3, but no attention drops keys: call apply_dropkey" in line
    ]
    # the callback's, and the trainer's own
    assert len(warnings) == (0 if reapply else 2)
    assert (forgotten_ratio(loaded) is None) == reapply


def test_other_modules_have_nothing_to_forget() -> None:
    assert forgotten_ratio(nn.Linear(1, 1)) is None
