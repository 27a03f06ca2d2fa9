"""DropKeyCeit beside the official model: the same numbers with and without drops, and Transformers' features."""

from typing import Any

import pytest
import torch
from architecture_suite import ArchitectureSuite, pytest_parameters
from torch import nn

from hf_dropkey.models.configuration_dropkey_ceit import DropKeyCeitConfig
from hf_dropkey.models.dropkey import PATTERNS
from hf_dropkey.models.modeling_dropkey_ceit import (
    DropKeyCeitBatchNorm,
    DropKeyCeitForImageClassification,
    DropKeyCeitModel,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pytest_parameters(metafunc)


class TestCeit(ArchitectureSuite):
    """The suite, and what only CeiT has."""

    family = "ceit"
    config_class = DropKeyCeitConfig
    model_class = DropKeyCeitModel
    classifier_class = DropKeyCeitForImageClassification
    patterns = PATTERNS
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "stem_size": 8,
        "image_size": 48,
        "num_labels": 5,
    }
    fixtures = {
        "ceit_tiny": {
            "config": {
                "hidden_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "mlp_ratio": 2,
                "stem_size": 16,
            },
            "stages": {
                "i2t.backbone": "ceit.embeddings.pooling",
                "i2t": "ceit.embeddings.projection",
                "blocks.0": "ceit.layers.0",
                "blocks.1": "ceit.layers.1",
                "blocks.2": "ceit.layers.2",
                "lca": "ceit.class_layer",
                "norm": "ceit.layernorm",
            },
            "sites": {
                **{f"blocks.{index}.attn": f"ceit.layers.{index}.attention" for index in range(3)},
                "lca.attn": "ceit.class_layer.attention",
            },
            "drops": {"logits_all": lambda site: True, "logits_no_lca": lambda site: site != "lca.attn"},
        }
    }
    sizes = {
        "ceit_tiny": (6_356_904, 6_356_904, 375),
        "ceit_small": (24_204_840, 24_204_840, 375),
        "ceit_base": (94_405_416, 94_405_416, 375),
    }
    hidden_shapes = [(3, 10, 32)] * 3
    attention_shapes = [(3, 4, 10, 10)] * 2
    enabled_sites = [
        ({}, ["ceit.layers.0.attention", "ceit.layers.1.attention", "ceit.class_layer.attention"]),
        ({"dropkey_class_attention": False}, ["ceit.layers.0.attention", "ceit.layers.1.attention"]),
    ]

    def as_ours(self, stage: str, expected: torch.Tensor) -> torch.Tensor:
        # ours is recorded before the patches become a sequence
        return expected.transpose(1, 2) if stage == "i2t" else expected

    def pattern_settings(self, pattern: str) -> dict[str, Any]:
        settings = super().pattern_settings(pattern)
        return {**settings, "dropkey_class_attention": pattern not in ("block", "cross")}

    @pytest.mark.parametrize(("published", "total"), [("ceit_tiny", 6_429_864), ("ceit_small", 24_350_760)])
    def test_sizes_at_384_pixels(self, published: str, total: int) -> None:
        with torch.device("meta"):
            config = DropKeyCeitConfig.from_size(published, num_labels=1000, image_size=384)
            model = DropKeyCeitForImageClassification(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == total

    def test_the_class_token_passes_the_feed_forward_part(self) -> None:
        layer = self.build().ceit.layers[0]
        tokens = torch.randn(2, 10, 32)
        output = layer.mlp(tokens, (3, 3))
        assert torch.equal(output[:, 0], tokens[:, 0])
        assert not torch.equal(output[:, 1:], tokens[:, 1:])

    def test_patches_of_the_last_layer_get_no_gradient(self) -> None:
        model = self.build().train()
        model(self.pixels(), labels=self.labels()).loss.backward()
        for index, expected in ((0, True), (1, False)):
            gradients = [parameter.grad for parameter in model.ceit.layers[index].mlp.parameters()]
            assert len(gradients) == 12
            # conv1's and conv2's biases vanish in the batch norm behind them
            assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in gradients) == expected

    def test_batch_norm_is_torchs_outside_a_backward_pass(self) -> None:
        torch.manual_seed(0)
        ours, plain = DropKeyCeitBatchNorm(4), nn.BatchNorm2d(4)
        for images in torch.randn(3, 2, 4, 5, 5):
            assert torch.equal(ours(images), plain(images))
        for name, value in plain.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name])
        images = torch.randn(2, 4, 5, 5)
        assert torch.equal(ours.eval()(images), plain.eval()(images))

    @pytest.mark.parametrize("shape", ["block", "cross"])
    def test_grid_patterns_are_refused_where_there_is_no_grid(self, shape: str) -> None:
        settings = {**self.tiny, "dropkey_pattern": shape, "dropkey_window": 2}
        with pytest.raises(Exception, match="dropkey_class_attention=False"):
            DropKeyCeitConfig(**settings)
        DropKeyCeitConfig(**settings, dropkey_class_attention=False)
        DropKeyCeitConfig(**settings, dropkey_ratio=0.0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"num_hidden_layers": 0}, "at least 1, got 0"), ({"local_size": 2}, "odd and positive, got 2")],
    )
    def test_ceit_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(Exception, match=message) as caught:
            self.config_class(**{**self.tiny, **settings})
        assert "StrictDataclass" in type(caught.value).__name__
