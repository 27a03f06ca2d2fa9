"""A configuration takes nothing from a checkpoint that decides what its reader saves next, or where code comes from."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from small_runs import SHAPE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    PreTrainedConfig,
    ViTConfig,
)

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, DropKeyViTModel
from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.models.configuration_dropkey import shadowing_fields


EVIL = "evil/x--m.P"
SHADOWS: dict[str, Any] = {
    "family_auto_map": {"AutoModel": EVIL},
    "modeling_file": "evil.py",
    "validate_dropkey": None,
    "validate": None,
    "to_dict": {"auto_map": {"AutoModel": EVIL}},
    "to_diff_dict": {},
    "to_json_string": "{}",
    "save_pretrained": None,
    "_auto_class": "AutoModel",
    "attribute_map": {"hidden_size": "num_labels"},
    "sub_configs_defaults": {"vision_config": {}},
    "extra_files": ["evil.safetensors"],
    "_remove_keys_not_serialized": None,
    "__class__": "x",
    "__dict__": {},
    "__reduce_ex__": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", SHADOWS)
def test_fields_that_shadow_the_class_are_refused_by_name(folder, name):
    if not hasattr(DropKeyViTConfig, name):
        pytest.skip(f"configurations of Transformers {transformers.__version__} have no {name} to shadow")
    change(folder, **{name: SHADOWS[name]})
    for load in (AutoConfig, DropKeyViTConfig, AutoModelForImageClassification, DropKeyViTForImageClassification):
        with pytest.raises(ValueError, match=rf"config\.json has {name} as fields, .* could plant code"):
            load.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_them(family):
    with pytest.raises(ValueError, match="config.json has family_auto_map, modeling_file as fields"):
        FAMILIES[family].config_class(family_auto_map={}, modeling_file="x")


def test_what_configurations_have_as_properties_and_fields_is_no_shadow():
    known = ["num_labels", "torch_dtype", "id2label", "hidden_size", "name_or_path", "output_attentions", "model_type"]
    for cls in (PreTrainedConfig, ViTConfig, CLIPConfig, DropKeyViTConfig):
        assert shadowing_fields(cls, [*known, "auto_map", "attn_implementation", "rope_scaling", "my_own_field"]) == []
    config = DropKeyViTConfig(num_labels=3, dtype="float32", attn_implementation="eager", my_own_field={"a": 1})
    assert config.num_labels == 3 and config.my_own_field == {"a": 1}


@pytest.mark.parametrize(
    "auto_map",
    [
        {
            "AutoModel": EVIL,
            "AutoConfig": EVIL,
            "AutoModelForImageClassification": EVIL,
            "AutoModelForObjectDetection": EVIL,
        },
        {"AutoModel": {"pil": EVIL}, "AutoImageProcessor": [EVIL, None]},
        {"AutoModel": "/elsewhere/evil.P", "AutoConfig": "../evil.P"},
        {"AutoModel": "evil.P", "AutoModelForImageClassification": "compatibility.check_transformers"},
        [EVIL, None],
        EVIL,
        3,
    ],
)
def test_the_references_of_a_checkpoint_are_not_handed_on(folder, tmp_path, auto_map):
    """Loaded without remote code by the installed class, saved elsewhere and over itself: only our own references."""
    (folder / "evil.py").write_text("class P: pass\n")
    (tmp_path / "evil.py").write_text("class P: pass\n")
    change(folder, auto_map=auto_map)
    model = DropKeyViTForImageClassification.from_pretrained(folder)
    for target in (tmp_path / "mine", folder):
        model.save_pretrained(target)
        assert saved_config(target)["auto_map"] == DropKeyViTConfig.family_auto_map


@pytest.mark.parametrize(
    "pipelines",
    [{"x": {"impl": EVIL}}, {"x": {"impl": "evil.P"}}, {"x": {"impl": {"a": 1}}}, {"x": "evil.P"}, ["x"], "x"],
)
def test_pipelines_of_a_checkpoint_are_not_handed_on(folder, tmp_path, pipelines):
    (folder / "evil.py").write_text("class P: pass\n")
    change(folder, custom_pipelines=pipelines)
    model = DropKeyViTForImageClassification.from_pretrained(folder)
    for target in (tmp_path / "mine", folder):
        model.save_pretrained(target)
        assert not saved_config(target).get("custom_pipelines")


def test_a_pipeline_that_is_loaded_is_handed_on(tmp_path):
    config = DropKeyViTConfig(**SHAPE)
    config.custom_pipelines = {"x": {"impl": "configuration_dropkey_vit.DropKeyViTConfig"}, "y": {"impl": EVIL}}
    config.save_pretrained(tmp_path)
    assert saved_config(tmp_path)["custom_pipelines"] == {"x": {"impl": "configuration_dropkey_vit.DropKeyViTConfig"}}
    assert set(config.custom_pipelines) == {"x", "y"}


def test_a_name_in_the_file_does_not_say_where_code_comes_from(folder):
    change(folder, _name_or_path="evil/x")
    config = AutoConfig.from_pretrained(folder)
    assert config.name_or_path == str(folder)
    assert type(AutoModel.from_config(config)) is DropKeyViTModel


def test_a_familys_pipelines_are_saved_though_no_model_imports_them(tmp_path: Path) -> None:
    class WithPipeline(DropKeyViTConfig):
        family_pipelines = {"body": {"impl": "pipeline_dropkey_mesh.BodyMeshPipeline", "pt": ["AutoModel"]}}

    DropKeyViTConfig(**SHAPE).save_pretrained(tmp_path / "without")
    WithPipeline(**SHAPE).save_pretrained(tmp_path / "with")
    before, now = ({file.name for file in (tmp_path / name).iterdir()} for name in ("without", "with"))
    assert now - before == {"pipeline_dropkey_mesh.py"}
    assert list(saved_config(tmp_path / "with")["custom_pipelines"]) == ["body"]
