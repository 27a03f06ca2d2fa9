"""DropKeyViT: Transformers' Vision Transformer with DropKey in its self-attention. This file travels with checkpoints.

The classes are Transformers' own with another attention module. Module and parameter names are those of the plain
models, checkpoints are written in the layout that plain ViT reads, and both layouts in use load.
"""

import re
from typing import Any, Unpack

import torch
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel, ViTPreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer, ViTMLP, ViTPooler
from transformers.utils.generic import TransformersKwargs

from .attention import dropkey_attention_forward
from .configuration_dropkey_vit import DropKeyViTConfig
from .dropkey import DropKeyRatioMixin, dropkey_is_active, layer_ratios
from .modeling_dropkey import DropKeyModelMixin, checked_pixel_values, image_classification_loss
from .modeling_dropkey_backbone import DropKeyBackboneMixin


# names of layers in checkpoints written before Transformers 5.9, and by `save_pretrained` still
LEGACY_NAMES = (
    (re.compile(r"^encoder\.layer\."), "layers."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), lambda found: f".attention.{found[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
)


class DropKeyViTAttention(DropKeyRatioMixin, ViTAttention):
    """ViT's self-attention, with DropKey in training.

    Attributes:
        dropkey_ratio: Drop ratio of this layer, a plain float that may be changed at any time.
        dropkey_pattern: What is dropped together.
        dropkey_window: Size of a block or cross, in patches.
    """

    def __init__(self, config: DropKeyViTConfig, dropkey_ratio: float):
        super().__init__(config)
        self.dropkey_ratio = dropkey_ratio
        self.dropkey_pattern = config.dropkey_pattern
        self.dropkey_window = config.dropkey_window
        self.dropkey_configured = config.dropkey_ratio

    def forward(  # type: ignore[override]  # Transformers lists its keyword arguments, which pass through here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        dropkey_grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `ViTAttention.forward`; `dropkey_grid` are the patch rows and columns."""
        if not dropkey_is_active(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output, weights = dropkey_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            implementation=self.config._attn_implementation,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            grid=dropkey_grid,
        )
        return self.o_proj(output.flatten(-2)), weights


class DropKeyViTLayer(ViTLayer):
    """ViT's layer with DropKey in its attention; `dropkey_ratio` is the drop ratio of the layer."""

    def __init__(self, config: DropKeyViTConfig, dropkey_ratio: float):
        # the parts of ViTLayer, in its order, so that a seed gives plain ViT's initial weights
        super(ViTLayer, self).__init__()
        self.attention = DropKeyViTAttention(config, dropkey_ratio)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class DropKeyViTPreTrainedModel(DropKeyModelMixin, ViTPreTrainedModel):
    """What the DropKeyViT models share: configuration class, checkpoint handling, flags."""

    config: DropKeyViTConfig
    config_class = DropKeyViTConfig
    _no_split_modules = ["ViTEmbeddings", "DropKeyViTLayer"]


def rename_legacy_keys(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Renames old layer names below `prefix` in place, before `module.load_state_dict` reads them.

    `from_pretrained` converts names by itself; `Trainer` resumes, and loads its best checkpoint, with a bare
    `load_state_dict` of a file in the old layout.
    """
    for old in [name for name in state_dict if name.startswith(f"{prefix}encoder.layer.")]:
        name = old.removeprefix(prefix)
        for pattern, replacement in LEGACY_NAMES:
            name = pattern.sub(replacement, name)
        state_dict[prefix + name] = state_dict.pop(old)


class DropKeyViTModel(DropKeyViTPreTrainedModel, ViTModel):
    """The bare DropKeyViT encoder; arguments and outputs as `transformers.ViTModel`.

    Layer i drops keys at the ratio `layer_ratios(...)[i]` of the configuration's schedule.
    """

    def __init__(self, config: DropKeyViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        config.validate_dropkey()
        # the parts of ViTModel, in its order, without building its layers first
        ViTPreTrainedModel.__init__(self, config)
        ratios = layer_ratios(
            config.num_hidden_layers, config.dropkey_ratio, config.dropkey_final_ratio, config.dropkey_schedule
        )
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([DropKeyViTLayer(config, ratio) for ratio in ratios])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.register_load_state_dict_pre_hook(rename_legacy_keys)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """As `ViTModel.forward`.

        Raises:
            ValueError: `pixel_values` is missing or not `[B, C, height, width]` of the configured size.
        """
        pixel_values = checked_pixel_values(pixel_values, self.config, interpolate_pos_encoding, resizable=False)
        own: dict[str, Any] = {}
        if self.config.dropkey_pattern in ("block", "cross"):
            own["dropkey_grid"] = self.config.grid_of(*pixel_values.shape[2:])
        return super().forward(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **own,
            **kwargs,
        )


class DropKeyViTBackbone(DropKeyBackboneMixin, DropKeyViTModel):
    """DropKeyViT as a backbone: feature maps of any layers, all at the stride of the patches."""

    def __init__(self, config: DropKeyViTConfig):
        super().__init__(config, add_pooling_layer=False)


class DropKeyViTForImageClassification(DropKeyViTPreTrainedModel, ViTForImageClassification):
    """DropKeyViT with a linear classifier on the class token, as `transformers.ViTForImageClassification`."""

    def __init__(self, config: DropKeyViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 0
        self.vit = DropKeyViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        # Transformers guesses the loss from the class name, which a subclass is free to change
        self.loss_type = "ForImageClassification"
        self.loss_function = image_classification_loss
        self.post_init()


class DropKeyViTForMaskedImageModeling(DropKeyViTPreTrainedModel, ViTForMaskedImageModeling):
    """DropKeyViT with a decoder for masked image modelling, as `transformers.ViTForMaskedImageModeling`."""

    def __init__(self, config: DropKeyViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.vit = DropKeyViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()


# by class and by model type: heads, bases and users' subclasses of either. Each process registers once per copy of
# this file, hence overwrite
for _name in ("DropKeyViTModel", DropKeyViTConfig.model_type):
    register_checkpoint_conversion_mapping(_name, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True)


__all__ = [
    "DropKeyViTBackbone",
    "DropKeyViTForImageClassification",
    "DropKeyViTForMaskedImageModeling",
    "DropKeyViTModel",
    "DropKeyViTPreTrainedModel",
]
