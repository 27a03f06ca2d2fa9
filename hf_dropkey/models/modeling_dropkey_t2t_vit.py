"""DropKeyT2TViT: T2T-ViT (Yuan et al., ICCV 2021) with DropKey in its attentions. This file travels with checkpoints.

Two token stages mix overlapping windows of pixels, each by a small attention, before a plain vision transformer. The
queries, keys and values of each attention come from one matrix, as in the official checkpoints.
"""

import math
from typing import Any, Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import TransformersKwargs, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import protected_drops, settings_of
from .configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from .dropkey import dropkey_is_active, layer_ratios
from .modeling_dropkey import (
    DropKeyArchitecture,
    DropKeyAttention,
    DropKeyClassifierMixin,
    DropKeyMLP,
    DropKeyPreNormLayer,
    DropKeySelfAttention,
    checked_pixel_values,
    resize_position_tokens,
)
from .modeling_dropkey_backbone import DropKeyBackboneMixin
from .sample_masks import seed_for


# kernel side, stride and padding of the windows that become tokens: before stage 1, before stage 2, before the layers
WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


def sinusoid_positions(positions: int, width: int) -> torch.Tensor:
    """Sinusoid embeddings `[1, positions, width]` of the token indices from 0, which is the class token."""
    columns = torch.arange(width)
    rates = 10000.0 ** (-2 * (columns // 2).double() / width)
    angles = torch.arange(positions)[:, None] * rates
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos())[None].to(torch.get_default_dtype())


class DropKeyT2TViTTokenAttention(DropKeyAttention):
    """The softmax attention of a transformer token stage: one head, from wide to narrow tokens.

    The scores are scaled by the width of the input, and the skip connection carries the values.
    """

    def __init__(self, config: DropKeyT2TViTConfig, input_size: int, dropkey_ratio: float):
        super().__init__(config, dropkey_ratio, input_size**-0.5)
        self.qkv = nn.Linear(input_size, 3 * config.token_size, bias=False)
        self.o_proj = nn.Linear(config.token_size, config.token_size)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """`[B, N, input_size]` to `[B, N, token_size]`."""
        query, key, value = self.qkv(hidden_states)[:, None].chunk(3, dim=-1)
        output, _ = self.attend(query, key, value, grid, **kwargs)
        return value[:, 0] + self.o_proj(output.flatten(-2))


class DropKeyT2TViTPerformer(DropKeyAttention):
    """The linear attention of a performer token stage (Choromanski et al., 2021), by positive random features.

    It has no scores. With DropKey, a key leaves numerator and denominator for all queries of its image.
    """

    def __init__(self, config: DropKeyT2TViTConfig, input_size: int, dropkey_ratio: float):
        super().__init__(config, dropkey_ratio, 1.0)
        self.epsilon = 1e-8
        self.kqv = nn.Linear(input_size, 3 * config.token_size)
        self.o_proj = nn.Linear(config.token_size, config.token_size)
        self.dropout = nn.Dropout(config.performer_dropout_prob)
        # random and fixed, but part of the checkpoint: another draw is another model
        directions = torch.empty(config.token_size // 2, config.token_size)
        self.directions = nn.Parameter(directions, requires_grad=False)

    def features(self, states: torch.Tensor) -> torch.Tensor:
        """Positive random features `[B, N, token_size / 2]` of queries or keys `[B, N, token_size]`."""
        # fixed also where a user unfreezes all parameters
        directions = self.directions.detach().to(states.dtype)
        exponents = states @ directions.T - states.square().sum(-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(len(directions))

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """`[B, N, input_size]` to `[B, N, token_size]`."""
        states = self.kqv(hidden_states)
        # exponentials overflow in half precision
        with torch.autocast(states.device.type, enabled=False):
            key, query, value = states.to(torch.promote_types(states.dtype, torch.float32)).chunk(3, dim=-1)
            key, query = self.features(key), self.features(query)
            if dropkey_is_active(self):
                # one row of scores per image: its decisions hold for all queries
                row = key[:, None, :1]
                seed = seed_for(self, key.shape[0], key.device)
                dropped = protected_drops(seed, row, key[:, None], None, settings_of(self, grid))
                key = key.masked_fill(dropped[:, 0, 0, :, None], 0.0)
            total = query @ key.sum(1)[..., None]
            output = query @ (key.transpose(1, 2) @ value) / (total + self.epsilon)
        value, output = value.to(states.dtype), output.to(states.dtype)
        return value + self.dropout(self.o_proj(output))


class DropKeyT2TViTTokenStage(GradientCheckpointingLayer):
    """One token stage: an attention from wide to narrow tokens, and an MLP."""

    def __init__(self, config: DropKeyT2TViTConfig, input_size: int, dropkey_ratio: float):
        super().__init__()
        performer = config.token_stage == "performer"
        attention_class = DropKeyT2TViTPerformer if performer else DropKeyT2TViTTokenAttention
        self.layernorm_before = nn.LayerNorm(input_size, eps=config.layer_norm_eps)
        self.attention = attention_class(config, input_size, dropkey_ratio)
        self.layernorm_after = nn.LayerNorm(config.token_size, eps=config.layer_norm_eps)
        self.mlp = DropKeyMLP(config, config.token_size, config.token_size, dropout=0.0)
        self.dropout = nn.Dropout(config.performer_dropout_prob if performer else config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """Tokens `[B, N, input_size]` on a grid (rows, columns) to `[B, N, token_size]`."""
        hidden_states = self.attention(self.layernorm_before(hidden_states), grid, **kwargs)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class DropKeyT2TViTEmbeddings(nn.Module):
    """From pixels to tokens: windows, token stages, projection, class token and positions."""

    position_embeddings: torch.Tensor

    def __init__(self, config: DropKeyT2TViTConfig, dropkey_ratios: list[float]):
        super().__init__()
        self.config = config
        widths = [channels * side**2 for channels, (side, _, _) in zip(self._channels(), WINDOWS, strict=True)]
        self.token_stages = nn.ModuleList(
            DropKeyT2TViTTokenStage(config, width, ratio)
            for width, ratio in zip(widths[:-1], dropkey_ratios, strict=True)
        )
        self.projection = nn.Linear(widths[-1], config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        rows, columns = config.patch_grid
        # fixed, but resized checkpoints hold other values than the formula
        self.register_buffer("position_embeddings", sinusoid_positions(1 + rows * columns, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def _channels(self) -> list[int]:
        return [self.config.num_channels, self.config.token_size, self.config.token_size]

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embeddings `[1, 1 + rows * columns, C]` of an image with this patch grid."""
        return resize_position_tokens(self.position_embeddings, self.config.patch_grid, grid)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`[B, C, height, width]` to `[B, 1 + N, hidden_size]`, N being the 16 x 16 patches."""
        image = pixel_values
        grid = pixel_values.shape[-2], pixel_values.shape[-1]
        for index, (side, stride, padding) in enumerate(WINDOWS):
            tokens = nn.functional.unfold(image, side, padding=padding, stride=stride).transpose(1, 2)
            grid = grid[0] // stride, grid[1] // stride
            if index < len(self.token_stages):
                tokens = self._stage(index, tokens, grid, **kwargs)
                image = tokens.transpose(1, 2).unflatten(2, grid)
        tokens = self.projection(tokens)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.dropout(tokens + self.positions(grid))

    def _stage(self, index: int, tokens: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        stage = self.token_stages[index]
        if stage.gradient_checkpointing and self.training and not tokens.requires_grad and torch.is_grad_enabled():
            # pixels need no gradient, and reentrant checkpointing gives none to a layer unless an input needs one
            tokens.requires_grad_(True)
        return stage(tokens, grid, **kwargs)


class DropKeyT2TViTLayer(DropKeyPreNormLayer):
    """A transformer layer of T2T-ViT; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyT2TViTConfig, dropkey_ratio: float, drop_path_ratio: float):
        attention = DropKeySelfAttention(config, dropkey_ratio)
        super().__init__(config, attention, config.hidden_size, drop_path_ratio)


class DropKeyT2TViTPreTrainedModel(DropKeyArchitecture):
    """What the DropKeyT2TViT models share: configuration class, initial weights, flags."""

    config: DropKeyT2TViTConfig
    config_class = DropKeyT2TViTConfig
    base_model_prefix = "t2t_vit"
    _no_split_modules = ["DropKeyT2TViTEmbeddings", "DropKeyT2TViTLayer"]
    # the token stages work on tokens of other widths and are not among the hidden states
    _can_record_outputs = {"hidden_states": DropKeyT2TViTLayer, "attentions": DropKeySelfAttention}
    _input_embed_layer = "projection"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DropKeyT2TViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            _, positions, width = module.position_embeddings.shape
            init.copy_(module.position_embeddings, sinusoid_positions(positions, width))
        elif isinstance(module, DropKeyT2TViTPerformer):
            init.orthogonal_(module.directions, gain=math.sqrt(len(module.directions)))


class DropKeyT2TViTModel(DropKeyT2TViTPreTrainedModel):
    """The bare T2T-ViT encoder.

    `layer_ratios(...)` of the configuration's schedule runs over the enabled sites in order of execution: the two
    token stages, if `dropkey_token_stage`, then the layers.
    """

    def __init__(self, config: DropKeyT2TViTConfig):
        config.validate_dropkey()
        super().__init__(config)
        depth = config.num_hidden_layers
        stages = 2 if config.dropkey_token_stage else 0
        ratios = layer_ratios(
            stages + depth, config.dropkey_ratio, config.dropkey_final_ratio, config.dropkey_schedule
        )
        self.embeddings = DropKeyT2TViTEmbeddings(config, ratios[:stages] or [0.0, 0.0])
        self.layers = nn.ModuleList(
            DropKeyT2TViTLayer(config, ratio, config.drop_path_rate * index / max(depth - 1, 1))
            for index, ratio in enumerate(ratios[stages:])
        )
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
            The normalised tokens `[B, 1 + N, hidden_size]` with the class token first, and the class token
            `[B, hidden_size]` as pooled output.

        Raises:
            ValueError: `pixel_values` is missing or of a size that the model cannot take.
        """
        dtype = self.embeddings.projection.weight.dtype
        pixel_values = checked_pixel_values(pixel_values, self.config, interpolate_pos_encoding).to(dtype)
        hidden_states = self.embeddings(pixel_values, **kwargs)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        for layer in self.layers:
            hidden_states = layer(hidden_states, grid, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class DropKeyT2TViTBackbone(DropKeyBackboneMixin, DropKeyT2TViTModel):
    """T2T-ViT as a backbone: feature maps of any layers, all at stride 16; the stem is the output of the token stages."""


class DropKeyT2TViTForImageClassification(DropKeyClassifierMixin, DropKeyT2TViTPreTrainedModel):
    """T2T-ViT with a linear classifier on the class token."""

    def __init__(self, config: DropKeyT2TViTConfig):
        super().__init__(config)
        self.t2t_vit = DropKeyT2TViTModel(config)
        self.add_classifier(config)
        self.post_init()


__all__ = [
    "DropKeyT2TViTBackbone",
    "DropKeyT2TViTForImageClassification",
    "DropKeyT2TViTModel",
    "DropKeyT2TViTPreTrainedModel",
]
