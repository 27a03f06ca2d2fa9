"""DropKeyCeit: CeiT (Yuan et al., ICCV 2021) with DropKey in its attentions. This file travels with checkpoints.

A convolutional stem, transformer layers whose feed-forward part convolves the patches, and one attention in which the
class token of the last layer attends to the class tokens of all layers.
"""

from typing import Any, Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dropkey_ceit import DropKeyCeitConfig
from .dropkey import layer_ratios
from .modeling_dropkey import (
    DropKeyArchitecture,
    DropKeyAttention,
    DropKeyClassifierMixin,
    DropKeyPreNormLayer,
    DropKeySelfAttention,
    checked_pixel_values,
    resize_position_tokens,
)
from .modeling_dropkey_backbone import DropKeyBackboneMixin


class DropKeyCeitBatchNorm(nn.BatchNorm2d):
    """Batch norm that counts a batch once where activation checkpointing computes a layer twice."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.BatchNorm2d`, without an update of the running statistics during a backward pass."""
        # in a backward pass a forward pass can only be the second one
        again = self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not again or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        # checkpointing wants as many tensors as the first pass saved, so the update goes into copies
        statistics = self.running_mean.clone(), self.running_var.clone()
        return nn.functional.batch_norm(
            input, *statistics, self.weight, self.bias, training=True, momentum=self.momentum or 0.0, eps=self.eps
        )


