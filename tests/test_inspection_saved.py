"""The report on a saved configuration equals the behaviour of the loaded model."""

import json
from pathlib import Path

import pytest
import small_runs
from transformers import ViTConfig, ViTForImageClassification

from hf_dropkey import (
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyT2TViTConfig,
    DropKeyT2TViTForImageClassification,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyVoloConfig,
    DropKeyVoloForImageClassification,
    apply_dropkey,
)
from hf_dropkey.inspection.saved import attention_report, empty_model, inspect_folder


SHAPE = {**small_runs.SHAPE, "num_hidden_layers": 3}
FAMILIES = {
    "vit": (DropKeyViTForImageClassification, DropKeyViTConfig(**SHAPE, dropkey_ratio=0.3)),
    "t2t_vit": (DropKeyT2TViTForImageClassification, DropKeyT2TViTConfig.from_size("t2t_vit_7", dropkey_ratio=0.3)),
    "volo": (DropKeyVoloForImageClassification, DropKeyVoloConfig.from_size("volo_d1", dropkey_ratio=0.3)),
    "ceit": (DropKeyCeitForImageClassification, DropKeyCeitConfig.from_size("ceit_tiny", dropkey_ratio=0.3)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_ratios_of_one_with(family, tmp_path):
    cls, config = FAMILIES[family]
    config.architectures = [cls.__name__]
    config.save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    assert type(empty) is cls and {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    report = attention_report(empty)
    full = cls(config)
    modules = dict(full.named_modules())
    assert len(report.sites) >= 3 and report.sites[0].ratio > report.sites[-1].ratio
    for site in report.sites:
        assert (site.ratio, site.backend) == (modules[site.name].dropkey_ratio, config._attn_implementation or "sdpa")
    shown = inspect_folder(tmp_path)
    assert "schedule      decreasing" in shown and all(site.name in shown for site in report.sites)


def test_a_patched_and_a_plain_model(tmp_path):
    model = ViTForImageClassification(ViTConfig(**SHAPE))
    model.save_pretrained(tmp_path / "plain")
    expected = apply_dropkey(model, 0.2, schedule="constant", exclude="vit.layers.1.*", verbose=False)
    model.save_pretrained(tmp_path / "patched")
    assert inspect_folder(tmp_path / "plain") == (
        "ViTForImageClassification: no DropKey settings; apply_dropkey(model, ratio=...) can reach 3 attentions"
    )
    assert attention_report(empty_model(tmp_path / "patched")) == expected
    assert str(expected) in inspect_folder(tmp_path / "patched")


def test_an_unknown_class_and_a_missing_configuration_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone has no config.json"):
        inspect_folder(tmp_path / "gone")
    DropKeyViTConfig(**SHAPE, architectures=["MyOwn"]).save_pretrained(tmp_path)
    assert json.loads((Path(tmp_path) / "config.json").read_text())["architectures"] == ["MyOwn"]
    with pytest.raises(ValueError, match="was saved as MyOwn, which neither hf_dropkey nor Transformers has"):
        inspect_folder(tmp_path)
