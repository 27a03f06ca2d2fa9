"""Transformers' common tests over stock ViT and over ours: one tester, the same tests, three test classes.

Run by `run.py`, which puts the library's tests on the path; pytest does not collect this file by itself.
"""

import unittest
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers.testing_utils import torch_device
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from hf_dropkey import (
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
)


FAMILIES = ("ViT", "T2TViT", "Volo", "Ceit")
DROPKEY_NAMES = {
    "ViTModel": [f"DropKey{family}Model" for family in FAMILIES],
    "ViTForImageClassification": [f"DropKey{family}ForImageClassification" for family in FAMILIES],
    "ViTForMaskedImageModeling": ["DropKeyViTForMaskedImageModeling"],
}
library_get_values = test_modeling_common.get_values


def get_values(mapping: Any) -> list[Any]:
    """The class names of an Auto mapping, ours beside the stock ViT's.

    The tests choose labels, and which classes train, by looking up class names in these lists. Without ours in them, a
    test would pass because it did nothing.
    """
    names = list(library_get_values(mapping))
    return names + [ours for name in names for ours in DROPKEY_NAMES.get(name, [])]


test_modeling_common.get_values = get_values


class TinyViT:
    """What the mixin asks of a model tester: a tiny configuration and a batch for it."""

    is_training = True
    batch_size = 13
    image_size = 30
    patch_size = 2
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 10
    seq_length = encoder_seq_length = (image_size // patch_size) ** 2 + 1
    # half the patches, as masked image modelling does
    num_masks = (seq_length - 1) // 2
    mask_length = seq_length - 1

    def __init__(self, config_class: type[ViTConfig], config_kwargs: dict[str, Any]) -> None:
        self.config_class = config_class
        self.config_kwargs = config_kwargs

    def get_config(self) -> ViTConfig:
        """A fresh configuration."""
        return self.config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            encoder_stride=self.patch_size,
            num_labels=self.num_labels,
            **self.config_kwargs,
        )

    def prepare_config_and_inputs(self) -> tuple[ViTConfig, torch.Tensor, torch.Tensor]:
        """A configuration, pixel values `[B, C, height, width]` and labels `[B]`."""
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self) -> tuple[ViTConfig, dict[str, torch.Tensor]]:
        """A configuration and the keyword arguments every class takes."""
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class CommonTests(ModelTesterMixin):
    """The mixin with what is true of every ViT."""

    config_class: Any
    config_kwargs: dict[str, Any] = {}
    model_tester: Any
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = TinyViT(self.config_class, self.config_kwargs)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, hidden_size=36, **self.config_kwargs
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip(reason="ViT takes pixels, not input embeddings")
    def test_inputs_embeds(self) -> None: ...

    def test_model_get_set_embeddings(self) -> None:
        # the mixin wants nn.Embedding, an image model embeds with a convolution
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert model.get_output_embeddings() is None

    def test_output_shapes(self) -> None:
        tester = self.model_tester
        config, pixel_values, labels = tester.prepare_config_and_inputs()
        model_class, classifier_class, masked_class = self.all_model_classes

        model = model_class(config).to(torch_device).eval()
        hidden_states = model(pixel_values).last_hidden_state
        assert hidden_states.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)

        classifier = classifier_class(config).to(torch_device).eval()
        outputs = classifier(pixel_values, labels=labels)
        assert outputs.logits.shape == (tester.batch_size, tester.num_labels)
        assert outputs.loss.shape == ()

        masked = masked_class(config).to(torch_device).eval()
        positions = torch.zeros(tester.batch_size, tester.mask_length, dtype=torch.bool, device=torch_device)
        positions[:, : tester.num_masks] = True
        outputs = masked(pixel_values, bool_masked_pos=positions)
        assert outputs.reconstruction.shape == pixel_values.shape
        assert outputs.loss.shape == ()


class TestStockViT(CommonTests, unittest.TestCase):
    config_class = ViTConfig
    all_model_classes = (ViTModel, ViTForImageClassification, ViTForMaskedImageModeling)


class TestDropKeyViTWithoutDropping(CommonTests, unittest.TestCase):
    config_class = DropKeyViTConfig
    config_kwargs = {"dropkey_ratio": 0.0}
    all_model_classes = (DropKeyViTModel, DropKeyViTForImageClassification, DropKeyViTForMaskedImageModeling)


class TestDropKeyViT(CommonTests, unittest.TestCase):
    config_class = DropKeyViTConfig
    config_kwargs = {"dropkey_ratio": 0.3}
    all_model_classes = (DropKeyViTModel, DropKeyViTForImageClassification, DropKeyViTForMaskedImageModeling)
