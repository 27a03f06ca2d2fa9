"""Configuration of DropKeyT2TViT. This file travels with checkpoints."""

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
from .dropkey import check_choice


TOKEN_STAGES = ("performer", "transformer")


def _size(hidden_size: int, depth: int, heads: int, mlp_ratio: float, token_stage: str = "performer") -> dict:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": mlp_ratio,
        "token_stage": token_stage,
    }


@strict
class DropKeyT2TViTConfig(DropKeyBackboneConfigMixin, DropKeyConfigMixin, PublishedSizesMixin, PreTrainedConfig):
    """Configuration of a T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021) trained with DropKey.

    The defaults are those of T2T-ViT-14. With the same weights, a model in eval mode, or with `dropkey_ratio=0` (and
    `performer_dropout_prob=0`), computes exactly what the plain T2T-ViT computes.

    Where DropKey acts is a choice of this package, because the paper does not say it: in every transformer layer, and
    with `dropkey_token_stage=True` in the two token stages too. The schedule runs over the enabled sites in order of
    execution, so the token stages, if on, come first and a decreasing schedule gives them the largest ratios.

    Args:
        hidden_size (`int`, defaults to 384):
            Width of the transformer layers.
        num_hidden_layers (`int`, defaults to 14):
            Number of transformer layers behind the token stages.
        num_attention_heads (`int`, defaults to 6):
            Heads of each transformer layer.
        mlp_ratio (`float`, defaults to 3.0):
            Width of the MLPs as a multiple of `hidden_size`.
        token_stage (`str`, defaults to `"performer"`):
            How the two stages in front mix the overlapping pixel windows: `"performer"`, a linear attention by random
            features, or `"transformer"`, softmax attention with one head (the `t2t_vit_t` sizes).
        token_size (`int`, defaults to 64):
            Width of the tokens between the token stages, even.
        image_size (`int`, defaults to 224):
            Side of the square images, a multiple of 16.
        num_channels (`int`, defaults to 3):
            Image channels.
        qkv_bias (`bool`, defaults to `False`):
            Whether queries, keys and values of the transformer layers have a bias.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the MLPs.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout on embeddings, attention outputs and MLPs of the transformer layers.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on attention weights, which DropKey replaces.
        performer_dropout_prob (`float`, defaults to 0.1):
            Dropout inside the performer token stages, which the published models always train with.
        drop_path_rate (`float`, defaults to 0.0):
            Ratio of stochastic depth of the last layer; grows linearly from 0.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial linear weights.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of all layer norms.
        dropkey_token_stage (`bool`, defaults to `False`):
            Whether DropKey also acts in the token stages. A transformer stage drops scores like any attention. A
            performer has no scores to drop: there, a dropped key leaves numerator and denominator for all queries of
            the image, which is exact attention without that key. It is drawn by the same pattern as one row of scores.

    Example:

        config = DropKeyT2TViTConfig.from_size("t2t_vit_14", dropkey_ratio=0.3)
        model = DropKeyT2TViTForImageClassification(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_t2t_vit"

    hidden_size: int = 384
    num_hidden_layers: int = 14
    num_attention_heads: int = 6
    mlp_ratio: float | int = 3.0
    token_stage: str = "performer"
    token_size: int = 64
    image_size: int = 224
    num_channels: int = 3
    qkv_bias: bool = False
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    performer_dropout_prob: float | int = 0.1
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    dropkey_token_stage: bool = False

    published_sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "t2t_vit_7": _size(256, 7, 4, 2.0),
        "t2t_vit_10": _size(256, 10, 4, 2.0),
        "t2t_vit_12": _size(256, 12, 4, 2.0),
        "t2t_vit_14": _size(384, 14, 6, 3.0),
        "t2t_vit_19": _size(448, 19, 7, 3.0),
        "t2t_vit_24": _size(512, 24, 8, 3.0),
        "t2t_vit_t_14": _size(384, 14, 6, 3.0, "transformer"),
        "t2t_vit_t_19": _size(448, 19, 7, 3.0, "transformer"),
        "t2t_vit_t_24": _size(512, 24, 8, 3.0, "transformer"),
        "t2t_vit_14_resnext": _size(384, 14, 32, 3.0),
        "t2t_vit_14_wide": _size(768, 4, 12, 3.0),
    }

    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_t2t_vit.DropKeyT2TViTConfig",
        "AutoBackbone": "modeling_dropkey_t2t_vit.DropKeyT2TViTBackbone",
        "AutoModel": "modeling_dropkey_t2t_vit.DropKeyT2TViTModel",
        "AutoModelForImageClassification": "modeling_dropkey_t2t_vit.DropKeyT2TViTForImageClassification",
    }

    def validate_architecture(self) -> None:
        """Raises ValueError where fields contradict each other."""
        check_choice(self.token_stage, TOKEN_STAGES, "token_stage")
        check_heads(self.hidden_size, self.num_attention_heads, ("hidden_size", "num_attention_heads"))
        if self.token_size < 2 or self.token_size % 2:
            raise ValueError(
                f"`token_size` must be even and positive, got {self.token_size}. Published models take 64."
            )

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; windows must fit the patch grid."""
        super().validate_dropkey()
        self.check_pattern_grid(self.patch_grid)

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_t2t_vit import DropKeyT2TViTModel

        return Path(inspect.getfile(DropKeyT2TViTModel))


__all__ = ["DropKeyT2TViTConfig"]
