"""What the models share.

All: the choice of a backend, and the classification loss. T2T-ViT, VOLO and CeiT: attention with DropKey, layers, image
sizes, initialisation.

This file travels with checkpoints: it imports torch, transformers and its neighbours only.
"""

import math
from typing import Any, Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .attention import default_backend, default_device, dropkey_attention_forward
from .configuration_dropkey import RemotePickleMixin
from .configuration_dropkey_sizes import check_image_side, height_and_width
from .dropkey import DropKeyRatioMixin, dropkey_is_active
from .sample_masks import check_argument, number_layers, sample_ids
from .triton_attention import SUPPORTED_PATTERNS


logger = logging.get_logger(__name__)


def _fused_sizes(config: Any) -> dict[str, int]:
    """The sizes that `default_backend` may choose the fused kernel by; none where they are unknown, or it would refuse."""
    refused = config.model_type != "dropkey_vit" or config.attention_probs_dropout_prob > 0
    if refused or config.dropkey_pattern not in SUPPORTED_PATTERNS:
        return {}
    (height, width), (rows, columns) = height_and_width(config.image_size), height_and_width(config.patch_size)
    tokens = (height // rows) * (width // columns) + 1
    return {"tokens": tokens, "head_width": config.hidden_size // config.num_attention_heads}


# --- attention -------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with explicit weights, as Transformers' `eager`; softmax in float32 at least."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    precise = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DropKeyAttention(DropKeyRatioMixin, nn.Module):
    """Base of every attention with DropKey: its settings, and the call of the chosen backend.

    Attributes:
        dropkey_ratio: Drop ratio of this attention, a plain float that may be changed at any time.
        dropkey_pattern: What is dropped together.
        dropkey_window: Size of a block or cross, in patches.
    """

    def __init__(self, config: Any, dropkey_ratio: float, scaling: float):
        super().__init__()
        self.config = config
        self.dropkey_ratio = dropkey_ratio
        self.dropkey_pattern = config.dropkey_pattern
        self.dropkey_window = config.dropkey_window
        self.dropkey_configured = config.dropkey_ratio
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = scaling
        self.is_causal = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: tuple[int, int] | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `[B, H, N, D]` tensors on the configured backend, with DropKey while it is active.

        Args:
            query: `[B, H, N, D]`.
            key: `[B, H, M, D]`.
            value: `[B, H, M, Dv]`.
            grid: Rows and columns of the keys, for the patterns "block" and "cross".
            kwargs: Passed to the stock attention function.

        Returns:
            The output `[B, N, H, Dv]`, and the weights `[B, H, N, M]` on `eager`, else None.
        """
        dropout = self.attention_dropout if self.training else 0.0
        if dropkey_is_active(self):
            return dropkey_attention_forward(
                self,
                query,
                key,
                value,
                None,
                implementation=self.config._attn_implementation,
                scaling=self.scaling,
                dropout=dropout,
                grid=grid,
            )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)


class DropKeySelfAttention(DropKeyAttention):
    """Multi-head self-attention whose queries, keys and values come from one matrix."""

    def __init__(self, config: Any, dropkey_ratio: float):
        super().__init__(config, dropkey_ratio, (config.hidden_size // config.num_attention_heads) ** -0.5)
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int] | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `[B, N, C]` tokens to each other; tokens in front of the grid's patches are not patches.

        Returns:
            The output `[B, N, C]`, and the weights `[B, H, N, N]` on `eager`, else None.
        """
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        output, weights = self.attend(query, key, value, grid, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


# --- layers ----------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, zeroes the branch of whole images at the rate `ratio`."""

    def __init__(self, ratio: float):
        super().__init__()
        self.ratio = ratio

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `[B, ...]`, each image either zero or scaled by 1 / (1 - ratio)."""
        if not self.training or self.ratio == 0:
            return hidden_states
        kept = hidden_states.new_empty(hidden_states.shape[0], *[1] * (hidden_states.ndim - 1)).bernoulli_(
            1 - self.ratio
        )
        return hidden_states * kept / (1 - self.ratio)

    def extra_repr(self) -> str:
        """The ratio, as shown when a model is printed."""
        return f"ratio={self.ratio}"


class DropKeyMLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: Any, hidden_size: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., C]` to `[..., C]`."""
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class DropKeyPreNormLayer(GradientCheckpointingLayer):
    """A transformer layer that normalises what goes into its attention and its MLP.

    Args:
        config: The model's configuration.
        attention: The attention, called with the normalised tokens, their grid and keyword arguments.
        hidden_size: Width `C` of the tokens.
        drop_path_ratio: Ratio of stochastic depth, [0, 1).
        mlp: What stands in the place of the MLP.
    """

    def __init__(
        self,
        config: Any,
        attention: nn.Module,
        hidden_size: int,
        drop_path_ratio: float = 0.0,
        mlp: nn.Module | None = None,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = mlp or DropKeyMLP(
            config, hidden_size, int(hidden_size * config.mlp_ratio), config.hidden_dropout_prob
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_ratio)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """Tokens `[B, N, C]` to tokens of the same shape; `grid` are patch rows and columns."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), grid=grid, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


# --- image sizes -----------------------------------------------------------------------------------------------------


def checked_pixel_values(
    pixel_values: torch.Tensor | None, config: Any, interpolate: bool | None, *, resizable: bool = True
) -> torch.Tensor:
    """`pixel_values`, if the model of `config` can take them.

    Args:
        pixel_values: `[B, C, height, width]`.
        config: With `num_channels`, `image_size` and `check_image_sides(height, width)`.
        interpolate: Whether position embeddings are resized to images of another size.
        resizable: Whether the model has `resize_image_size`.

    Raises:
        ValueError: They are missing, or not `[B, C, height, width]` of a size that the model can take.
    """
    expected = (config.num_channels, *height_and_width(config.image_size))
    shape = None if pixel_values is None else tuple(pixel_values.shape)
    if pixel_values is None or shape is None or len(shape) != 4 or shape[1] != expected[0]:
        raise ValueError(
            f"`pixel_values` must have the shape [batch, {', '.join(map(str, expected))}], got {shape}. "
            "Make it with the checkpoint's image processor."
        )
    config.check_image_sides(*shape[2:])
    if not interpolate and shape[2:] != expected[1:]:
        ways = ["Resize them with the image processor", "pass interpolate_pos_encoding=True"]
        ways += [f"change the model once with resize_image_size({shape[2]})"] if resizable else []
        raise ValueError(
            f"Images of {shape[2]} x {shape[3]} pixels do not match the model's {expected[1]} x {expected[2]}. "
            f"{', '.join(ways[:-1])}, or {ways[-1]}."
        )
    return pixel_values


def resize_position_grid(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Position embeddings `[1, rows, columns, C]` at another grid (rows, columns), bicubic."""
    if tuple(table.shape[1:3]) == grid:
        return table
    precise = table.permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
    resized = nn.functional.interpolate(precise, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(table.dtype)


def resize_position_tokens(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings `[1, 1 + rows * columns, C]` of a class token and a grid, with the grid resized."""
    patches = resize_position_grid(table[:, 1:].unflatten(1, old), new)
    return torch.cat((table[:, :1], patches.flatten(1, 2)), dim=1)


# --- models ----------------------------------------------------------------------------------------------------------


class DropKeyModelMixin(RemotePickleMixin):
    """What every DropKey model adds to `PreTrainedModel`: a backend, masks by sample, pickles of remote classes."""

    def post_init(self) -> None:
        """As in Transformers; the attentions get their numbers."""
        super().post_init()  # type: ignore[misc]
        model: Any = self
        number_layers(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; `sample_ids`, integers `[B]`, makes masks depend on the samples (`sample_masks.sample_ids`)."""
        # torch.compile on Python 3.13 does not understand super() without arguments here
        parent: Any = super(DropKeyModelMixin, self)  # noqa: UP008  # as said
        ids = kwargs.pop("sample_ids", None)
        if ids is None:
            return parent.__call__(*args, **kwargs)
        model: Any = self
        check_argument(model)
        with sample_ids(ids):
            return parent.__call__(*args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in Transformers; where no backend is requested, the fastest one for the device and dtype (`default_backend`)."""
        if requested_attention is None:
            device = default_device()
            requested_attention = default_backend(
                device.type,
                torch.get_default_dtype(),
                **_fused_sizes(self.config),  # type: ignore[attr-defined]
            )
            logger.info_once(
                f"attn_implementation={requested_attention!r}, the default for DropKey on {device.type} in "
                f"{torch.get_default_dtype()}; pass attn_implementation= to choose another."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]


class DropKeyArchitecture(DropKeyModelMixin, PreTrainedModel):
    """What the models of all three families share: flags, initial weights, another image size.

    A family's base model has `embeddings` with `position_embeddings`, and `embeddings.positions(grid)` that resizes
    them.
    """

    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # torch's own start, which the official models keep for convolutions
            bound = (math.prod(module.kernel_size) * module.in_channels // module.groups) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def resize_image_size(self, image_size: int) -> None:
        """Changes the model to images of `image_size` pixels: resizes its position embeddings and its configuration.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size.
        """
        check_image_side(image_size, "`image_size`")
        embeddings: Any = self.base_model.embeddings
        table = embeddings.positions(self.config.grid_of(image_size, image_size))
        learned = isinstance(embeddings.position_embeddings, nn.Parameter)
        embeddings.position_embeddings = nn.Parameter(table.clone()) if learned else table.clone()
        self.config.image_size = image_size


def image_classification_loss(
    labels: torch.Tensor, logits: torch.Tensor, config: Any, num_items_in_batch: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Transformers' classification loss, which also heeds `num_items_in_batch` for multi-label and regression targets.

    `Trainer` passes the number of targets in all accumulated batches and leaves the division to the model, but the
    stock loss divides only a single-label loss by it.
    """
    loss = ForSequenceClassificationLoss(labels, logits, config, num_items_in_batch=num_items_in_batch, **kwargs)
    if num_items_in_batch is None or config.problem_type == "single_label_classification":
        return loss
    return loss * labels.numel() / num_items_in_batch


class DropKeyClassifierMixin:
    """A linear classifier on the pooled output of a base model; goes before the family's class in the bases."""

    config: Any
    base_model: Any

    def add_classifier(self, config: Any) -> None:
        """Adds the classifier and the loss; the base model must have been built."""
        self.num_labels: int = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        # Transformers guesses the loss from the class name, which a subclass is free to change
        self.loss_type = "ForImageClassification"
        self.loss_function = image_classification_loss

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: `[B, C, height, width]`.
            labels: Class indices `[B]`; or targets `[B, num_labels]` for regression and several labels per image.
            interpolate_pos_encoding: Resizes the position embeddings to images of another size.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`, `num_items_in_batch`.

        Returns:
            The loss, if there are labels, the logits `[B, num_labels]`, and what was requested.
        """
        outputs = self.base_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
