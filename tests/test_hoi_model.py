"""Where models of human-object interaction detection start: from scratch, from a DETR, from a saved one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hoi_models import TINY, tiny_model
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessorPil, ResNetConfig

from hf_dropkey.hoi.arguments import HoiDataArguments, HoiDropKeyArguments, HoiModelArguments
from hf_dropkey.hoi.data import HoiData, load_hoi_data
from hf_dropkey.hoi.model import fit_names, make_config, make_model, make_processor, start_from_detr


NAMES = ["N/A", "Person", "bicycle", "ball", "N/A", "dining table"]


def detr(folder: Path, names: list[str] = NAMES) -> DetrForObjectDetection:
    """A small DETR on a ResNet, saved."""
    output: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic", **output)
    settings = {name: value for name, value in TINY.items() if name not in ("verbs", "id2label")}
    config = DetrConfig(backbone_config=backbone, id2label=dict(enumerate(names)), **settings)
    torch.manual_seed(0)
    model = DetrForObjectDetection(config)
    model.save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return model


def scenes() -> HoiData:
    given = HoiDataArguments(dataset="scenes", train_scenes=3, validation_scenes=2)
    return load_hoi_data(given, training=True, evaluation=True)


def test_a_model_from_scratch_takes_the_datas_names() -> None:
    arguments = HoiModelArguments(hidden_size=32, num_attention_heads=2, encoder_layers=1, decoder_layers=1)
    config = make_config(arguments, HoiDropKeyArguments(dropkey_ratio=0.3, dropkey_cross_attention=True).given())
    fit_names(scenes(), config, arguments)
    model = make_model(config, arguments)
    assert list(model.config.id2label.values()) == ["person", "ball", "box", "cup", "stool"]
    assert model.config.verbs[0] == "hold"
    assert not model.config.missing_object
    assert model.model.encoder.layers[0].self_attn.dropkey_ratio == 0.3
    assert model.model.decoder.layers[0].encoder_attn.dropkey_ratio == 0.3
    assert make_processor(arguments, 96).size["longest_edge"] == 96
    assert make_processor(arguments, None).size["longest_edge"] == 160


@pytest.mark.usefixtures("auto_image_processor")
def test_a_detr_gives_trunk_boxes_and_classes_by_name(tmp_path: Path) -> None:
    source = detr(tmp_path)
    arguments = HoiModelArguments(detr=str(tmp_path))
    config = make_config(arguments, {"dropkey_ratio": 0.2})
    config.id2label = {0: "person", 1: "ball", 2: "Dining_Table", 3: "unicorn"}
    config.verbs = ["hold"]
    model = make_model(config, arguments)
    for name, value in source.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name
    for head in (model.person_bbox_predictor, model.object_bbox_predictor):
        for name, value in source.bbox_predictor.state_dict().items():
            assert torch.equal(head.state_dict()[name], value)
    # by name: person is theirs number 1, ball 3, dining table 5; "no pair" is "no object"
    for ours, theirs in ((0, 1), (1, 3), (2, 5), (4, 6)):
        assert torch.equal(model.class_labels_classifier.weight[ours], source.class_labels_classifier.weight[theirs])
        assert torch.equal(model.class_labels_classifier.bias[ours], source.class_labels_classifier.bias[theirs])
    assert not torch.equal(model.class_labels_classifier.weight[3], source.class_labels_classifier.weight[4])
    assert model.config.dropkey_ratio == 0.2
    # the DETR of the original computes the last layer's outputs the same
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval()(pixels)
        found = model.eval()(pixels)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.person_boxes, expected.pred_boxes)
    # only the first stage of the ResNet stays frozen
    assert any(value.requires_grad for value in model.model.backbone.parameters())
    assert make_processor(arguments, None).size["longest_edge"] == 64


def test_new_classes_are_told(tmp_path: Path) -> None:
    source = detr(tmp_path)
    model = tiny_model(id2label={0: "person", 1: "unicorn"}, backbone_config=source.config.backbone_config)
    assert start_from_detr(model, source) == ["unicorn"]


def test_a_detr_that_knows_no_class_is_refused(tmp_path: Path) -> None:
    source = detr(tmp_path, ["LABEL_0", "LABEL_1"])
    model = tiny_model(backbone_config=source.config.backbone_config)
    with pytest.raises(ValueError, match="knows none of the object classes"):
        start_from_detr(model, source)


def test_a_saved_model_keeps_its_numbers(tmp_path: Path) -> None:
    data = scenes()
    objects, verbs = list(reversed(data.objects)), list(reversed(data.verbs))
    tiny_model(id2label=dict(enumerate(objects)), verbs=verbs).save_pretrained(tmp_path)
    DetrImageProcessorPil().save_pretrained(tmp_path)
    arguments = HoiModelArguments(model_name_or_path=str(tmp_path))
    config = make_config(arguments, {"dropkey_ratio": 0.25})
    fitted = fit_names(data, config, arguments)
    assert (fitted.objects, fitted.verbs) == (objects, verbs)
    assert make_model(config, arguments).model.encoder.layers[0].self_attn.dropkey_ratio == 0.25


def test_a_saved_model_that_lacks_names_is_refused_or_gets_new_scores(tmp_path: Path) -> None:
    tiny_model(id2label={0: "person", 1: "ball"}, verbs=["hold"]).save_pretrained(tmp_path)
    arguments = HoiModelArguments(model_name_or_path=str(tmp_path))
    config = make_config(arguments, {})
    with pytest.raises(ValueError, match="--ignore_mismatched_sizes") as caught:
        fit_names(scenes(), config, arguments)
    assert "does not know" in str(caught.value)
    arguments = HoiModelArguments(model_name_or_path=str(tmp_path), ignore_mismatched_sizes=True)
    fit_names(scenes(), config, arguments)
    model = make_model(config, arguments)
    assert model.class_labels_classifier.out_features == 6
    assert model.verb_classifier.out_features == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_name_or_path": "a", "detr": "b"}, "both name a start"),
        ({"detr": "b", "hidden_size": 32}, "fixes the shape of the model; leave out .'hidden_size'."),
        ({"num_queries": 0}, "num_queries=0 is below 1"),
        ({"dropout": 1.0}, "outside .0, 1."),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1 is outside"),
    ],
)
def test_arguments_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HoiModelArguments(**given)


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    detr(tmp_path / "detr")
    tiny_model().save_pretrained(tmp_path / "hoi")
    with pytest.raises(ValueError, match="--model_name_or_path takes a 'dropkey_hoi'"):
        make_config(HoiModelArguments(model_name_or_path=str(tmp_path / "detr")), {})
    with pytest.raises(ValueError, match="--detr takes a 'detr'"):
        make_config(HoiModelArguments(detr=str(tmp_path / "hoi")), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks config.json"):
        make_config(HoiModelArguments(detr=str(tmp_path / "empty")), {})
    with pytest.raises(FileNotFoundError, match="lacks preprocessor_config.json"):
        make_processor(HoiModelArguments(model_name_or_path=str(tmp_path / "hoi")), None)
    with pytest.raises(ValueError, match="must be a multiple of num_attention_heads=3"):
        make_config(HoiModelArguments(hidden_size=32, num_attention_heads=3), {})
