"""Transformers' common tests over the paper's other tasks: DropKeyHoi beside stock DETR, and the body-mesh models.

Run by `run.py`, which puts the library's tests on the path; pytest does not collect this file by itself.
"""

import copy
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ConvNextConfig, DetrConfig, DetrForObjectDetection, DetrModel, PreTrainedConfig
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor
from vit_suite import DROPKEY_NAMES

from hf_dropkey import DropKeyHoiConfig, DropKeyHoiForObjectDetection, DropKeyHoiModel
from hf_dropkey.models.configuration_dropkey_mesh import DropKeyMeshConfig
from hf_dropkey.models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh, DropKeyMeshModel


# pytest finds the support files by the project's configuration, which these tests run without
sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from mesh_models import tiny_batch as mesh_batch
from mesh_models import tiny_config as mesh_config


# the tests choose what trains by class names, as `vit_suite` says
DROPKEY_NAMES["DetrModel"] = ["DropKeyHoiModel"]
DROPKEY_NAMES["DetrForObjectDetection"] = ["DropKeyHoiForObjectDetection"]
DROPKEY_NAMES["ViTModel"].append("DropKeyMeshModel")


class TinyDetr:
    """What the mixin asks of a model tester: a tiny configuration, and a batch of two pairs an image."""

    is_training = True
    batch_size = 3
    image_size = 32
    num_channels = 3
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 4
    num_queries = 5
    num_labels = 4
    # of the grid of 4 x 4 that the backbone makes
    encoder_seq_length = seq_length = 16
    decoder_seq_length = num_queries

    def __init__(self, config_class: Any, config_kwargs: dict[str, Any]) -> None:
        self.config_class = config_class
        self.config_kwargs = config_kwargs

    def get_config(self) -> PreTrainedConfig:
        """A fresh configuration."""
        output: dict[str, Any] = {"out_features": ["stage2"]}
        backbone = ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 8], depths=[1, 1], layer_scale_init_value=1.0, **output
        )
        config: PreTrainedConfig = self.config_class(
            backbone_config=backbone,
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=self.num_queries,
            num_labels=self.num_labels,
            **self.config_kwargs,
        )
        return config

    def labels(self) -> list[dict[str, torch.Tensor]]:
        """Two targets for each image, with what both kinds of head take."""
        boxes = torch.tensor([[0.4, 0.5, 0.3, 0.6], [0.6, 0.6, 0.2, 0.2]], device=torch_device)
        verbs = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=torch_device)
        known = {"class_labels": torch.tensor([1, 3], device=torch_device), "verb_labels": verbs}
        known |= {"boxes": boxes, "person_boxes": boxes, "object_boxes": boxes.flip(0)}
        return [dict(known) for _ in range(self.batch_size)]

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """A configuration and the keyword arguments every class takes."""
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class DetrTests(ModelTesterMixin):
    """The mixin with what is true of every DETR."""

    config_class: Any
    config_kwargs: dict[str, Any] = {}
    all_model_classes: Any
    test_resize_embeddings = False
    is_encoder_decoder = True
    test_missing_keys = False
    test_torch_exportable = False

    def setUp(self) -> None:
        self.model_tester = TinyDetr(self.config_class, self.config_kwargs)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **self.config_kwargs
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: Any, return_labels: bool = False) -> dict:
        inputs: dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is self.all_model_classes[1]:
            inputs["labels"] = self.model_tester.labels()
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip(reason="DETR takes pixels, not input embeddings")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip(reason="DETR takes pixels, not input embeddings")
    def test_inputs_embeds_matches_input_ids(self) -> None: ...

    @unittest.skip(reason="the decoder starts from zeros, which have no gradient")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...

    @unittest.skip(reason="DETR has no token embeddings")
    def test_model_get_set_embeddings(self) -> None: ...

    def test_attention_outputs(self) -> None:
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        grid, queries, heads = tester.seq_length, tester.num_queries, tester.num_attention_heads
        shapes = {
            "encoder_attentions": (heads, grid, grid),
            "decoder_attentions": (heads, queries, queries),
            "cross_attentions": (heads, queries, grid),
        }
        for model_class in self.all_model_classes:
            model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").to(torch_device)
            with torch.no_grad():
                outputs = model.eval()(**inputs, output_attentions=True)
            for name, shape in shapes.items():
                assert [tuple(one.shape[1:]) for one in outputs[name]] == [shape] * tester.num_hidden_layers

    def test_heads(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[1](config).to(torch_device).eval()
        outputs = model(**inputs, labels=self.model_tester.labels())
        assert outputs.loss.shape == () and outputs.loss.isfinite()
        assert outputs.logits.shape == (3, self.model_tester.num_queries, self.model_tester.num_labels + 1)


class TestStockDetr(DetrTests, unittest.TestCase):
    config_class = DetrConfig
    all_model_classes = (DetrModel, DetrForObjectDetection)


class TestDropKeyHoi(DetrTests, unittest.TestCase):
    config_class = DropKeyHoiConfig
    config_kwargs = {"dropkey_ratio": 0.3, "dropkey_cross_attention": True}
    all_model_classes = (DropKeyHoiModel, DropKeyHoiForObjectDetection)


class TinyMesh:
    """What the mixin asks of a model tester, for a METRO or MeshGraphormer."""

    is_training = True
    batch_size = 3
    num_attention_heads = 2
    # of each of three stages
    num_hidden_layers = 2

    def __init__(self, system: str) -> None:
        self.system = system
        config = self.get_config()
        self.hidden_size = config.hidden_sizes[0]
        self.seq_length = self.encoder_seq_length = config.num_tokens

    def get_config(self) -> DropKeyMeshConfig:
        """A fresh configuration."""
        return mesh_config(self.system)

    def prepare_config_and_inputs_for_common(self) -> tuple[DropKeyMeshConfig, dict[str, torch.Tensor]]:
        """A configuration and the keyword arguments every class takes."""
        config = self.get_config()
        return config, {"pixel_values": mesh_batch(config, self.batch_size)["pixel_values"].to(torch_device)}


class TestDropKeyMesh(ModelTesterMixin, unittest.TestCase):
    """METRO; layers differ in width from stage to stage, so what is recorded is checked here."""

    system = "metro"
    all_model_classes = (DropKeyMeshModel, DropKeyMeshForBodyMesh)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = TinyMesh(self.system)
        self.config_tester = ConfigTester(
            self, config_class=DropKeyMeshConfig, has_text_modality=False, common_properties=["image_size"]
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: Any, return_labels: bool = False) -> dict:
        inputs: dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DropKeyMeshForBodyMesh:
            batch = mesh_batch(self.model_tester.get_config(), self.model_tester.batch_size)
            inputs |= {name: value.to(torch_device) for name, value in batch.items() if name != "pixel_values"}
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip(reason="ViT takes pixels, not input embeddings")
    def test_inputs_embeds(self) -> None: ...

    def test_model_get_set_embeddings(self) -> None:
        # what is embedded are the feature maps of a backbone
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            with pytest.raises(NotImplementedError):
                model.get_input_embeddings()
            assert model.get_output_embeddings() is None

    def test_output_shapes(self) -> None:
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        classes: Any = self.all_model_classes
        model_class, whole_class = classes
        coordinates = model_class(config).to(torch_device).eval()(**inputs).last_hidden_state
        assert coordinates.shape == (tester.batch_size, tester.seq_length, 3)
        outputs = whole_class(config).to(torch_device).eval()(**self._prepare_for_class(inputs, whole_class, True))
        assert outputs.vertices.shape == (tester.batch_size, config.num_vertices[-1], 3)
        assert outputs.loss.shape == () and outputs.loss.isfinite()

    def recorded(self, field: str, model_class: Any) -> list[tuple[int, ...]]:
        """Shapes of what an eager model in eval mode records."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").to(torch_device).eval()
        with torch.no_grad():
            outputs = model(**inputs, **{f"output_{field}": True})
        return [tuple(value.shape) for value in outputs[field]]

    def test_attention_outputs(self) -> None:
        tester = self.model_tester
        one = (tester.batch_size, tester.num_attention_heads, tester.seq_length, tester.seq_length)
        for model_class in self.all_model_classes:
            assert self.recorded("attentions", model_class) == [one] * tester.get_config().num_stage_layers

    def test_hidden_states_output(self) -> None:
        tester = self.model_tester
        widths = set(tester.get_config().hidden_sizes)
        for model_class in self.all_model_classes:
            found = self.recorded("hidden_states", model_class)
            assert {shape[:2] for shape in found} == {(tester.batch_size, tester.seq_length)}
            assert widths <= {shape[2] for shape in found}


class TestDropKeyMeshGraphormer(TestDropKeyMesh):
    """MeshGraphormer: graph blocks and grid tokens."""

    system = "graphormer"
