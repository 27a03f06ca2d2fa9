"""Every family is made from arguments, from scratch and from a saved folder; what cannot work is told before it is made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_dropkey.classification.arguments import (
    AugmentationArguments,
    ClassificationDropKeyArguments,
    DataArguments,
    ModelArguments,
)
from hf_dropkey.classification.data import load_image_data
from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.classification.model import (
    check_loss,
    image_size,
    made_size,
    make_config,
    make_image_processor,
    make_model,
    set_classes,
)
from hf_dropkey.classification.transform import transform_rows


OTHERS = [name for name in FAMILIES if name != "vit"]


def config_of(digits: bool = True, dropkey: dict[str, Any] | None = None, **model: Any) -> Any:
    return make_config(ModelArguments(**model), ClassificationDropKeyArguments(**dropkey or {}), digits=digits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_scratch_trains_on_its_own_images(family: str) -> None:
    arguments = ModelArguments(model_family=family)
    config = make_config(arguments, ClassificationDropKeyArguments(dropkey_ratio=0.2), digits=True)
    assert type(config) is FAMILIES[family].config_class
    assert config.dropkey_ratio == 0.2
    data = load_image_data(DataArguments(max_train_samples=4, max_eval_samples=2), training=True)
    set_classes(config, arguments, data.label_names)
    model = make_model(config, arguments).train()
    processor = make_image_processor(config, arguments, digits=True)
    augmentation = AugmentationArguments().augmentation(image_size(config), digits=True)
    transform_rows(data, processor, config, augmentation, seed=0)
    rows = data.train[:4]
    assert rows["pixel_values"].shape == (4, 3, *image_size(config)) == (4, 3, *made_size(processor))
    assert data.evaluation[:2]["pixel_values"].shape[1:] == rows["pixel_values"].shape[1:]
    model(rows["pixel_values"], labels=torch.tensor(rows["labels"])).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", OTHERS)
def test_published_sizes_by_name(family: str) -> None:
    about = FAMILIES[family]
    usual = config_of(model_family=family, digits=False).to_dict()
    assert usual == about.config_class.from_size(about.usual_size, num_channels=3).to_dict()
    last = list(about.sizes)[-1]
    found = config_of(model_family=family, model_size=last, image_size=384, dropkey={"dropkey_schedule": "constant"})
    assert found.to_dict() == about.config_class.from_size(last, image_size=384, dropkey_schedule="constant").to_dict()


def test_overrides_reach_the_configuration() -> None:
    given = {"depths": [1, 2], "mix_token": True, "drop_path_rate": 0.1}
    config = config_of(model_family="volo", config_overrides=given)
    assert (config.depths, config.mix_token, config.drop_path_rate) == ([1, 2], True, 0.1)
    assert config_of(model_family="t2t_vit", config_overrides={"dropkey_token_stage": True}).dropkey_token_stage


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"model_family": "t2t_vit", "image_size": 72},
            "72 pixels is not a multiple of 16.* nearest sizes are 64 and 80",
        ),
        ({"model_family": "volo", "image_size": 12}, "12 pixels .* nearest sizes are 16"),
        ({"model_family": "ceit", "image_size": 225}, "nearest sizes are 224 and 240"),
        ({"image_size": 9}, "image_size=9 is not a multiple of patch_size=2"),
        ({"model_size": "huge"}, r"'huge' is no size of the family vit; choose from nano, tiny, small, base$"),
        ({"model_size": "volo_d1"}, "choose from .*, or pass --model_family volo"),
        ({"model_family": "ceit", "patch_size": 8}, "the family ceit has no patch_size; leave out --patch_size"),
        ({"model_family": "volo", "num_hidden_layers": 8}, "the family volo has no num_hidden_layers"),
        ({"model_family": "t2t_vit", "intermediate_size": 8}, "the family t2t_vit has no intermediate_size"),
        ({"config_overrides": {"mix_token": True}}, r"\['mix_token'\], no fields of the family vit; it has \["),
        ({"config_overrides": {"num_labels": 3}}, r"\['num_labels'\], no fields of the family vit"),
        ({"config_overrides": {"hidden_size": 32}}, "arguments of their own: pass --hidden_size"),
        ({"model_family": "volo", "config_overrides": {"depths": [0, 1]}}, r"`depths` must hold .* got \[0, 1\]"),
        ({"model_family": "volo", "config_overrides": {"depths": 3}}, "depths"),
        (
            {"model_family": "volo", "config_overrides": {"mix_token": True, "dense_head": False}},
            "needs dense_head=True",
        ),
    ],
)
def test_shapes_that_cannot_be_are_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(Exception, match=told) as caught:
        config_of(**arguments)
    # the configuration's own error class is not a ValueError
    assert isinstance(caught.value, ValueError) or "Strict" in type(caught.value).__name__


def test_label_smoothing_would_leave_the_dense_head_untrained() -> None:
    config = config_of(model_family="volo")
    with pytest.raises(ValueError, match=r"--label_smoothing_factor 0\.1 replaces .* dense head of VOLO"):
        check_loss(config, label_smoothing=0.1)
    check_loss(config, label_smoothing=0.0)
    check_loss(config_of(model_family="volo", config_overrides={"dense_head": False}), label_smoothing=0.1)
    check_loss(config_of(), label_smoothing=0.1)


def saved(folder: Path, family: str, **changes: Any) -> Any:
    """A small model of a family with its image processor, in a folder."""
    config = config_of(model_family=family, image_size=32, config_overrides=changes or None)
    set_classes(config, ModelArguments(), ["cat", "dog"])
    arguments = ModelArguments(model_family=family)
    model = make_model(config, arguments)
    model.save_pretrained(folder)
    make_image_processor(config, arguments, digits=True).save_pretrained(folder)
    return model


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_of_a_family_is_where_training_starts(tmp_path: Path, family: str) -> None:
    before = saved(tmp_path, family)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    config = make_config(arguments, ClassificationDropKeyArguments(dropkey_ratio=0.3), digits=True)
    set_classes(config, arguments, ["cat", "dog"])
    model = make_model(config, arguments)
    assert type(model) is type(before) and model.config.dropkey_ratio == 0.3
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert made_size(make_image_processor(config, arguments, digits=True)) == (32, 32)
    with pytest.raises(ValueError, match="has 2 classes and the data has 3"):
        set_classes(config, arguments, ["a", "b", "c"])
    arguments.ignore_mismatched_sizes = True
    set_classes(config, arguments, ["a", "b", "c"])
    assert make_model(config, arguments).classifier.out_features == 3


def test_overrides_cannot_add_layers_to_a_pretrained_model(tmp_path: Path) -> None:
    saved(tmp_path, "volo", depths=[1, 1])
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides={"depths": [1, 2]})
    config = make_config(arguments, ClassificationDropKeyArguments(), digits=True)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the model, such as volo\.stages\.0\.1\."):
        make_model(config, arguments)


def test_a_pretrained_model_without_a_head_gets_one(tmp_path: Path) -> None:
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    ViTForImageClassification(ViTConfig(**settings)).vit.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    config = make_config(arguments, ClassificationDropKeyArguments(), digits=True)
    set_classes(config, arguments, ["cat", "dog", "cow"])
    assert make_model(config, arguments).classifier.out_features == 3


@pytest.mark.parametrize("code", [False, True])
def test_a_configuration_without_a_known_type_is_refused(tmp_path: Path, code: bool) -> None:
    saved(tmp_path, "ceit")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": None}
    if not code:
        del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    match = "pass --trust_remote_code" if code else "has model_type None, which Transformers does not know"
    with pytest.raises(ValueError, match=match):
        config_of(model_name_or_path=str(tmp_path))


def test_what_an_image_processor_makes() -> None:
    square = {"height": 8, "width": 8}
    assert made_size(ViTImageProcessorPil(size=square)) == (8, 8)
    crop = ViTImageProcessorPil(size={"shortest_edge": 12}, do_center_crop=True, crop_size=square)
    assert made_size(crop) == (8, 8)
    assert made_size(ViTImageProcessorPil(size={"shortest_edge": 12})) == (None, None)
