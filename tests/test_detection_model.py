"""Tests of choosing a detection model: arguments, configurations, image processors, classes and learning rates."""

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hoi_models import tiny_model as tiny_hoi
from stock_architectures import build
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrImageProcessorPil,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    ResNetConfig,
    RTDetrImageProcessorPil,
    TrainingArguments,
    ViTConfig,
)

from hf_dropkey import apply_dropkey
from hf_dropkey.detection.arguments import MODEL_TYPES, DetectionDropKeyArguments, DetectionModelArguments
from hf_dropkey.detection.data import DetectionData, DetectionSplit
from hf_dropkey.detection.job import DetectionTrainer
from hf_dropkey.detection.model import MASKED_TYPES, fit_classes, make_config, make_model, make_processor, needs_mask
from hf_dropkey.detection.transform import DetectionCollator
from hf_dropkey.training.detr import backbone_parameters


TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_queries": 5, "encoder_layers": 1}
DATA = DetectionData(None, None, ["cat", "dog"], [3, 9])


def tiny(model_type: str, **more: Any) -> DetectionModelArguments:
    return DetectionModelArguments(model_type=model_type, image_size=64, **{**TINY, **more})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of them"),
        ({"model_type": "detr", "model_name_or_path": "x"}, "give one of them"),
        ({"model_type": "dab_detr"}, r"model_type='dab_detr' is not one of \['detr'"),
        (
            {"model_name_or_path": "x", "hidden_size": 8},
            r"fixes the shape of the model; leave out \{'hidden_size': 8\}",
        ),
        ({"model_type": "detr", "num_queries": 0}, "num_queries=0 is below 1"),
        ({"model_type": "detr", "image_size": -1}, "image_size=-1 is below 1"),
        ({"model_type": "detr", "dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
        ({"model_type": "detr", "patch_size": 8}, r"patch_size=8 means nothing for detr, only for \['yolos'\]"),
        ({"model_type": "yolos", "decoder_layers": 2}, "decoder_layers=2 means nothing for yolos"),
        ({"model_type": "rt_detr", "backbone_stride": 16}, "backbone_stride=16 means nothing for rt_detr"),
    ],
)
def test_arguments_that_contradict_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetectionModelArguments(**arguments)


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="hidden_size=18 must be a multiple of num_attention_heads=2 and of 4"):
        make_config(tiny("detr", hidden_size=18))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_from_scratch_has_the_shape_that_was_asked_for(model_type):
    arguments = tiny(model_type, dropout=0.25, auxiliary_loss=False)
    config = make_config(arguments)
    assert config.model_type == model_type and config.hidden_size == 16
    assert config.auxiliary_loss is False
    assert 0.25 in (getattr(config, "dropout", None), getattr(config, "hidden_dropout_prob", None))
    assert fit_classes(DATA, config, arguments) is DATA
    model = make_model(config, arguments)
    assert all(parameter.requires_grad for parameter in backbone_parameters(model))
    assert config.id2label == {0: "cat", 1: "dog"} and model.config.num_labels == 2
    processor = make_processor(config, arguments)
    size = {"shortest_edge": 64, "longest_edge": 64} if model_type in MASKED_TYPES else {"height": 64, "width": 64}
    assert {key: value for key, value in dict(processor.size).items() if value is not None} == size
    outputs = model.eval()(torch.zeros(1, 3, 64, 64))
    assert outputs.pred_boxes.shape == (1, 5, 4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_new_model_tells_its_queries_apart_and_expects_little(model_type):
    arguments = tiny(model_type)
    model: Any = make_model(make_config(arguments), arguments).eval()
    generator = torch.Generator().manual_seed(0)
    outputs = model(torch.rand(1, 3, 64, 64, generator=generator))
    # equal queries stay equal, whatever the training
    assert outputs.logits[0].std(dim=0).min() > 1e-6
    if model_type in MASKED_TYPES:
        assert 0.7 < model.model.query_position_embeddings.weight.std() < 1.3
    if model_type in ("conditional_detr", "rt_detr"):
        assert outputs.logits.sigmoid().mean() < 0.5
    if model_type == "conditional_detr":
        assert 0.005 < outputs.logits.sigmoid().mean() < 0.02


def test_other_models_and_incomplete_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks config.json"):
        make_config(DetectionModelArguments(model_name_or_path=str(tmp_path)))
    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged"):
        make_config(DetectionModelArguments(model_name_or_path=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model_type 'vit', which detects no objects .* conditional_detr, d_fine"):
        make_config(DetectionModelArguments(model_name_or_path=str(tmp_path)))


def test_a_backbone_of_timm_needs_timm(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    DetrConfig().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ImportError, match=r"timm, which is not installed.*--revision no_timm"):
        make_config(DetectionModelArguments(model_name_or_path=str(tmp_path)))


def resnet_detr() -> DetrForObjectDetection:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    return DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, d_model=16, num_queries=5, num_labels=3, **heads, **layers)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved DETR with a ResNet, for the classes N/A, dog and cat."""
    model = resnet_detr()
    model.config.id2label = {0: "N/A", 1: "dog", 2: "cat"}
    model.save_pretrained(tmp_path)
    DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 96}).save_pretrained(tmp_path)
    return tmp_path


def test_all_but_the_first_stage_of_a_pretrained_resnet_learns(saved):
    arguments = DetectionModelArguments(model_name_or_path=str(saved))
    model = make_model(make_config(arguments), arguments)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "backbone" in name}
    stages = {name.split("stages.")[1][0] for name in learning}
    assert stages == {"1", "2", "3"} and not any("embedder" in name for name in learning)


def test_a_pretrained_model_keeps_its_classes_or_gets_new_ones_on_request(saved):
    arguments = DetectionModelArguments(model_name_or_path=str(saved))
    config = make_config(arguments)
    assert fit_classes(DATA, config, arguments).class_numbers == {9: 1, 3: 2}
    nothing = DetectionSplit("none", [], {}, [], lambda image: {})
    other = DetectionData(nothing, None, ["cat", "cow"], [3, 9])
    with pytest.raises(ValueError, match=r"does not know: cow; .*new class scores with --ignore_mismatched_sizes"):
        fit_classes(other, config, arguments)
    arguments.ignore_mismatched_sizes = True
    with pytest.raises(ValueError, match=r"--ignore_mismatched_sizes .* without --do_train random ones"):
        fit_classes(replace(other, train=None), config, arguments)
    assert fit_classes(other, config, arguments).class_numbers == {3: 0, 9: 1}
    model: Any = make_model(config, arguments)
    assert model.class_labels_classifier.out_features == 3 and config.label2id == {"cat": 0, "cow": 1}


@pytest.mark.usefixtures("auto_image_processor")
@pytest.mark.parametrize(
    ("name", "processor", "masked"),
    [
        ("deformable_detr", DeformableDetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 64}), True),
        ("d_fine", RTDetrImageProcessorPil(size={"height": 64, "width": 64}), False),
    ],
)
def test_any_detection_model_of_transformers_is_a_start(
    name: str, processor: Any, masked: bool, tmp_path: Path
) -> None:
    build(name).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = DetectionModelArguments(model_name_or_path=str(tmp_path), ignore_mismatched_sizes=True)
    config = make_config(arguments)
    nothing = DetectionSplit("none", [], {}, [], lambda image: {})
    fit_classes(replace(DATA, train=nothing), config, arguments)
    model: Any = make_model(config, arguments)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert apply_dropkey(model, 0.3, verbose=False).sites
    prepare: Any = make_processor(config, arguments)
    assert needs_mask(model, prepare) == masked
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels = prepare(images=picture, do_pad=False, return_tensors="pt")["pixel_values"][0]
    label = {"boxes": torch.full((1, 4), 0.5), "class_labels": torch.ones(1, dtype=torch.int64)}
    label["frame"] = torch.tensor([40.0, 60.0])
    batch = DetectionCollator(with_mask=masked)([{"pixel_values": pixels, "labels": label}] * 2)
    loss = model.train()(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_interactions_are_another_task(tmp_path: Path) -> None:
    tiny_hoi().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="train it with --task hoi"):
        make_config(DetectionModelArguments(model_name_or_path=str(tmp_path)))


@pytest.mark.usefixtures("auto_image_processor")
def test_a_pretrained_model_keeps_its_image_processor(saved):
    arguments = DetectionModelArguments(model_name_or_path=str(saved))
    config = make_config(arguments)
    processor = make_processor(config, arguments)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (48, 96)
    arguments.image_size = 64
    processor = make_processor(config, arguments)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (64, 64)
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks preprocessor_config.json"):
        make_processor(config, arguments)


def test_dropkey_is_as_given_else_as_remembered_else_usual(caplog):
    caplog.set_level("INFO")
    model = resnet_detr()
    report = DetectionDropKeyArguments(dropkey_ratio=0.4, dropkey_cross_attention=True).apply(model)
    kinds = {(site.side, site.kind): site.ratio for site in report.sites}
    assert kinds["encoder", "self"] == 0.4 and kinds["decoder", "cross"] == 0.4
    again = DetectionDropKeyArguments().apply(model)
    assert [site.ratio for site in again.sites] == [site.ratio for site in report.sites]
    assert {site.ratio for site in DetectionDropKeyArguments().apply(resnet_detr()).sites} == {0.1}
    off = DetectionDropKeyArguments(dropkey_ratio=0.0).apply(resnet_detr())
    assert {site.ratio for site in off.sites} == {0.0}
    assert "encoder" in caplog.text
    with pytest.raises(ValueError, match="dropkey_ratio"):
        DetectionDropKeyArguments(dropkey_ratio=1.0).apply(resnet_detr())


def test_every_dropkey_argument_is_one_of_apply_dropkey():
    names = {field.name.removeprefix("dropkey_") for field in fields(DetectionDropKeyArguments)}
    assert names <= set(inspect.signature(apply_dropkey).parameters)


def test_the_backbone_learns_at_its_own_rate(tmp_path):
    arguments = tiny("detr")
    model = make_model(make_config(arguments), arguments)
    training = TrainingArguments(
        str(tmp_path), learning_rate=0.01, weight_decay=0.1, use_cpu=True, report_to="none", max_steps=1
    )
    trainer = DetectionTrainer(model=model, args=training, backbone_learning_rate=0.001)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decays = {
        id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.001 if ".backbone." in name else 0.01), name
        assert decays[id(parameter)] in (0.0, 0.1) and (not name.endswith("bias") or decays[id(parameter)] == 0), name
    assert len(rates) == len(list(model.parameters()))
    yolos = make_model(make_config(tiny("yolos")), tiny("yolos"))
    with pytest.raises(ValueError, match="YolosForObjectDetection has no backbone that learns; leave it out"):
        DetectionTrainer(model=yolos, args=training, backbone_learning_rate=0.1)
    with pytest.raises(ValueError, match="backbone_learning_rate=-1 is negative"):
        DetectionTrainer(model=model, args=training, backbone_learning_rate=-1)


def test_a_saved_configuration_is_plain(tmp_path):
    model = make_model(make_config(tiny("detr")), tiny("detr"))
    DetectionDropKeyArguments().apply(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and config["dropkey_ratio"] == 0.1
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path)) is DetrForObjectDetection


def test_as_many_classes_of_other_names_get_new_scores_on_request(saved):
    arguments = DetectionModelArguments(model_name_or_path=str(saved), ignore_mismatched_sizes=True)
    before: Any = make_model(make_config(arguments), DetectionModelArguments(model_name_or_path=str(saved)))
    nothing = DetectionSplit("none", [], {}, [], lambda image: {})
    config = make_config(arguments)
    data = fit_classes(DetectionData(nothing, None, ["bus", "car", "cow"], [1, 2, 3]), config, arguments)
    assert data.class_numbers == {1: 0, 2: 1, 3: 2} and config.id2label[0] == "bus"
    after: Any = make_model(config, arguments)
    scores, boxes = "class_labels_classifier", "bbox_predictor.layers.0"
    assert not torch.equal(after.get_submodule(scores).weight, before.get_submodule(scores).weight)
    assert torch.equal(after.get_submodule(boxes).weight, before.get_submodule(boxes).weight)
    # the same names in another order are the model's own
    config = make_config(arguments)
    same = fit_classes(DetectionData(nothing, None, ["N/A", "cat", "dog"], [1, 2, 3]), config, arguments)
    assert same.class_numbers == {1: 0, 2: 2, 3: 1}
    again: Any = make_model(config, arguments)
    assert torch.equal(again.get_submodule(scores).weight, before.get_submodule(scores).weight)