class DropKeyCeitFeedForward(nn.Module):
    """The locally enhanced feed-forward part: convolutions over the patches; the class token passes unchanged."""

    def __init__(self, config: DropKeyCeitConfig):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        padding = config.local_size // 2
        self.conv1 = nn.Conv2d(width, inner, kernel_size=1)
        self.bn1 = DropKeyCeitBatchNorm(inner)
        self.conv2 = nn.Conv2d(inner, inner, config.local_size, padding=padding, groups=inner)
        self.bn2 = DropKeyCeitBatchNorm(inner)
        self.conv3 = nn.Conv2d(inner, width, kernel_size=1)
        self.bn3 = DropKeyCeitBatchNorm(width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, 1 + rows * columns, C]` to the same shape."""
        patches = hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid)
        patches = self.activation(self.bn1(self.conv1(patches)))
        patches = self.activation(self.bn2(self.conv2(patches)))
        patches = self.bn3(self.conv3(patches)).flatten(2).transpose(1, 2)
        return torch.cat((hidden_states[:, :1], patches), dim=1)


class DropKeyCeitLayer(DropKeyPreNormLayer):
    """A transformer layer of CeiT; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyCeitConfig, dropkey_ratio: float, drop_path_ratio: float):
        attention = DropKeySelfAttention(config, dropkey_ratio)
        super().__init__(config, attention, config.hidden_size, drop_path_ratio, DropKeyCeitFeedForward(config))

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """Tokens `[B, 1 + N, C]` to tokens of the same shape; `grid` are patch rows and columns."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), grid=grid, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states), grid))


class DropKeyCeitClassAttention(DropKeyAttention):
    """Attention of the last layer's class token, the only query, to the class tokens of all layers."""

    def __init__(self, config: DropKeyCeitConfig, dropkey_ratio: float):
        super().__init__(config, dropkey_ratio, (config.hidden_size // config.num_attention_heads) ** -0.5)
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, layers, C]` class tokens to the last one's update.

        Returns:
            The output `[B, 1, C]`, and the weights `[B, H, 1, layers]` on `eager`, else None.
        """
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        output, weights = self.attend(query[:, :, -1:], key, value, None, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


class DropKeyCeitClassLayer(DropKeyPreNormLayer):
    """The layer-wise class attention; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyCeitConfig, dropkey_ratio: float):
        super().__init__(config, DropKeyCeitClassAttention(config, dropkey_ratio), config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]  # no grid
        """`[B, layers, C]` class tokens to one, `[B, 1, C]`."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        class_token = hidden_states[:, -1:] + self.dropout(attended)
        return class_token + self.mlp(self.layernorm_after(class_token))


class DropKeyCeitEmbeddings(nn.Module):
    """From pixels to tokens: convolution and pooling, projection, class token and positions."""

    def __init__(self, config: DropKeyCeitConfig):
        super().__init__()
        self.config = config
        self.convolution = nn.Conv2d(config.num_channels, config.stem_size, 7, stride=2, padding=3, bias=False)
        self.normalization = nn.BatchNorm2d(config.stem_size)
        self.pooling = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.projection = nn.Conv2d(config.stem_size, config.hidden_size, kernel_size=4, stride=4)
        rows, columns = config.patch_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embeddings `[1, 1 + rows * columns, C]` of an image with this patch grid."""
        return resize_position_tokens(self.position_embeddings, self.config.patch_grid, grid)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, C, height, width]` to `[B, 1 + N, hidden_size]`, N being the 16 x 16 pixel patches."""
        patches = self.projection(self.pooling(self.normalization(self.convolution(pixel_values))))
        positions = self.positions((patches.shape[-2], patches.shape[-1]))
        tokens = torch.cat(
            (self.cls_token.expand(patches.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)), dim=1
        )
        return self.dropout(tokens + positions)


class DropKeyCeitPreTrainedModel(DropKeyArchitecture):
    """What the DropKeyCeit models share: configuration class, initial weights, flags."""

    config: DropKeyCeitConfig
    config_class = DropKeyCeitConfig
    base_model_prefix = "ceit"
    _no_split_modules = ["DropKeyCeitEmbeddings", "DropKeyCeitLayer", "DropKeyCeitClassLayer"]
    # not the layer-wise class attention: it works on other tokens, and Transformers counts `num_hidden_layers` of each
    _can_record_outputs = {"hidden_states": DropKeyCeitLayer, "attentions": DropKeySelfAttention}
    _input_embed_layer = "projection"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DropKeyCeitEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, DropKeyCeitModel) and module.class_layer is not None:
            init.zeros_(module.layer_position_embeddings)


class DropKeyCeitModel(DropKeyCeitPreTrainedModel):
    """The bare CeiT encoder.

    `layer_ratios(...)` of the configuration's schedule runs over the enabled sites in order of execution: the layers,
    then the layer-wise class attention, if there is one and `dropkey_class_attention`.

    The patches of the last layer go nowhere, so the convolutions and batch norms of its feed-forward part get zero
    gradients, as in the official model.
    """

    def __init__(self, config: DropKeyCeitConfig, add_class_layer: bool = True):
        config.validate_dropkey()
        super().__init__(config)
        depth = config.num_hidden_layers
        ratios = layer_ratios(
            depth + (add_class_layer and config.dropkey_class_attention),
            config.dropkey_ratio,
            config.dropkey_final_ratio,
            config.dropkey_schedule,
        )
        self.embeddings = DropKeyCeitEmbeddings(config)
        self.layers = nn.ModuleList(
            DropKeyCeitLayer(config, ratio, config.drop_path_rate * index / max(depth - 1, 1))
            for index, ratio in enumerate(ratios[:depth])
        )
        self.class_layer = None
        if add_class_layer:
            self.layer_position_embeddings = nn.Parameter(torch.zeros(1, depth, config.hidden_size))
            self.class_layer = DropKeyCeitClassLayer(config, ratios[-1] if config.dropkey_class_attention else 0.0)
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: `[B, C, height, width]`, both sides multiples of 16.
            interpolate_pos_encoding: Resizes the position embeddings to images of another size, square or not.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            The tokens of the last transformer layer `[B, 1 + N, hidden_size]` with the class token first, and the
            normalised output of the layer-wise class attention `[B, hidden_size]`, if there is one, as pooled output.
            Hidden states and attentions are those of the transformer layers.

        Raises:
            ValueError: `pixel_values` is missing or of a size that the model cannot take.
        """
        dtype = self.embeddings.projection.weight.dtype
        pixel_values = checked_pixel_values(pixel_values, self.config, interpolate_pos_encoding).to(dtype)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        hidden_states = self.embeddings(pixel_values)
        class_tokens = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, grid, **kwargs)
            class_tokens.append(hidden_states[:, 0])
        if self.class_layer is None:
            return BaseModelOutputWithPooling(last_hidden_state=hidden_states)
        stacked = torch.stack(class_tokens, dim=1)
        pooled = self.class_layer(stacked + self.layer_position_embeddings.to(stacked.device), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.layernorm(pooled).squeeze(1)
        )


class DropKeyCeitBackbone(DropKeyBackboneMixin, DropKeyCeitModel):
    """CeiT as a backbone: feature maps of any layers, all at stride 16.

    The layer-wise class attention and its norm, which see class tokens alone, are left out.
    """

    def __init__(self, config: DropKeyCeitConfig):
        super().__init__(config, add_class_layer=False)

    def stage_norm(self) -> None:
        """No norm: the model's last one is for class tokens."""


class DropKeyCeitForImageClassification(DropKeyClassifierMixin, DropKeyCeitPreTrainedModel):
    """CeiT with a linear classifier on the output of its layer-wise class attention."""

    def __init__(self, config: DropKeyCeitConfig):
        super().__init__(config)
        self.ceit = DropKeyCeitModel(config)
        self.add_classifier(config)
        self.post_init()


__all__ = [
    "DropKeyCeitBackbone",
    "DropKeyCeitForImageClassification",
    "DropKeyCeitModel",
    "DropKeyCeitPreTrainedModel",
]
