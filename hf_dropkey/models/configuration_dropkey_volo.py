"""Configuration of DropKeyVolo. This file travels with checkpoints."""

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


# side of the windows that outlook attention works in
OUTLOOK_WINDOW = 3


def _size(depths: list[int], hidden_size: int, heads: int, outlook_heads: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "depths": depths,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "outlook_hidden_size": hidden_size // 2,
        "num_outlook_heads": outlook_heads,
        **kwargs,
    }


@strict
class DropKeyVoloConfig(DropKeyBackboneConfigMixin, DropKeyConfigMixin, PublishedSizesMixin, PreTrainedConfig):
    """Configuration of a VOLO (Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", 2021) with DropKey.

    The defaults are those of VOLO-D1. With the same weights, a model in eval mode, or with `dropkey_ratio=0`, computes
    exactly what the plain VOLO computes.

    Where DropKey acts is a choice of this package, because the paper does not say it: in outlook, self- and class
    attention. The schedule runs over the enabled sites in order of execution.

    Args:
        depths (`list[int]`, defaults to `[4, 4, 8, 2]`):
            Number of outlook layers, then of transformer layers of each stage.
        hidden_size (`int`, defaults to 384):
            Width of the transformer layers.
        num_attention_heads (`int`, defaults to 12):
            Heads of the transformer and class layers.
        outlook_hidden_size (`int`, defaults to 192):
            Width of the outlook layers.
        num_outlook_heads (`int`, defaults to 6):
            Heads of the outlook layers.
        num_class_layers (`int`, defaults to 2):
            Number of class-attention layers at the end.
        stem_size (`int`, defaults to 64):
            Width of the convolutions in front.
        mlp_ratio (`float`, defaults to 3.0):
            Width of the MLPs as a multiple of their input.
        image_size (`int`, defaults to 224):
            Side of the square images, a multiple of 16.
        num_channels (`int`, defaults to 3):
            Image channels.
        qkv_bias (`bool`, defaults to `False`):
            Whether queries, keys and values have a bias.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the MLPs.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout on position embeddings, attention outputs and MLPs.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on attention weights, which DropKey replaces.
        drop_path_rate (`float`, defaults to 0.0):
            Ratio of stochastic depth of the last transformer layer; grows linearly over outlook and transformer layers,
            but as in the published models the outlook and class layers themselves never use it.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial linear weights.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of all layer norms.
        dense_head (`bool`, defaults to `True`):
            Whether a second head classifies every token. Its largest score per class counts half in the logits of
            eval mode; in training it has a loss of its own.
        dense_loss_weight (`float`, defaults to 0.5):
            Weight of the loss of the dense head in training, at least 0.
        mix_token (`bool`, defaults to `False`):
            Whether training swaps a random box of tokens between the images of a batch, and mixes the labels by area.
            The published models were trained with it. Needs `dense_head`.
        dropkey_outlook (`bool`, defaults to `True`):
            Whether DropKey acts in outlook attention, where a key is one of the 9 positions of a window.
        dropkey_class_attention (`bool`, defaults to `True`):
            Whether DropKey acts in class attention, where the class token is the only query.

    Example:

        config = DropKeyVoloConfig.from_size("volo_d1", dropkey_ratio=0.3)
        model = DropKeyVoloForImageClassification(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_volo"

    depths: list[int] | tuple[int, ...] = (4, 4, 8, 2)
    hidden_size: int = 384
    num_attention_heads: int = 12
    outlook_hidden_size: int = 192
    num_outlook_heads: int = 6
    num_class_layers: int = 2
    stem_size: int = 64
    mlp_ratio: float | int = 3.0
    image_size: int = 224
    num_channels: int = 3
    qkv_bias: bool = False
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    dense_head: bool = True
    dense_loss_weight: float | int = 0.5
    mix_token: bool = False
    dropkey_outlook: bool = True
    dropkey_class_attention: bool = True

    published_sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "volo_d1": _size([4, 4, 8, 2], 384, 12, 6),
        "volo_d2": _size([6, 4, 10, 4], 512, 16, 8),
        "volo_d3": _size([8, 8, 16, 4], 512, 16, 8),
        "volo_d4": _size([8, 8, 16, 4], 768, 16, 12),
        "volo_d5": _size([12, 12, 20, 4], 768, 16, 12, mlp_ratio=4.0, stem_size=128),
    }

    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_volo.DropKeyVoloConfig",
        "AutoBackbone": "modeling_dropkey_volo.DropKeyVoloBackbone",
        "AutoModel": "modeling_dropkey_volo.DropKeyVoloModel",
        "AutoModelForImageClassification": "modeling_dropkey_volo.DropKeyVoloForImageClassification",
    }

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of all kinds."""
        return sum(self.depths) + self.num_class_layers

    @property
    def stage_depths(self) -> list[int]:
        """Number of layers of each stage after the stem; the outlook layers are the first stage."""
        return list(self.depths)

    def validate_architecture(self) -> None:
        """Raises ValueError where fields contradict each other."""
        check_heads(self.hidden_size, self.num_attention_heads, ("hidden_size", "num_attention_heads"))
        check_heads(self.outlook_hidden_size, self.num_outlook_heads, ("outlook_hidden_size", "num_outlook_heads"))
        if len(self.depths) < 2 or min(self.depths) < 1:
            raise ValueError(
                f"`depths` must hold the number of outlook layers and of at least one stage of transformer layers, each "
                f"at least 1, got {self.depths!r}. VOLO-D1 has [4, 4, 8, 2]."
            )
        if self.num_class_layers < 1:
            raise ValueError(f"`num_class_layers` must be at least 1, got {self.num_class_layers}.")

    def validate_training(self) -> None:
        """Raises ValueError where the settings of the dense head contradict each other."""
        if self.dense_loss_weight < 0:
            raise ValueError(f"`dense_loss_weight` must be at least 0, got {self.dense_loss_weight}.")
        if self.mix_token and not self.dense_head:
            raise ValueError("`mix_token` mixes the labels of tokens, so it needs dense_head=True. Set it to False.")

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; windows must fit the patch grid and, if on, outlook windows."""
        super().validate_dropkey()
        self.check_pattern_grid(self.patch_grid)
        if self.dropkey_outlook:
            self.check_pattern_grid((OUTLOOK_WINDOW, OUTLOOK_WINDOW))

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_volo import DropKeyVoloModel

        return Path(inspect.getfile(DropKeyVoloModel))


__all__ = ["DropKeyVoloConfig"]
