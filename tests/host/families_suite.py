"""Transformers' common tests over T2T-ViT, VOLO and CeiT, next to those over ViT in `vit_suite.py`.

Run by `run.py`, which puts the library's tests on the path; pytest does not collect this file by itself.
"""

import copy
import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import floats_tensor, ids_tensor
from vit_suite import CommonTests

from hf_dropkey import (
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyCeitModel,
    DropKeyT2TViTConfig,
    DropKeyT2TViTForImageClassification,
    DropKeyT2TViTModel,
    DropKeyVoloConfig,
    DropKeyVoloForImageClassification,
    DropKeyVoloModel,
)


class TinyFamily:
    """What the mixin asks of a model tester: a tiny configuration and a batch for it."""

    is_training = True
    batch_size = 4
    image_size = 48
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 10
    # a class token and patches of 16 pixels
    seq_length = encoder_seq_length = (image_size // 16) ** 2 + 1

    def __init__(self, config_class: Any, config_kwargs: dict[str, Any]) -> None:
        self.config_class = config_class
        self.config_kwargs = config_kwargs

    def get_config(self) -> PreTrainedConfig:
        """A fresh configuration."""
        config: PreTrainedConfig = self.config_class(
            image_size=self.image_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_labels=self.num_labels,
            mlp_ratio=2.0,
            dropkey_ratio=0.3,
            **self.config_kwargs,
        )
        return config

    def prepare_config_and_inputs(self) -> tuple[PreTrainedConfig, torch.Tensor, torch.Tensor]:
        """A configuration, pixel values `[B, C, height, width]` and labels `[B]`."""
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A configuration and the keyword arguments every class takes."""
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class FamilyTests(CommonTests):
    """The mixin with what is true of the three families."""

    def setUp(self) -> None:
        self.model_tester = TinyFamily(self.config_class, self.config_kwargs)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, hidden_size=36, **self.config_kwargs
        )

    def test_output_shapes(self) -> None:
        tester = self.model_tester
        config, pixel_values, labels = tester.prepare_config_and_inputs()
        model_class, classifier_class = self.all_model_classes
        hidden_states = model_class(config).to(torch_device).eval()(pixel_values).last_hidden_state
        assert hidden_states.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)
        outputs = classifier_class(config).to(torch_device).eval()(pixel_values, labels=labels)
        assert outputs.logits.shape == (tester.batch_size, tester.num_labels)
        assert outputs.loss.shape == ()


class TestDropKeyT2TViT(FamilyTests, unittest.TestCase):
    config_class = DropKeyT2TViTConfig
    config_kwargs = {"num_hidden_layers": 2, "token_size": 8, "token_stage": "transformer"}
    all_model_classes = (DropKeyT2TViTModel, DropKeyT2TViTForImageClassification)


class TestDropKeyT2TViTPerformer(TestDropKeyT2TViT):
    config_kwargs = {"num_hidden_layers": 2, "token_size": 8}


class TestDropKeyCeit(FamilyTests, unittest.TestCase):
    config_class = DropKeyCeitConfig
    config_kwargs = {"num_hidden_layers": 2, "stem_size": 8}
    all_model_classes = (DropKeyCeitModel, DropKeyCeitForImageClassification)


class TestDropKeyVolo(FamilyTests, unittest.TestCase):
    config_class = DropKeyVoloConfig
    config_kwargs = {
        "depths": [1, 1],
        "outlook_hidden_size": 16,
        "num_outlook_heads": 2,
        "num_class_layers": 1,
        "stem_size": 8,
    }
    all_model_classes = (DropKeyVoloModel, DropKeyVoloForImageClassification)

    # layers differ in shape, so these two tests are overridden as Transformers' own for PVT and Swin are

    def recorded(self, field: str, model_class: Any, *, by_config: bool) -> list[tuple[int, ...]]:
        """Shapes of what an eager model in eval mode records, requested in the call or in the configuration."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        if by_config:
            setattr(config, f"output_{field}", True)
        else:
            inputs[f"output_{field}"] = True
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").to(torch_device).eval()
        with torch.no_grad():
            outputs = model(**self._prepare_for_class(inputs, model_class))
        return [tuple(value.shape) for value in outputs[field]]

    def check_recorded(self, field: str, shapes: list[tuple[int, ...]]) -> None:
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                assert self.recorded(field, model_class, by_config=by_config) == shapes

    def test_attention_outputs(self) -> None:
        tester = self.model_tester
        tokens = tester.seq_length - 1
        # windows of 3 x 3 around every second one of 6 x 6 places, then patches, then the class token as the only query
        outlook = (tester.batch_size * tokens, 2, 9, 9)
        layer = (tester.batch_size, tester.num_attention_heads, tokens, tokens)
        self.check_recorded("attentions", [outlook, layer, (*layer[:2], 1, tokens + 1)])

    def test_hidden_states_output(self) -> None:
        tester = self.model_tester
        tokens = tester.seq_length - 1
        # before the outlook layer, and after it, the transformer layer and the class layer
        shapes = [*[(4 * tokens, 16)] * 2, (tokens, tester.hidden_size), (tokens + 1, tester.hidden_size)]
        self.check_recorded("hidden_states", [(tester.batch_size, *shape) for shape in shapes])
