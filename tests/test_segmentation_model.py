"""Segmentation models: from scratch on each backbone, pretrained of each family, and the scores of their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_segmenters import KINDS, small_pretrained
from transformers import (
    BertConfig,
    Mask2FormerImageProcessorPil,
    ViTConfig,
    ViTModel,
)

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, monte_carlo_predict
from hf_dropkey.patching.apply import dropkey_modules
from hf_dropkey.segmentation.arguments import SegmentationDropKeyArguments, SegmentationModelArguments
from hf_dropkey.segmentation.job import segmented
from hf_dropkey.segmentation.model import (
    PixelScores,
    decoder_stages,
    image_side,
    make_config,
    make_model,
    make_processor,
    mask_targets,
    pixel_logits,
)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "decoder_size": 16, "image_size": 32}


def built(dropkey: Any = None, **given: Any) -> tuple[Any, Any, Any]:
    arguments = SegmentationModelArguments(**given)
    config = make_config(arguments, dropkey or SegmentationDropKeyArguments(dropkey_ratio=0.3), 255)
    if not arguments.model_name_or_path:
        config.num_labels = 4
    return make_model(config, arguments), config, arguments


@pytest.mark.parametrize("backbone", ["vit", "t2t_vit", "volo", "ceit"])
@pytest.mark.usefixtures("auto_image_processor")
def test_from_scratch_on_every_backbone(backbone: str) -> None:
    model, config, arguments = built(backbone=backbone, **SHAPE)
    pixels = torch.randn(2, 3, 32, 32)
    outputs = model.train()(pixel_values=pixels, labels=torch.randint(0, 4, (2, 32, 32)))
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 4, 32, 32)
    assert max(module.dropkey_ratio for _, module in dropkey_modules(model)) == 0.3 == config.dropkey_ratio
    processor = make_processor(config, arguments)
    assert image_side(config, processor, arguments) == 32


@pytest.mark.parametrize(
    ("layers", "stages"), [(3, [1, 2, 3]), (4, [1, 2, 3, 4]), (6, [2, 3, 4, 6]), (12, [3, 6, 9, 12])]
)
def test_the_decoder_takes_stages_over_the_whole_depth(layers: int, stages: list[int]) -> None:
    assert decoder_stages(DropKeyViTConfig(num_hidden_layers=layers)) == stages


def test_a_classifier_and_a_plain_vit_become_backbones(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"image_size": 32, "patch_size": 8}
    classifier = DropKeyViTForImageClassification(DropKeyViTConfig(**shape, **sizes)).eval()
    classifier.save_pretrained(tmp_path / "ours")
    plain = ViTModel(ViTConfig(**shape, **sizes)).eval()
    plain.save_pretrained(tmp_path / "plain")
    pixels = torch.randn(1, 3, 32, 32)
    for folder, model in (("ours", classifier.vit), ("plain", plain)):
        upernet, config, _ = built(backbone_name_or_path=str(tmp_path / folder), decoder_size=16)
        assert config.backbone_config.dropkey_ratio == 0.3
        last = upernet.eval().backbone(pixels).feature_maps[-1]
        expected = model(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fixes the shape of the model; leave out --hidden_size 8"):
        SegmentationModelArguments(backbone_name_or_path="x", hidden_size=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("auto_image_processor")
def test_pretrained_models_drop_keys_and_score_pixels(kind: str, tmp_path: Path) -> None:
    model, config, arguments = built(model_name_or_path=str(small_pretrained(kind, tmp_path)))
    SegmentationDropKeyArguments(dropkey_ratio=0.3).apply(model)
    assert image_side(config, make_processor(config, arguments), arguments) == 64
    pixels = torch.randn(2, 3, 64, 64)
    logits = PixelScores(model.eval())(pixels).logits
    assert logits.shape == (2, 3, 64, 64)
    found = monte_carlo_predict(PixelScores(model), {"pixel_values": pixels}, samples=3, seed=0, class_dim=1)
    assert found.entropy.shape == (2, 64, 64) and float(found.std.max()) > 0
    classes, spread = segmented(model, pixels[:1], (40, 50), samples=3)
    assert classes.shape == (40, 50) and spread is not None and spread.shape == (40, 50)
    assert 0 <= spread.min() <= spread.max() <= np.log(3) + 1e-6


@pytest.mark.usefixtures("auto_image_processor")
def test_mask2former_s_scores_are_those_of_its_image_processor(tmp_path: Path) -> None:
    model, _, _ = built(model_name_or_path=str(small_pretrained("mask2former", tmp_path)))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model.eval()(pixel_values=pixels)
    processor = Mask2FormerImageProcessorPil()
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 64)] * 2)
    found = pixel_logits(outputs, (64, 64)).argmax(1)
    # the processor scales the masks before it weights them
    for one, other in zip(found, expected, strict=True):
        assert (one == other).float().mean() > 0.97


def test_targets_of_mask2former() -> None:
    labels = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]]])
    found = mask_targets(labels, 255)
    assert [one.tolist() for one in found["class_labels"]] == [[0, 2], []]
    assert found["mask_labels"][0].tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 0]]]
    assert found["mask_labels"][1].shape == (0, 2, 2)


def test_other_models_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type 'bert'"):
        built(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="model_type 'bert'; give one of dropkey_ceit"):
        built(backbone_name_or_path=str(tmp_path))


def test_settings_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match="dropkey_final_ratio|final"):
        built(SegmentationDropKeyArguments(dropkey_ratio=0.1, dropkey_final_ratio=0.5), backbone="vit", **SHAPE)


def test_patterns_of_attentions_are_for_patched_models() -> None:
    patterns = SegmentationDropKeyArguments(dropkey_include=["*"])
    with pytest.raises(ValueError, match="--dropkey_include is for models that apply_dropkey patches"):
        make_config(SegmentationModelArguments(backbone="vit"), patterns, 255)
