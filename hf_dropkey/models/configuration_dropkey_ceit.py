"""Configuration of DropKeyCeit. This file travels with checkpoints."""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

import inspect
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_dropkey import DropKeyConfigMixin
from .configuration_dropkey_backbone import DropKeyBackboneConfigMixin
from .configuration_dropkey_sizes import PublishedSizesMixin, check_heads


@strict
class DropKeyCeitConfig(DropKeyBackboneConfigMixin, DropKeyConfigMixin, PublishedSizesMixin, PreTrainedConfig):
    """Configuration of a CeiT (Yuan et al., "Incorporating Convolution Designs into Visual Transformers", ICCV 2021).

    The defaults are those of CeiT-T. With the same weights, a model in eval mode, or with `dropkey_ratio=0`, computes
    exactly what the plain CeiT computes.

    Where DropKey acts is a choice of this package, because the paper does not say it: in every transformer layer and in
    the layer-wise class attention. The schedule runs over the enabled sites in order of execution.

    Args:
        hidden_size (`int`, defaults to 192):
            Width of the layers.
        num_hidden_layers (`int`, defaults to 12):
            Number of transformer layers, without the layer-wise class attention.
        num_attention_heads (`int`, defaults to 3):
            Heads of each attention.
        mlp_ratio (`float`, defaults to 4.0):
            Width of the feed-forward parts as a multiple of `hidden_size`.
        stem_size (`int`, defaults to 64):
            Width of the convolution in front.
        local_size (`int`, defaults to 3):
            Side of the depthwise convolution of the feed-forward parts, odd.
        image_size (`int`, defaults to 224):
            Side of the square images, a multiple of 16.
        num_channels (`int`, defaults to 3):
            Image channels.
        qkv_bias (`bool`, defaults to `True`):
            Whether queries, keys and values have a bias.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward parts.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout on embeddings, attention outputs and the MLP of the layer-wise class attention.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on attention weights, which DropKey replaces.
        drop_path_rate (`float`, defaults to 0.0):
            Ratio of stochastic depth of the last transformer layer; grows linearly from 0.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial linear weights.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of all layer norms.
        dropkey_class_attention (`bool`, defaults to `True`):
            Whether DropKey acts in the layer-wise class attention, whose keys are the class tokens of all layers. They
            lie on no grid, so the patterns "block" and "cross" need `False`.

    Example:

        config = DropKeyCeitConfig.from_size("ceit_small", dropkey_ratio=0.3)
        model = DropKeyCeitForImageClassification(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_ceit"

    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    mlp_ratio: float | int = 4.0
    stem_size: int = 64
    local_size: int = 3
    image_size: int = 224
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    dropkey_class_attention: bool = True

    published_sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "ceit_tiny": {"hidden_size": 192, "num_attention_heads": 3},
        "ceit_small": {"hidden_size": 384, "num_attention_heads": 6},
        "ceit_base": {"hidden_size": 768, "num_attention_heads": 12},
    }

    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_ceit.DropKeyCeitConfig",
        "AutoBackbone": "modeling_dropkey_ceit.DropKeyCeitBackbone",
        "AutoModel": "modeling_dropkey_ceit.DropKeyCeitModel",
        "AutoModelForImageClassification": "modeling_dropkey_ceit.DropKeyCeitForImageClassification",
    }

    def validate_architecture(self) -> None:
        """Raises ValueError where fields contradict each other."""
        check_heads(self.hidden_size, self.num_attention_heads, ("hidden_size", "num_attention_heads"))
        if self.num_hidden_layers < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1, got {self.num_hidden_layers}.")
        if self.local_size < 1 or self.local_size % 2 == 0:
            raise ValueError(f"`local_size` must be odd and positive, got {self.local_size}. Published models take 3.")

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; windows must fit the patch grid, and every site must have one."""
        super().validate_dropkey()
        self.check_pattern_grid(self.patch_grid)
        if self.dropkey_pattern in ("block", "cross") and self.dropkey_class_attention and self.dropkey_ratio > 0:
            raise ValueError(
                f"The keys of the layer-wise class attention lie on no grid, so the pattern {self.dropkey_pattern!r} "
                "cannot drop them. Pass dropkey_class_attention=False, or choose 'score', 'key' or 'token'."
            )

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_ceit import DropKeyCeitModel

        return Path(inspect.getfile(DropKeyCeitModel))


__all__ = ["DropKeyCeitConfig"]
