"""Transformers' common tests of backbones over stock DINOv2's and over ours: one tester, the same tests.

Run by `run.py`, which puts the library's tests on the path; pytest does not collect this file by itself.
"""

import unittest
from typing import Any

import torch
from transformers import Dinov2Backbone, Dinov2Config, PreTrainedConfig
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_modeling_common import floats_tensor

from hf_dropkey import (
    DropKeyCeitBackbone,
    DropKeyCeitConfig,
    DropKeyT2TViTBackbone,
    DropKeyT2TViTConfig,
    DropKeyViTBackbone,
    DropKeyViTConfig,
    DropKeyVoloBackbone,
    DropKeyVoloConfig,
)


class TinyBackbone:
    """What the mixin asks of a model tester: a tiny configuration and a batch for it."""

    def __init__(self, config_class: Any, config_kwargs: dict[str, Any]) -> None:
        self.config_class = config_class
        self.config_kwargs = config_kwargs

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A configuration with two requested stages, and the keyword arguments every class takes."""
        shape = {"image_size": 48, "hidden_size": 32, "num_attention_heads": 4}
        config: PreTrainedConfig = self.config_class(**shape, out_features=["stage1", "stage2"], **self.config_kwargs)
        return config, {"pixel_values": floats_tensor([3, 3, 48, 48])}


class BackboneTests(BackboneTesterMixin):
    """The mixin with the tester above."""

    config_class: Any
    config_kwargs: dict[str, Any]

    def setUp(self) -> None:
        self.model_tester = TinyBackbone(self.config_class, self.config_kwargs)


class TestStockBackbone(BackboneTests, unittest.TestCase):
    config_class = Dinov2Config
    config_kwargs = {"num_hidden_layers": 3, "patch_size": 16}
    all_model_classes = (Dinov2Backbone,)


class TestDropKeyViTBackbone(BackboneTests, unittest.TestCase):
    config_class = DropKeyViTConfig
    config_kwargs = {"num_hidden_layers": 3, "intermediate_size": 37, "dropkey_ratio": 0.3}
    all_model_classes = (DropKeyViTBackbone,)


class TestDropKeyT2TViTBackbone(BackboneTests, unittest.TestCase):
    config_class = DropKeyT2TViTConfig
    config_kwargs = {"num_hidden_layers": 3, "token_size": 8, "dropkey_ratio": 0.3}
    all_model_classes = (DropKeyT2TViTBackbone,)


class TestDropKeyVoloBackbone(BackboneTests, unittest.TestCase):
    config_class = DropKeyVoloConfig
    config_kwargs = {
        "depths": [1, 2, 1],
        "outlook_hidden_size": 16,
        "num_outlook_heads": 2,
        "stem_size": 8,
        "dropkey_ratio": 0.3,
    }
    all_model_classes = (DropKeyVoloBackbone,)


class TestDropKeyCeitBackbone(BackboneTests, unittest.TestCase):
    config_class = DropKeyCeitConfig
    config_kwargs = {"num_hidden_layers": 3, "stem_size": 8, "dropkey_ratio": 0.3}
    all_model_classes = (DropKeyCeitBackbone,)
