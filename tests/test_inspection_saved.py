"""The report on a saved configuration equals the behaviour of the loaded model."""

import json
import re
from pathlib import Path

import pytest
import small_runs
import torch
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
from hf_dropkey.cli import main
from hf_dropkey.inspection.saved import attention_report, empty_model, inspect_folder
from hf_dropkey.models.attention import default_device


SHAPE = {**small_runs.SHAPE, "num_hidden_layers": 3}
FAMILIES = {
    "vit": (DropKeyViTForImageClassification, DropKeyViTConfig(**SHAPE, dropkey_ratio=0.3)),
    "t2t_vit": (DropKeyT2TViTForImageClassification, DropKeyT2TViTConfig.from_size("t2t_vit_7", dropkey_ratio=0.3)),
    "volo": (DropKeyVoloForImageClassification, DropKeyVoloConfig.from_size("volo_d1", dropkey_ratio=0.3)),
    "ceit": (DropKeyCeitForImageClassification, DropKeyCeitConfig.from_size("ceit_tiny", dropkey_ratio=0.3)),
}

# the attentions that the schedule runs over, in order
SITES = {
    "vit": [f"vit.layers.{n}" for n in range(3)],
    "t2t_vit": [f"t2t_vit.layers.{n}" for n in range(7)],
    "volo": [
        *(f"volo.outlook_layers.{n}" for n in range(4)),
        *(f"volo.stages.{stage}.{n}" for stage, layers in enumerate([4, 8, 2]) for n in range(layers)),
        *(f"volo.class_layers.{n}" for n in range(2)),
    ],
    "ceit": [*(f"ceit.layers.{n}" for n in range(12)), "ceit.class_layer"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_ratios_of_one_with(family, tmp_path):
    cls, config = FAMILIES[family]
    config.architectures = [cls.__name__]
    config.save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    assert type(empty) is cls and {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    report = attention_report(empty)
    names = SITES[family]
    assert [site.name for site in report.sites] == [f"{name}.attention" for name in names]
    ramp = [0.3 * (1 - depth / (len(names) - 1)) for depth in range(len(names))]
    assert [site.ratio for site in report.sites] == pytest.approx(ramp)
    modules = dict(cls(config).named_modules())
    assert [modules[site.name].dropkey_ratio for site in report.sites] == [site.ratio for site in report.sites]
    shown = inspect_folder(tmp_path)
    assert "schedule      decreasing" in shown and all(site.name in shown for site in report.sites)


@pytest.mark.parametrize(
    ("dtype", "matrix_units", "backend"),
    [(torch.float32, False, "sdpa"), (torch.bfloat16, False, "eager"), (torch.bfloat16, True, "sdpa")],
)
def test_the_reported_backend_is_that_of_the_loaded_model(tmp_path, monkeypatch, dtype, matrix_units, backend):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    config = DropKeyViTConfig(**SHAPE, dropkey_ratio=0.3)
    DropKeyViTForImageClassification(config).to(dtype).save_pretrained(tmp_path)
    loaded = DropKeyViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and loaded.config._attn_implementation == backend
    assert [site.backend for site in attention_report(empty_model(tmp_path)).sites] == [backend] * 3
    moved = DropKeyViTForImageClassification.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert [site.backend for site in attention_report(moved).sites] == ["flex_attention"] * 3


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
    with pytest.raises(ValueError, match="was saved as MyOwn, which is not a model of hf_dropkey or Transformers"):
        inspect_folder(tmp_path)


LARGE = 1_000_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "was saved as no named class"),
        ({"architectures": []}, "was saved as no named class"),
        ({"architectures": 3}, r"was saved as 3, which is not a model|cannot be used .*architectures"),
        ({"architectures": [None]}, r"was saved as None, which is not a model|cannot be used .*architectures"),
        (
            {"architectures": {"a": 1}},
            r"which is not a model of hf_dropkey or Transformers|cannot be used .*architectures",
        ),
        ({"architectures": ["AutoModel"]}, "was saved as AutoModel, which is not a model"),
        ({"architectures": ["pipeline"]}, "was saved as pipeline, which is not a model"),
        ({"architectures": ["ViTConfig"]}, "was saved as ViTConfig, which is not a model"),
        (
            {"architectures": ["PreTrainedModel"]},
            "PreTrainedModel, which has no configuration of model_type 'dropkey_vit'",
        ),
        ({"architectures": ["BertModel"]}, "BertModel, which has no configuration of model_type 'dropkey_vit'"),
        ({"num_labels": LARGE}, r"config\.json has num_labels 1000000000, but its weights hold at most 10000 classes"),
        ({"num_labels": float("inf")}, r"config\.json has num_labels \d+, but its weights hold at most"),
        ({"num_labels": -1}, r"config\.json has num_labels -1, which is below 0"),
        ({"num_hidden_layers": LARGE}, r"config\.json has num_hidden_layers 1000000000"),
        ({"vision_config": {"depths": [1, LARGE]}}, r"config\.json has depths 1000000001"),
        ({"hidden_size": 10**12}, r"config\.json makes no DropKeyViTForImageClassification|cannot be loaded"),
        ({"num_attention_heads": 0}, r"config\.json cannot be used .*`num_attention_heads` must be at least 1"),
        ({"model_type": ["vit"]}, r"config\.json cannot be used"),
        ({"model_type": "nosuch"}, r"config\.json cannot be used"),
        ({"id2label": ["cat"]}, r"config\.json cannot be used"),
        ({"id2label": {"first": "cat"}}, r"config\.json cannot be used"),
        ({"dtype": [1]}, r"config\.json makes no|cannot be loaded"),
        ({"dtype": "float99"}, r"config\.json cannot be used"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(tmp_path, capsys, changes, message):
    folder = tmp_path / "odd"
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for command in (["info", str(folder)], ["export", str(folder), str(tmp_path / "plain")]):
        capsys.readouterr()
        assert main(command) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-dropkey")]
        assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "plain").exists()


def test_without_weights_only_what_no_model_has_is_refused(tmp_path):
    DropKeyViTConfig(**SHAPE, architectures=["DropKeyViTForImageClassification"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_labels": 22_000}))
    assert "schedule" in inspect_folder(tmp_path)
    file.write_text(json.dumps({**config, "num_labels": LARGE}))
    with pytest.raises(ValueError, match="num_labels 1000000000, but at most 1000000 are allowed"):
        inspect_folder(tmp_path)


def test_a_build_for_gpus_without_a_driver_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert default_device() == torch.device("cpu")
    model = DropKeyViTForImageClassification._from_config(DropKeyViTConfig(**SHAPE), dtype=torch.bfloat16)
    assert model.config._attn_implementation == "eager"
