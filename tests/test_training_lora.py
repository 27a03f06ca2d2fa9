"""LoRA's arguments are checked before anything is loaded, and its targets are named in errors."""

import sys
from typing import Any

import pytest
import transformers as hf
from stock_models import MODELS, SWIN, VIT
from torch import nn

from hf_dropkey.training.lora import LoraArguments, add_lora, lora_targets, merged


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lora_r": 0}, "--lora_r 0 is below 1; choose for example 8"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha 0 is not above 0"),
        ({"lora_r": 4, "lora_dropout": 1.0}, r"--lora_dropout 1.0 is outside \[0, 1\)"),
        ({"lora_alpha": 8}, "--lora_alpha without --lora_r trains no adapter; pass for example --lora_r 8"),
        ({"merge_adapter": True}, "--merge_adapter without --lora_r"),
    ],
)
def test_values_outside_their_range_are_errors(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LoraArguments(**arguments)


def test_what_cannot_be_adapted_is_told_before_a_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = LoraArguments(lora_r=8)
    with pytest.raises(ValueError, match="--lora_r 8 adapts a pretrained model.*pass --model_name_or_path"):
        arguments.check(source=None, trains=True)
    with pytest.raises(ValueError, match="without --do_train they would be evaluated untrained"):
        arguments.check(source="there", trains=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"the extra 'peft': run pip install 'hf_dropkey\[peft\]'"):
        arguments.check(source="there", trains=True)
    LoraArguments().check(source=None, trains=False)


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_values_are_found_in_every_architecture(name: str) -> None:
    model_class, config = MODELS[name]
    model = model_class(config)
    found = lora_targets(model, None)
    # the second pair in releases of Transformers before their attentions had common names
    assert {target.rpartition(".")[2] for target in found} in ({"q_proj", "v_proj"}, {"query", "value"})
    assert all(isinstance(model.get_submodule(target), nn.Linear) for target in found)
    assert len(found) == 2 * (4 if config.model_type == "swin" else 3)


def test_targets_that_match_nothing_are_named() -> None:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VIT))
    with pytest.raises(
        ValueError, match=r"--lora_target_modules wrong query matches no linear layer.* end in .*q_proj"
    ):
        lora_targets(model, ["q_proj", "wrong", "query"])
    every = lora_targets(model, ["all-linear"], leave=["classifier"])
    assert "classifier" not in every and len(every) > len(lora_targets(model, ["q_proj", "o_proj"])) == 6


def test_only_adapters_and_the_named_modules_are_trained_and_merging_gives_them_to_the_model() -> None:
    pytest.importorskip("peft")
    model = hf.SwinForImageClassification(hf.SwinConfig(**SWIN))
    names = set(model.state_dict())
    adapted = add_lora(model, LoraArguments(lora_r=2), source="owner/name", revision="v1", trained=["classifier"])
    trained = [name for name, part in adapted.named_parameters() if part.requires_grad]
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    (config,) = adapted.peft_config.values()
    assert (config.base_model_name_or_path, config.revision, config.lora_alpha) == ("owner/name", "v1", 2)
    plain = merged(adapted)
    assert set(plain.state_dict()) == names
