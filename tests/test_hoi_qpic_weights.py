"""Official QPIC checkpoints as folders of ours: every tensor placed, sizes read off shapes, anything else refused."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_parity import Fixture, load_script
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_dropkey.hoi.names import HICO_VERBS, VCOCO_VERBS
from hf_dropkey.hoi.qpic_weights import convert_tensors, convert_weights, read_config, rename
from hf_dropkey.models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection


CONVERT = load_script("convert_checkpoint")


def official(objects: int = 80, verbs: int = 117, depths: tuple[int, ...] = (1, 2, 1, 1)) -> dict[str, torch.Tensor]:
    """Weights with the official names and shapes of a small QPIC on a ResNet of bottlenecks."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def convolution(name: str, norm: str, rows: int, columns: int, side: int) -> None:
        shapes[f"backbone.0.body.{name}.weight"] = (rows, columns, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.0.body.{norm}.{part}"] = (rows,)

    convolution("conv1", "bn1", 8, 3, 7)
    before = 8
    for stage, depth in enumerate(depths, 1):
        width = 8 * 2**stage
        for layer in range(depth):
            place = f"layer{stage}.{layer}"
            convolution(f"{place}.conv1", f"{place}.bn1", width // 4, before, 1)
            convolution(f"{place}.conv2", f"{place}.bn2", width // 4, width // 4, 3)
            convolution(f"{place}.conv3", f"{place}.bn3", width, width // 4, 1)
            if layer == 0:
                convolution(f"{place}.downsample.0", f"{place}.downsample.1", width, before, 1)
            before = width
    width = 16
    shapes |= {
        "input_proj.weight": (width, before, 1, 1),
        "input_proj.bias": (width,),
        "query_embed.weight": (5, width),
    }
    for side, depth in (("encoder", 1), ("decoder", 2)):
        for layer in range(depth):
            place = f"transformer.{side}.layers.{layer}"
            for attention in ("self_attn", *(["multihead_attn"] if side == "decoder" else [])):
                shapes[f"{place}.{attention}.in_proj_weight"] = (3 * width, width)
                shapes[f"{place}.{attention}.in_proj_bias"] = (3 * width,)
                linear(f"{place}.{attention}.out_proj", width, width)
            linear(f"{place}.linear1", 32, width)
            linear(f"{place}.linear2", width, 32)
            for norm in range(1, 3 if side == "encoder" else 4):
                shapes |= {f"{place}.norm{norm}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {f"transformer.decoder.norm.{part}": (width,) for part in ("weight", "bias")}
    linear("obj_class_embed", objects + 1, width)
    linear("verb_class_embed", verbs, width)
    for head in ("sub_bbox_embed", "obj_bbox_embed"):
        for layer, rows in enumerate((width, width, 4)):
            linear(f"{head}.layers.{layer}", rows, width)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}


def arguments(folder: Path, **more: Any) -> Any:
    return CONVERT.ConversionArguments(family="qpic", checkpoint=folder / "qpic.pth", out=folder / "out", **more)


@pytest.mark.usefixtures("auto_image_processor")
def test_a_checkpoint_becomes_a_folder(tmp_path: Path) -> None:
    weights = official()
    content = {"model": weights, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "qpic.pth")
    told = CONVERT.convert(arguments(tmp_path))
    # every tensor is reported with its new name
    for name in weights:
        assert f"\n{name} " in f"\n{told}", name
    assert f"{len(weights)} tensors" in told and "all placed; weights from model" in told
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert isinstance(model, DropKeyHoiForObjectDetection)
    placed = convert_weights(weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, placed[name]), name
    assert model.config.verbs == list(HICO_VERBS)
    assert model.config.id2label[79] == "toothbrush"
    assert not model.config.missing_object
    assert model.config.backbone_config.layer_type == "bottleneck"
    assert model.config.backbone_config.depths == [1, 2, 1, 1]
    assert AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil").size["longest_edge"] == 1333
    assert (tmp_path / "out" / "pipeline_dropkey_hoi.py").is_file()


def test_v_cocos_models_know_the_missing_object() -> None:
    config = read_config(official(81, 29))
    assert config.missing_label == 80
    assert config.id2label[80] == "missing object"
    assert config.verbs == list(VCOCO_VERBS)
    other = read_config(official(5, 3), verbs=["a", "b", "c"])
    assert (other.num_labels, other.verbs) == (5, ["a", "b", "c"])


def test_the_published_shape_is_read_from_the_fixture() -> None:
    fixture = Fixture("qpic_tiny")
    config, about = read_config(fixture.below("weights/"), 4), fixture.about["config"]
    assert config.backbone_config.layer_type == "basic"
    assert config.backbone_config.hidden_sizes == about["widths"]
    assert (config.encoder_layers, config.decoder_layers) == (about["enc_layers"], about["dec_layers"])
    assert (config.num_queries, config.encoder_ffn_dim) == (about["num_queries"], about["dim_feedforward"])


def test_projections_are_cut_in_thirds() -> None:
    joint = torch.arange(12.0).reshape(6, 2)
    parts = convert_tensors({"transformer.encoder.layers.0.self_attn.in_proj_weight": joint})
    (own,) = parts.values()
    assert {name.split(".")[-2]: value[0, 0].item() for name, value in own.items()} == {
        "q_proj": 0.0,
        "k_proj": 4.0,
        "v_proj": 8.0,
    }
    assert rename("transformer.decoder.layers.1.norm2.bias") == "model.decoder.layers.1.encoder_attn_layer_norm.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("transformer.decoder.norm.bias"), "1 missing: model.decoder.layernorm.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 not in the model: extra"),
        (lambda weights: weights.pop("query_embed.weight"), "none of QPIC"),
        (lambda weights: weights.update({"sub_bbox_embed.layers.0.bias": torch.zeros(3)}), "1 of another shape"),
    ],
)
def test_what_does_not_fit_is_listed(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    weights = official(5, 3)
    change(weights)
    torch.save({"model": weights}, tmp_path / "qpic.pth")
    with pytest.raises(CONVERT.ConversionError, match=message):
        CONVERT.convert(arguments(tmp_path))
    assert not (tmp_path / "out").exists()


class Harmful:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harm",)


def test_pickles_that_are_not_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": official(5, 3), "hook": Harmful()}, tmp_path / "qpic.pth")
    with pytest.raises(CONVERT.ConversionError, match="could run code"):
        CONVERT.convert(arguments(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_arguments_of_other_families_are_refused(tmp_path: Path) -> None:
    torch.save({"model": official(5, 3)}, tmp_path / "qpic.pth")
    for name, value in (("size", "qpic"), ("image_size", 64)):
        with pytest.raises(CONVERT.ConversionError, match=f"--{name} means nothing"):
            CONVERT.convert(arguments(tmp_path, **{name: value}))
