"""Every family is made from arguments, from scratch and from a saved folder; models that cannot work are errors before they are made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_dropkey.classification.arguments import (
    AugmentationArguments,
    ClassificationDropKeyArguments,
    DataArguments,
    ModelArguments,
)
from hf_dropkey.classification.data import ImageData, load_image_data
from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.classification.model import (
    check_loss,
    fit_classes,
    image_size,
    made_size,
    make_config,
    make_image_processor,
    make_model,
)
from hf_dropkey.classification.transform import transform_rows


OTHERS = [name for name in FAMILIES if name != "vit"]


def config_of(digits: bool = True, dropkey: dict[str, Any] | None = None, **model: Any) -> Any:
    return make_config(ModelArguments(**model), ClassificationDropKeyArguments(**dropkey or {}), digits=digits)


def data_of(names: list[str], *, training: bool = True) -> ImageData:
    """Data with classes and no images."""
    ids = {number: number for number in range(len(names))}
    return ImageData(Dataset.from_dict({}) if training else None, Dataset.from_dict({}), "test", names, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_scratch_trains_on_its_own_images(family: str) -> None:
    arguments = ModelArguments(model_family=family)
    config = make_config(arguments, ClassificationDropKeyArguments(dropkey_ratio=0.2), digits=True)
    assert type(config) is FAMILIES[family].config_class
    assert config.dropkey_ratio == 0.2
    data = load_image_data(DataArguments(max_train_samples=4, max_eval_samples=2), training=True)
    data = fit_classes(data, config, arguments)
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
    ("arguments", "message"),
    [
        (
            {"model_family": "t2t_vit", "image_size": 72},
            "72 pixels is not a multiple of 16.* nearest sizes are 64 and 80",
        ),
        ({"model_family": "volo", "image_size": 12}, "12 pixels .* nearest sizes are 16"),
        ({"model_family": "ceit", "image_size": 225}, "nearest sizes are 224 and 240"),
        ({"image_size": 9}, "--image_size 9 is not a multiple of --patch_size 2"),
        (
            {"model_size": "huge"},
            r"--model_size huge is not a size of the family vit; choose from nano, tiny, small, base$",
        ),
        ({"model_size": "volo_d1"}, "choose from .*, or pass --model_family volo"),
        ({"model_family": "ceit", "patch_size": 8}, "the family ceit has no patch_size; leave out --patch_size"),
        ({"model_family": "volo", "num_hidden_layers": 8}, "the family volo has no num_hidden_layers"),
        ({"model_family": "t2t_vit", "intermediate_size": 8}, "the family t2t_vit has no intermediate_size"),
        ({"config_overrides": {"mix_token": True}}, r"\['mix_token'\], not fields of the family vit; it has \["),
        ({"config_overrides": {"num_labels": 3}}, r"\['num_labels'\], not fields of the family vit"),
        ({"config_overrides": {"hidden_size": 32}}, "arguments of their own: pass --hidden_size"),
        ({"model_family": "volo", "config_overrides": {"depths": [0, 1]}}, r"`depths` must hold .* got \[0, 1\]"),
        ({"model_family": "volo", "config_overrides": {"depths": 3}}, "depths"),
        (
            {"model_family": "volo", "config_overrides": {"mix_token": True, "dense_head": False}},
            "needs dense_head=True",
        ),
    ],
)
def test_shapes_that_cannot_be_are_reported(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
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
    fit_classes(data_of(["cat", "dog"]), config, ModelArguments())
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
    fit_classes(data_of(["cat", "dog"]), config, arguments)
    model = make_model(config, arguments)
    assert type(model) is type(before) and model.config.dropkey_ratio == 0.3
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert made_size(make_image_processor(config, arguments, digits=True)) == (32, 32)
    with pytest.raises(ValueError, match="3 classes that the model does not know: a, b, c; the model knows cat, dog"):
        fit_classes(data_of(["a", "b", "c"]), config, arguments)
    arguments.ignore_mismatched_sizes = True
    fit_classes(data_of(["a", "b", "c"]), config, arguments)
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
    fit_classes(data_of(["cat", "dog", "cow"]), config, arguments)
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


def classifier(folder: Path, id2label: dict[str, Any]) -> ModelArguments:
    """A stock ViT of two classes, whose config.json then gets an `id2label`."""
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    model = ViTForImageClassification(ViTConfig(**settings))
    # new weights that differ from the old ones everywhere
    torch.nn.init.constant_(model.classifier.weight, 7.0)
    torch.nn.init.constant_(model.classifier.bias, 7.0)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": id2label}))
    return ModelArguments(model_name_or_path=str(folder))


def fitted(arguments: ModelArguments, names: list[str], *, training: bool = True) -> tuple[ImageData, Any]:
    config = make_config(arguments, ClassificationDropKeyArguments(), digits=True)
    return fit_classes(data_of(names, training=training), config, arguments), config


@pytest.mark.parametrize("new_head", [False, True])
def test_known_names_keep_the_numbers_of_a_pretrained_head(tmp_path: Path, new_head: bool) -> None:
    arguments = classifier(tmp_path, {"0": "dog", "1": "cat"})
    arguments.ignore_mismatched_sizes = new_head
    data, config = fitted(arguments, ["cat", "dog"])
    assert data.label_names == ["dog", "cat"] and data.label_ids == {0: 1, 1: 0}
    assert config.id2label == {0: "dog", 1: "cat"}
    assert (make_model(config, arguments).classifier.weight == 7).all()


def test_data_of_some_of_a_models_classes_keeps_all_of_them(tmp_path: Path) -> None:
    arguments = classifier(tmp_path, {"0": "dog", "1": "cat"})
    data, config = fitted(arguments, ["cat"])
    assert data.label_ids == {0: 1} and config.num_labels == 2


def test_other_names_need_a_word_and_then_a_new_head(tmp_path: Path) -> None:
    arguments = classifier(tmp_path, {"0": "dog", "1": "cat"})
    with pytest.raises(ValueError, match=r"does not know: bus, car; .* class scores with --ignore_mismatched_sizes"):
        fitted(arguments, ["bus", "car"])
    arguments.ignore_mismatched_sizes = True
    data, config = fitted(arguments, ["bus", "car"])
    assert data.label_ids == {0: 0, 1: 1} and config.id2label == {0: "bus", 1: "car"}
    model = make_model(config, arguments)
    # the counts agree, so that only the names show that these scores were for other classes
    assert (model.classifier.weight != 7).all() and (model.classifier.bias == 0).all()


def test_new_class_scores_are_not_evaluated_without_training(tmp_path: Path) -> None:
    arguments = classifier(tmp_path, {"0": "dog", "1": "cat"})
    with pytest.raises(ValueError, match=r"does not know: bus") as caught:
        fitted(arguments, ["bus", "cat"], training=False)
    assert "--ignore_mismatched_sizes" not in str(caught.value)
    arguments.ignore_mismatched_sizes = True
    with pytest.raises(ValueError, match=r"--ignore_mismatched_sizes .* without --do_train random ones"):
        fitted(arguments, ["cat", "dog"], training=False)
    (tmp_path / "bare").mkdir()
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    ViTForImageClassification(ViTConfig(**settings)).vit.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no class scores, and without --do_train random ones"):
        fitted(ModelArguments(model_name_or_path=str(tmp_path / "bare")), ["cat", "dog"], training=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"1": "cat", "2": "dog"}, r"numbers its 2 classes 1 'cat', 2 'dog' in id2label; the numbers must be 0 to 1"),
        ({"0": "cat", "5": "dog"}, r"numbers its 2 classes 0 'cat', 5 'dog' in id2label"),
        ({"0": "cat", "1": "cat"}, r"does not know: dog"),
        ({"cat": 0, "dog": 1}, r"has id2label with 'cat', 'dog' in place of class numbers; .*repair it"),
    ],
)
def test_class_numbers_that_cannot_be_used_are_reported(
    tmp_path: Path, id2label: dict[str, Any], message: str, training: bool
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(classifier(tmp_path, id2label), ["cat", "dog"], training=training)


def test_one_name_for_two_classes_matters_where_the_data_has_it(tmp_path: Path) -> None:
    arguments = classifier(tmp_path, {"0": "crane", "1": "crane"})
    with pytest.raises(ValueError, match=r"has the classes \[0, 1\] under one name, 'crane'"):
        fitted(arguments, ["crane"])
    # as ImageNet's crane, bird and machine
    arguments = classifier(tmp_path, {"0": "crane", "1": "crane", "2": "cat"})
    assert fitted(arguments, ["cat"])[0].label_ids == {0: 2}


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data has one class, 'cat', which any model gets right"):
        fitted(ModelArguments(), ["cat"], training=False)
