"""The residual branches of a layer are found by its code, and those that cannot be cut off are named."""

import torch
from torch import nn

from hf_dropkey.patching.residuals import ancestors, residuals_of


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attention, self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.1)
        self.lambda_1 = nn.Parameter(torch.ones(4))


class PreNorm(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        residual = x
        x = self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        x *= self.lambda_1
        return residual + x


class PostNorm(Layer):
    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        weights = hidden
        attended, other = self.attention(hidden), weights
        if mask is not None:
            attended = attended.reshape(-1, 4)
        hidden = self.norm1(hidden + attended)
        if self.training:
            hidden = self.norm2(self.fc2(self.fc1(hidden)) + hidden)
        return hidden, other


class SideBySide(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        return x + (self.attention(normed) + self.fc2(self.fc1(normed)))


class Adding(nn.Module):
    """Adds to what it is given, as BERT's output."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, hidden: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dense(hidden) + input_tensor)


class Inside(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.output = Adding()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chunk(self.attention(x) + x)

    def chunk(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.fc1(x), input_tensor=x)


class Gated(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.attention(x))
        return x + self.fc2(self.fc1(x)) * torch.sigmoid(x)


class NothingAdded(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.attention(x)))


def test_the_last_module_of_each_branch_is_found() -> None:
    assert residuals_of(PreNorm()).branches == ["attention", "fc2"]
    assert residuals_of(PostNorm()).branches == ["attention", "fc2"]
    assert residuals_of(SideBySide()).branches == ["attention", "fc2"]


def test_what_a_module_or_method_adds_by_itself_is_found_inside() -> None:
    assert residuals_of(Inside()).branches == ["attention", "output.dense"]


def test_a_branch_behind_another_function_is_not_reached() -> None:
    found = residuals_of(Gated())
    assert found.branches == ["fc2"]
    reason = "its output passes tanh, which is not linear, before it is added to the residual"
    assert found.unreached == {"attention": reason}


def test_a_layer_without_residuals_has_none() -> None:
    found = residuals_of(NothingAdded())
    assert not found.branches and not found.unreached
    assert not residuals_of(nn.ReLU()).branches


def test_code_without_a_source_is_not_followed() -> None:
    scope: dict[str, type] = {}
    exec(
        "class Sourceless(Layer):\n    def forward(self, x):\n        return x + self.attention(x)\n",
        {"Layer": Layer},
        scope,
    )
    assert not residuals_of(scope["Sourceless"]()).branches


def test_cutting_the_branches_off_leaves_the_residual() -> None:
    for layer in (PreNorm().eval(), SideBySide().eval()):
        for name in residuals_of(layer).branches:
            layer.get_submodule(name).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        x = torch.randn(2, 3, 4)
        assert torch.equal(layer(x), x)


def test_the_modules_around_an_attention() -> None:
    assert list(ancestors("swin.layers.0.blocks.1.attention.self")) == ["swin.layers.0.blocks.1", "swin.layers.0"]
    assert not list(ancestors("head.attention"))
