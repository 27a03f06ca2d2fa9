"""DropKey under torch.compile: one graph for all ratios, and no mask saved between the passes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_inputs import saved_sizes, tensors
from torch import nn
from torch._inductor import config as inductor_config

from hf_dropkey import DropKey, DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.models.attention import dropkey_attention_forward
from hf_dropkey.models.dropkey import DropKeyRatioMixin, layer_ratios, ratio_tensor
from hf_dropkey.models.patterns import rows_can_empty


class Site(DropKeyRatioMixin, nn.Module):
    """An attention of this package, without projections."""

    def __init__(self, ratio: float, pattern: str = "score", window: int = 2, backend: str = "sdpa"):
        super().__init__()
        self.backend = backend
        self.dropkey_pattern, self.dropkey_window, self.dropkey_ratio = pattern, window, ratio

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return dropkey_attention_forward(self, query, key, value, mask, implementation=self.backend, scaling=0.5)[0]


@pytest.fixture
def graphs() -> list[torch.fx.GraphModule]:
    torch._dynamo.reset()
    return []


def counting(graphs: list[torch.fx.GraphModule]) -> Callable:
    """A compiler that keeps each graph that it is given."""

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    return backend


def tiny_model(depth: int, backend: str) -> Any:
    torch.manual_seed(0)
    config = DropKeyViTConfig(
        hidden_size=16, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8, num_labels=3, dropkey_ratio=0.4, dropkey_final_ratio=0.1,
    )  # fmt: skip
    return DropKeyViTForImageClassification._from_config(config, attn_implementation=backend).train()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", ["score", "key", "block", "cross"])
def test_one_graph_for_all_ratios_and_the_same_scores(
    pattern: str, backend: str, graphs: list[torch.fx.GraphModule]
) -> None:
    module, qkv = Site(0.3, pattern, backend=backend), tensors(2, 2, 17, 8)
    compiled = torch.compile(module, backend=counting(graphs), fullgraph=True)
    for ratio in (0.3, 0.05, 0.4, 0.5):
        module.dropkey_ratio = ratio
        results = []
        for call in (module, compiled):
            torch.manual_seed(1)
            output = call(*qkv)
            results.append([output, *torch.autograd.grad(output.square().sum(), qkv)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_one_graph_for_all_layers_and_steps_of_a_ramp_and_a_warm_up(graphs: list[torch.fx.GraphModule]) -> None:
    """Each layer compiled by itself ("regional compilation"), more layers than the compiler allows graphs."""
    model, backend = tiny_model(12, "sdpa"), counting(graphs)
    for layer in model.vit.layers:
        layer.compile(backend=backend, fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    for step in range(1, 4):
        ratios = layer_ratios(12, 0.1 * step, 0.02 * step)
        for layer, ratio in zip(model.vit.layers, ratios, strict=True):
            layer.attention.dropkey_ratio = ratio
        model(images).logits.sum().backward()
    assert len(graphs) == 1


def test_one_graph_of_a_whole_model_through_a_warm_up(graphs: list[torch.fx.GraphModule]) -> None:
    model = tiny_model(3, "sdpa")
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    for step in range(1, 11):
        for layer in model.vit.layers:
            layer.attention.dropkey_ratio = 0.05 * step
        losses = []
        for call in (model, compiled):
            torch.manual_seed(step)
            losses.append(call(images).logits.square().sum())
        losses[1].backward()
        torch.testing.assert_close(*losses)
    assert len(graphs) == 1


def test_the_ratio_zero_is_the_plain_graph(graphs: list[torch.fx.GraphModule]) -> None:
    module, qkv = DropKey(0.3), tensors(2, 2, 9, 8)
    compiled = torch.compile(module, backend=counting(graphs), fullgraph=True)
    scores = qkv[0] @ qkv[1].mT
    assert (compiled(scores) == -torch.inf).any()
    module.dropkey_ratio = 0.0
    assert torch.equal(compiled(scores), scores)
    module.dropkey_ratio = 0.2
    assert (compiled(scores) == -torch.inf).any()
    assert len(graphs) <= 2


def test_a_module_without_the_data_still_follows_its_ratio(graphs: list[torch.fx.GraphModule]) -> None:
    """A stock module holds a bare number: each of its values is compiled, and right."""
    module: Any = nn.Module()
    module.dropkey_ratio, module.dropkey_pattern, module.dropkey_window = 0.3, "score", 2
    qkv = tensors(2, 2, 17, 8)

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return dropkey_attention_forward(module, *inputs, None, implementation="sdpa", scaling=0.5)[0]

    compiled = torch.compile(attend, backend=counting(graphs), fullgraph=True)
    for ratio in (0.3, 0.5):
        module.dropkey_ratio = ratio
        results = []
        for call in (attend, compiled):
            torch.manual_seed(1)
            results.append(call(*qkv))
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.3, 0.58, 0.7, 0.99, 0.9999])
def test_the_longest_row_at_risk_is_never_too_short(ratio: float) -> None:
    data = ratio_tensor("score", ratio, 3)
    assert data is not None
    longest = data.longest_at_risk
    assert not rows_can_empty("score", longest + 1, ratio)
    assert longest & (longest - 1) == 0 and (longest == 128) == (ratio <= 0.58)


@pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", ["score", "key", "block"])
@inductor_config.patch(fallback_random=True)
def test_compiled_sdpa_saves_nothing_of_the_size_of_the_mask(compiler: str, masked: bool, pattern: str) -> None:
    """Also through the partitioner that decides what to save between the passes.

    Inductor has a random generator of its own, which would draw another seed than the plain module.
    """
    torch._dynamo.reset()
    module, qkv = Site(0.3, pattern), tensors(1, 1, 197, 4, dtype=torch.float32)
    mask = (torch.arange(197) < 150)[None, None, None] if masked else None
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    results = []
    for call in (module, compiled):
        torch.manual_seed(1)
        # of key, value, output and their like: [1, 1, 197, 4] in float32, and a few integers for each row
        assert max(saved_sizes(partial(call, *qkv, mask))) <= 197 * 4 * 4 < 197 * 197
        results.append([tensor.grad for tensor in qkv])
        for tensor in qkv:
            tensor.grad = None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
