"""What a loop has from the package is as in `Trainer`: its optimizer, its weights after a resume, its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SHAPE
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_dropkey.training.loop import check_followed, delete_old_checkpoints, load_saved_weights, make_optimizer
from hf_dropkey.training.record import loss_of_process


def tiny() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**{**SHAPE, "num_hidden_layers": 2}, num_labels=3))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), do_train=True, use_cpu=True, report_to="none", **changes)


def contents(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    names = ("lr", "weight_decay", "betas", "eps")
    return [(*map(id, group["params"]), *(group[name] for name in names)) for group in optimizer.param_groups]


def test_the_optimizer_is_that_of_the_trainer(tmp_path: Path) -> None:
    model, training = tiny(), arguments(tmp_path, learning_rate=0.003, weight_decay=0.07, adam_beta2=0.95)
    model.vit.embeddings.requires_grad_(False)
    ours, theirs = make_optimizer(model, training, {}), Trainer(model, training).create_optimizer()
    assert contents(ours) == contents(theirs) and type(ours) is type(theirs)
    assert {group["weight_decay"] for group in ours.param_groups} == {0.07, 0.0}
    rates = make_optimizer(model, training, {"classifier.weight": 10.0, "classifier.bias": 10.0})
    assert sorted({group["lr"] for group in rates.param_groups}) == pytest.approx([0.003, 0.03])


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_the_weights_of_a_checkpoint_are_loaded_also_from_several_files(shard: str, tmp_path: Path) -> None:
    saved, model = tiny(), tiny()
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").is_file() == (shard == "1GB")
    load_saved_weights(model, tmp_path)
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_weights_of_an_adapter_are_loaded(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        settings = peft.LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
        return peft.get_peft_model(tiny(), settings)

    saved, model = adapted(), adapted()
    trained = [parameter for parameter in saved.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_()
    saved.save_pretrained(tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
    load_saved_weights(model, tmp_path)
    assert trained and all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("limit", "left"), [(None, [2, 4, 10]), (2, [4, 10]), (1, [10])])
def test_the_newest_checkpoints_are_left(limit: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (10, 2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "other").mkdir()
    delete_old_checkpoints(tmp_path, limit)
    assert {folder.name for folder in tmp_path.iterdir()} == {"other", *(f"checkpoint-{step}" for step in left)}


def test_the_sums_of_another_number_of_processes_are_averaged() -> None:
    assert loss_of_process([1.0, 3.0], 1, 2) == 3.0
    assert loss_of_process([1.0, 3.0], 0, 1) == loss_of_process([1.0, 3.0], 3, 4) == 2.0


def test_arguments_that_the_loop_does_not_follow_are_named(tmp_path: Path) -> None:
    check_followed(arguments(tmp_path, learning_rate=0.1))
    with pytest.raises(
        ValueError, match="this loop has no label_smoothing_factor, torch_compile.*; leave out --label"
    ):
        check_followed(arguments(tmp_path, label_smoothing_factor=0.1, torch_compile=True))
    with pytest.raises(ValueError, match="nothing to do; pass --do_train, --do_eval or both"):
        check_followed(TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
