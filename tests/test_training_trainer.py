"""`Trainer` on real images: resume is bit-equal, the best checkpoint comes back whole, accumulation scales the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification


class Digits(Dataset):
    """The first images of scikit-learn's handwritten digits, 1 x 8 x 8 in [-1, 1]."""

    def __init__(self, start: int, count: int):
        images, labels = load_digits(return_X_y=True)
        chosen = slice(start, start + count)
        self.images = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.tensor(labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def model_of(**kwargs: Any) -> DropKeyViTForImageClassification:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 10,
        "hidden_dropout_prob": 0.1,
        "dropkey_ratio": 0.3,
        **kwargs,
    }
    return DropKeyViTForImageClassification(DropKeyViTConfig(**settings))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def trainer_of(output: Path, model: DropKeyViTForImageClassification, **kwargs: Any) -> Trainer:
    settings = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **kwargs,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **settings),
        train_dataset=Digits(0, 128),
        eval_dataset=Digits(1000, 64),
        compute_metrics=accuracy,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resume_is_bit_equal_to_the_uninterrupted_run(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "run", model_of())
    whole.train()
    assert len(losses(whole)) == 16 and losses(whole)[-1] < losses(whole)[0]
    resumed = trainer_of(tmp_path / "run", model_of())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_resumed_part_depends_on_the_checkpoint(tmp_path: Path) -> None:
    """The test above would mean nothing if resuming ignored the weights: other weights give other losses."""
    whole = trainer_of(tmp_path / "run", model_of())
    whole.train()
    folder = tmp_path / "run" / "checkpoint-5"
    torch.manual_seed(1)
    model_of(initializer_range=0.5).save_pretrained(folder)
    resumed = trainer_of(tmp_path / "run", model_of())
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed)[:5] == losses(whole)[:5] and losses(resumed)[5] != losses(whole)[5]


def test_load_best_model_restores_the_recorded_metric(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of(), load_best_model_at_end=True, metric_for_best_model="eval_loss")
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == best


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_gradient_accumulation_scales_the_loss(tmp_path: Path, problem: str) -> None:
    """One step on 16 images equals one step on 4 accumulated batches of 4, to rounding."""
    weights = []
    for batch, steps in [(16, 1), (4, 4)]:
        model = model_of(dropkey_ratio=0, hidden_dropout_prob=0, problem_type=problem)
        trainer = trainer_of(
            tmp_path / str(steps),
            model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            save_strategy="no",
            eval_strategy="no",
            optim="sgd",
            max_grad_norm=0,
        )
        if problem == "multi_label_classification":
            data = trainer.train_dataset
            data.labels = torch.nn.functional.one_hot(data.labels, 10).float()
        trainer.train()
        weights.append([parameter.detach() for parameter in model.parameters()])
    moved = [(one - start).abs().max() for one, start in zip(weights[0], model_of().parameters(), strict=True)]
    assert max(moved) > 1e-4, "the step must be large enough to compare"
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_trainer_checkpoints_carry_their_code(tmp_path: Path) -> None:
    trainer_of(tmp_path, model_of(), max_steps=5, eval_strategy="no").train()
    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert {"modeling_dropkey_vit.py", "dropkey.py", "config.json", "model.safetensors"} <= names
