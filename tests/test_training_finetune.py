"""Freezing, layer-wise learning-rate decay and the head's rate act on the parameters that they name, and resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from stock_models import MODELS, SMALL, VIT, job, saved

from hf_dropkey import (
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
)
from hf_dropkey.training.finetune import FineTuningArguments, depths, freeze, layers_of, learning_rates, split_groups


HEAD = ["classifier"]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_ordered_from_the_embeddings_to_the_head(name: str) -> None:
    model_class, config = MODELS[name]
    found, layers = depths(model := model_class(config), HEAD)
    assert layers == len(layers_of(model)) == (4 if config.model_type == "swin" else 3)
    assert set(found.values()) == {*range(layers + 1), *([layers + 1])}
    patches = [depth for name, depth in found.items() if "patch_embed" in name]
    assert patches and set(patches) == {0}
    assert all(depth == layers + 1 for name, depth in found.items() if name.startswith("classifier"))
    assert list(found.values()) == sorted(found.values()), "the depth grows in the order of registration"


def test_families_of_this_package_are_ordered_too() -> None:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**VIT))
    assert layers_of(model) == [f"vit.layers.{number}" for number in range(3)]
    shape: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 16}
    found, layers = depths(DropKeyCeitForImageClassification(DropKeyCeitConfig(**shape)), HEAD)
    # three layers, and the attention of the class token over them
    assert layers == 4 and max(found.values()) == 5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"freeze_layers": -1}, "--freeze_layers -1 is below 0"),
        ({"layer_decay": 0.0}, r"--layer_decay 0.0 is outside \(0, 1\]"),
        ({"layer_decay": 1.5}, r"--layer_decay 1.5 is outside \(0, 1\]"),
        ({"head_learning_rate": 0.0}, "--head_learning_rate 0.0 is not above 0"),
    ],
)
def test_values_outside_their_range_are_errors(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FineTuningArguments(**arguments)


def test_freezing_random_weights_or_adapters_is_an_error() -> None:
    with pytest.raises(ValueError, match="--freeze_layers 2 would leave random weights as they are"):
        FineTuningArguments(freeze_layers=2).check(source=None, lora=False)
    with pytest.raises(ValueError, match="--freeze_layers 2 with --lora_r"):
        FineTuningArguments(freeze_layers=2).check(source="there", lora=True)


def test_the_first_layers_are_frozen_and_more_than_there_are_is_an_error() -> None:
    def vit() -> hf.ViTForImageClassification:
        return hf.ViTForImageClassification(hf.ViTConfig(**VIT))

    freeze(model := vit(), 2, HEAD)
    frozen = {name for name, part in model.named_parameters() if not part.requires_grad}
    assert all(name.startswith(("vit.embeddings", "vit.layers.0", "vit.layers.1")) for name in frozen)
    assert sum(name.startswith("vit.layers.1.") for name in frozen) == 16
    freeze(model := vit(), 3, HEAD)
    trained = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"vit.layernorm", "classifier.weight", "classifier.bias"}
    freeze(model := vit(), 0, HEAD)
    assert all(part.requires_grad for part in model.parameters())
    with pytest.raises(ValueError, match="--freeze_layers 4 is more than the 3 layers of ViTForImageClassification"):
        freeze(model, 4, HEAD)


def test_each_parameter_gets_the_rate_of_its_layer() -> None:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT))
    assert learning_rates(model, FineTuningArguments(), HEAD, 0.1) == {}
    rates = learning_rates(model, FineTuningArguments(layer_decay=0.5, head_learning_rate=0.4), HEAD, 0.1)
    assert rates["vit.embeddings.cls_token"] == 0.5**4 and rates["vit.layers.2.attention.q_proj.weight"] == 0.5
    assert rates["vit.layernorm.weight"] == 1 and rates["classifier.weight"] == pytest.approx(4)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [part for _, part in named[:50]]},
            {"params": [part for _, part in named[50:]], "weight_decay": 0},
        ],
        lr=0.1,
    )
    split_groups(optimizer, model, rates)
    got = {id(part): group["lr"] for group in optimizer.param_groups for part in group["params"]}
    assert len(got) == len(named)
    assert all(got[id(part)] == pytest.approx(0.1 * rates[name]) for name, part in named)
    without = torch.optim.AdamW(model.parameters(), lr=0.1)
    without.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="AdamW sets its learning rate itself; leave out --layer_decay"):
        split_groups(without, model, rates)


@pytest.mark.usefixtures("auto_image_processor")
def test_a_run_trains_what_is_not_frozen_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    source = saved("dinov2", tmp_path / "source")
    words = ("--freeze_layers", "1", "--layer_decay", "0.5", "--head_learning_rate", "0.05", "--weight_decay", "0.1")
    job(source, tmp_path / "whole", *words).execute(["train"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "whole"))
    changed = {
        name: float((after[f"dinov2.{name}"] - value).abs().max())
        for name, value in before.items()
        if f"dinov2.{name}" in after
    }
    kept = [name for name, change in changed.items() if change == 0]
    # the token for masked patches is not used
    assert all(name.startswith(("embeddings.", "encoder.layer.0.")) for name in kept) and len(kept) > 15
    assert changed["encoder.layer.1.mlp.fc1.weight"] < changed["encoder.layer.2.mlp.fc1.weight"]

    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    other = [*words[:2], "--layer_decay", "0.9", *words[4:], "--resume_from_checkpoint", "true"]
    with pytest.raises(ValueError, match=r"other settings: --layer_decay 0.5 there and 0.9 here. Resume with those"):
        job(source, tmp_path / "run", *other).execute(["train"])
    job(source, tmp_path / "run", *words, "--resume_from_checkpoint", "true").execute(["train"])
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.usefixtures("auto_image_processor")
def test_adapters_have_the_rates_of_their_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    training = job(
        saved("vit", tmp_path / "source"),
        tmp_path / "run",
        "--lora_r",
        "2",
        "--layer_decay",
        "0.5",
        "--learning_rate",
        "0.1",
    )
    training.check()
    data = training.load()
    trainer = training.trainer(training.make_model(data), data)
    optimizer = trainer.create_optimizer()
    names = {id(part): name for name, part in trainer.model.named_parameters()}
    rates = {names[id(part)]: group["lr"] for group in optimizer.param_groups for part in group["params"]}
    first = rates["base_model.model.vit.layers.0.attention.q_proj.lora_A.default.weight"]
    last = rates["base_model.model.vit.layers.2.attention.q_proj.lora_A.default.weight"]
    assert last == pytest.approx(4 * first)
    assert rates["base_model.model.classifier.modules_to_save.default.weight"] == pytest.approx(8 * first)
