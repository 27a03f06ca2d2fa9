"""Weights of an older layout in a bare `load_state_dict`, as a resumed Trainer reads them."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file
from stock_architectures import (
    quiet,
    tiny_vit,
)
from torch import nn


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": torch.tensor(index % 5)}


def train(model: nn.Module, out: Path, resume: str | None = None, callbacks: list | None = None, **more: Any) -> Any:
    args = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **more}
    arguments = hf.TrainingArguments(
        str(out),
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
        **args,
    )
    trainer = hf.Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model = tiny_vit()
    quiet(model, 0.5)
    train(model, tmp_path / "whole")
    # the checkpoint has the names of older releases, which `Trainer` alone would not find
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in saved

    again = hf.ViTForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    for parameter in again.parameters():
        nn.init.normal_(parameter)
    quiet(again)
    train(again, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_weights_in_the_present_layout_load_as_ever() -> None:
    model, weights = tiny_vit(), tiny_vit().state_dict()
    quiet(model, 0.3)
    model.load_state_dict(weights)
    partial = {"classifier.weight": torch.zeros(5, 32), "other": torch.zeros(1)}
    result = model.load_state_dict(partial, strict=False)
    assert result.unexpected_keys == ["other"]
    assert torch.equal(model.classifier.weight, torch.zeros(5, 32))
    assert torch.equal(model.vit.layernorm.weight, weights["vit.layernorm.weight"])
