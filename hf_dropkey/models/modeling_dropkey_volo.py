"""DropKeyVolo: VOLO (Yuan et al., 2021) with DropKey in its attentions. This file travels with checkpoints.

Outlook layers on 8 x 8 pixel patches, then transformer layers on 16 x 16 pixel patches, then layers in which only the
class token attends. The queries, keys and values come from shared matrices, as in the official checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dropkey_volo import OUTLOOK_WINDOW, DropKeyVoloConfig
from .dropkey import layer_ratios
from .modeling_dropkey import (
    DropKeyArchitecture,
    DropKeyAttention,
    DropKeyClassifierMixin,
    DropKeyPreNormLayer,
    DropKeySelfAttention,
    checked_pixel_values,
    image_classification_loss,
    resize_position_grid,
)
from .modeling_dropkey_backbone import DropKeyBackboneMixin


# patches of the outlook layers along one patch of the transformer layers
POOLING = 2


@dataclass
class DropKeyVoloClassifierOutput(ImageClassifierOutput):
    """As `ImageClassifierOutput`, with the logits `[B, N, num_labels]` of every token, in training only."""

    token_logits: torch.Tensor | None = None


class DropKeyVoloOutlookAttention(DropKeyAttention):
    """Outlook attention: each window's scores are a linear map of its centre, and its values are mixed by them.

    For any backend it is attention per window: the 9 x 9 scores are the queries, the identity the keys, so that their
    product gives back the scores, and the 9 positions of the window the values.
    """

    def __init__(self, config: DropKeyVoloConfig, dropkey_ratio: float):
        width = config.outlook_hidden_size
        super().__init__(config, dropkey_ratio, (width // config.num_outlook_heads) ** -0.5)
        self.num_heads = config.num_outlook_heads
        self.window = OUTLOOK_WINDOW
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.score_proj = nn.Linear(width, self.num_heads * self.window**4)
        # for masks by sample: its batch is the windows of one image, then those of the next
        self.dropkey_windowed = True
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mixes `[B, rows * columns, C]` tokens within 3 x 3 windows around every second row and column.

        Returns:
            The output `[B, rows * columns, C]`, and the weights `[B * windows, H, 9, 9]` on `eager`, else None.
        """
        images, _, width = hidden_states.shape
        cells = self.window**2
        edge = self.window // 2
        # positions outside the image are keys with the value zero
        value = self.v_proj(hidden_states).transpose(1, 2).unflatten(2, grid)
        value = nn.functional.unfold(value, self.window, padding=edge, stride=2)
        value = value.view(images, self.num_heads, -1, cells, value.shape[-1]).permute(0, 4, 1, 3, 2).flatten(0, 1)
        centres = nn.functional.avg_pool2d(hidden_states.transpose(1, 2).unflatten(2, grid), 2, 2, ceil_mode=True)
        scores = self.score_proj(centres.flatten(2).transpose(1, 2))
        scores = scores.flatten(0, 1).view(-1, self.num_heads, cells, cells)
        identity = torch.eye(cells, dtype=scores.dtype, device=scores.device).expand_as(scores)
        output, weights = self.attend(scores, identity, value, (self.window, self.window), **kwargs)
        output = output.unflatten(0, (images, -1)).permute(0, 3, 4, 2, 1).reshape(images, width * cells, -1)
        # with the positions outside, cut off here: PyTorch decomposes a padded fold to a negative pad, which ExecuTorch lacks
        output = nn.functional.fold(output, tuple(side + 2 * edge for side in grid), self.window, stride=2)
        output = output[:, :, edge : edge + grid[0], edge : edge + grid[1]].permute(0, 2, 3, 1).flatten(1, 2)
        return self.o_proj(output), weights


class DropKeyVoloClassAttention(DropKeyAttention):
    """Attention of the class token, the only query, to all tokens."""

    def __init__(self, config: DropKeyVoloConfig, dropkey_ratio: float):
        width = config.hidden_size
        super().__init__(config, dropkey_ratio, (width // config.num_attention_heads) ** -0.5)
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.kv_proj = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, 1 + N, C]` tokens to the class token's update.

        Returns:
            The output `[B, 1, C]`, and the weights `[B, H, 1, 1 + N]` on `eager`, else None.
        """
        query = self.q_proj(hidden_states[:, :1]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_value = self.kv_proj(hidden_states).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = key_value.unbind(0)
        output, weights = self.attend(query, key, value, grid, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


class DropKeyVoloOutlookLayer(DropKeyPreNormLayer):
    """An outlook layer; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyVoloConfig, dropkey_ratio: float):
        super().__init__(config, DropKeyVoloOutlookAttention(config, dropkey_ratio), config.outlook_hidden_size)


class DropKeyVoloLayer(DropKeyPreNormLayer):
    """A transformer layer of VOLO; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyVoloConfig, dropkey_ratio: float, drop_path_ratio: float):
        attention = DropKeySelfAttention(config, dropkey_ratio)
        super().__init__(config, attention, config.hidden_size, drop_path_ratio)


class DropKeyVoloClassLayer(DropKeyPreNormLayer):
    """A layer that updates the class token only; `dropkey_ratio` is its drop ratio."""

    def __init__(self, config: DropKeyVoloConfig, dropkey_ratio: float):
        super().__init__(config, DropKeyVoloClassAttention(config, dropkey_ratio), config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """Tokens `[B, 1 + N, C]` to tokens of the same shape."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), grid=grid, **kwargs)
        class_token = hidden_states[:, :1] + self.dropout(attended)
        class_token = class_token + self.mlp(self.layernorm_after(class_token))
        return torch.cat((class_token, hidden_states[:, 1:]), dim=1)


class DropKeyVoloEmbeddings(nn.Module):
    """The convolutions in front, and the class token, if there is one, and positions that later layers take."""

    def __init__(self, config: DropKeyVoloConfig, add_class_token: bool):
        super().__init__()
        width = config.stem_size
        layers: list[nn.Module] = []
        for channels, side, stride in ((config.num_channels, 7, 2), (width, 3, 1), (width, 3, 1)):
            layers.append(nn.Conv2d(channels, width, side, stride=stride, padding=side // 2, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.projection = nn.Conv2d(width, config.outlook_hidden_size, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if add_class_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, *config.patch_grid, config.hidden_size))

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embeddings `[1, rows, columns, C]` of an image with this patch grid."""
        return resize_position_grid(self.position_embeddings, grid)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, C, height, width]` to patches of 8 x 8 pixels `[B, outlook_hidden_size, rows, columns]`."""
        return self.projection(self.stem(pixel_values))


class DropKeyVoloPreTrainedModel(DropKeyArchitecture):
    """What the DropKeyVolo models share: configuration class, initial weights, flags."""

    config: DropKeyVoloConfig
    config_class = DropKeyVoloConfig
    base_model_prefix = "volo"
    # flash kernels want queries as wide as values, which outlook attention has not
    _supports_flash_attn = False
    _no_split_modules = [
        "DropKeyVoloEmbeddings",
        "DropKeyVoloOutlookLayer",
        "DropKeyVoloLayer",
        "DropKeyVoloClassLayer",
    ]
    _can_record_outputs = {"hidden_states": DropKeyPreNormLayer, "attentions": DropKeyAttention}
    _input_embed_layer = "projection"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DropKeyVoloEmbeddings):
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


def swap_with_mirror(values: torch.Tensor, swapped: torch.Tensor) -> torch.Tensor:
    """`values` `[B, ..., rows, columns]` with the places `swapped` from the batch in reverse order.

    Doing it twice gives back `values`.

    Args:
        values: Any values on a grid.
        swapped: bool `[rows, columns]`.
    """
    return torch.where(swapped, values.flip(0), values)


def draw_swapped_tokens(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A random box of tokens (mix-token, Jiang et al., "All Tokens Matter", 2021), bool `[rows, columns]`.

    The box has a uniformly random fraction of the area and a uniformly random centre, and is cut at the borders. All draws
    come from torch's global generator of `device` and stay there, so training neither waits for them nor loses resume.
    """
    side = torch.rand((), device=device).sqrt()
    inside = []
    for size in grid:
        half = (size * side).long() // 2
        centre = torch.randint(size, (), device=device)
        places = torch.arange(size, device=device)
        inside.append((places >= centre - half) & (places < centre + half))
    return inside[0][:, None] & inside[1]


class DropKeyVoloModel(DropKeyVoloPreTrainedModel):
    """The bare VOLO encoder.

    `layer_ratios(...)` of the configuration's schedule runs over the enabled sites in order of execution: outlook
    layers, transformer layers, class layers, if there are any.
    """

    def __init__(self, config: DropKeyVoloConfig, add_class_layers: bool = True):
        config.validate_dropkey()
        super().__init__(config)
        outlooks, depth = config.depths[0], sum(config.depths)
        class_layers = config.num_class_layers if add_class_layers else 0
        ratios = self._site_ratios(config, class_layers)
        self.embeddings = DropKeyVoloEmbeddings(config, add_class_layers)
        self.outlook_layers = nn.ModuleList(DropKeyVoloOutlookLayer(config, next(ratios)) for _ in range(outlooks))
        self.downsample = nn.Conv2d(config.outlook_hidden_size, config.hidden_size, POOLING, stride=POOLING)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        paths = (config.drop_path_rate * index / (depth - 1) for index in range(outlooks, depth))
        self.stages = nn.ModuleList(
            nn.ModuleList(DropKeyVoloLayer(config, next(ratios), next(paths)) for _ in range(layers))
            for layers in config.depths[1:]
        )
        self.class_layers = nn.ModuleList(DropKeyVoloClassLayer(config, next(ratios)) for _ in range(class_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @staticmethod
    def _site_ratios(config: DropKeyVoloConfig, class_layers: int) -> Iterator[float]:
        """The ratio of every layer in order of execution; 0 where DropKey is off."""
        enabled = [config.dropkey_outlook] * config.depths[0] + [True] * sum(config.depths[1:])
        enabled += [config.dropkey_class_attention] * class_layers
        ratios = iter(
            layer_ratios(sum(enabled), config.dropkey_ratio, config.dropkey_final_ratio, config.dropkey_schedule)
        )
        return iter([next(ratios) if on else 0.0 for on in enabled])

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        swapped_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: `[B, C, height, width]`, both sides multiples of 16.
            interpolate_pos_encoding: Resizes the position embeddings to images of another size, square or not.
            swapped_tokens: bool `[height / 16, width / 16]`: tokens that come from the batch in reverse order.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            The normalised tokens `[B, 1 + N, hidden_size]` with the class token first, and the class token
            `[B, hidden_size]` as pooled output. Hidden states are those of all layers: on 8 x 8 pixel patches in the
            outlook layers, with the class token first in the class layers. Attentions of outlook layers are those of
            single windows, as Swin's. Without class layers the tokens are the patches, and there is no pooled output.

        Raises:
            ValueError: `pixel_values` is missing or of a size that the model cannot take.
        """
        dtype = self.embeddings.projection.weight.dtype
        pixel_values = checked_pixel_values(pixel_values, self.config, interpolate_pos_encoding).to(dtype)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        patches = self.embeddings(pixel_values)
        if swapped_tokens is not None:
            fine = swapped_tokens.repeat_interleave(POOLING, 0).repeat_interleave(POOLING, 1)
            patches = swap_with_mirror(patches, fine)
        hidden_states = self._pooled_tokens(patches, **kwargs)
        for stage in self.stages:
            for layer in cast(nn.ModuleList, stage):
                hidden_states = layer(hidden_states, grid, **kwargs)
        if self.embeddings.cls_token is None:
            return BaseModelOutputWithPooling(last_hidden_state=self.layernorm(hidden_states))
        class_token = self.embeddings.cls_token.to(hidden_states.device).expand(hidden_states.shape[0], -1, -1)
        hidden_states = torch.cat((class_token, hidden_states), dim=1)
        for layer in self.class_layers:
            hidden_states = layer(hidden_states, grid, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])

    def _pooled_tokens(self, patches: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The outlook layers, down-sampling and positions: `[B, C, rows, columns]` to `[B, N, hidden_size]`."""
        grid = patches.shape[-2], patches.shape[-1]
        hidden_states = patches.flatten(2).transpose(1, 2)
        for layer in self.outlook_layers:
            hidden_states = layer(hidden_states, grid, **kwargs)
        pooled = self.downsample(hidden_states.transpose(1, 2).unflatten(2, grid)).permute(0, 2, 3, 1)
        positions = self.embeddings.positions((pooled.shape[1], pooled.shape[2]))
        return self.dropout(pooled + positions.to(pooled.device)).flatten(1, 2)


class DropKeyVoloBackbone(DropKeyBackboneMixin, DropKeyVoloModel):
    """VOLO as a backbone: the stem and the outlook layers (stage 1) at stride 8, the other stages at stride 16.

    The class layers, which update the class token alone, are left out.
    """

    def __init__(self, config: DropKeyVoloConfig):
        super().__init__(config, add_class_layers=False)

    def stage_widths(self) -> list[int]:
        """Channels of each stage, the stem first."""
        return [self.config.outlook_hidden_size] * 2 + [self.config.hidden_size] * (len(self.config.depths) - 1)

    def stage_scales(self) -> list[int]:
        """Rows of each stage for one row of patches of 16 pixels, the stem first."""
        return [POOLING] * 2 + [1] * (len(self.config.depths) - 1)


def token_labelling_loss(
    labels: torch.Tensor,
    token_targets: torch.Tensor | None,
    token_logits: torch.Tensor,
    config: DropKeyVoloConfig,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mean loss of all tokens' own predictions (Jiang et al., "All Tokens Matter", 2021).

    Args:
        labels: Labels of the images, which every token takes where there are no `token_targets`.
        token_targets: Class indices of the tokens `[B, N]`, or their scores `[B, N, num_labels]`.
        token_logits: `[B, N, num_labels]`.
        config: The model's configuration.
        num_items_in_batch: Number of image labels in all accumulated batches.
        kwargs: Passed to the loss.
    """
    tokens = token_logits.shape[1]
    targets = labels.repeat_interleave(tokens, 0) if token_targets is None else token_targets.flatten(0, 1)
    logits = token_logits.flatten(0, 1)
    items = None if num_items_in_batch is None else num_items_in_batch * tokens
    if targets.is_floating_point() and config.problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, targets, reduction="sum") / (
            len(logits) if items is None else items
        )
    return image_classification_loss(targets, logits, config, num_items_in_batch=items, **kwargs)


class DropKeyVoloForImageClassification(DropKeyClassifierMixin, DropKeyVoloPreTrainedModel):
    """VOLO with a linear classifier on the class token, and one on every token."""

    def __init__(self, config: DropKeyVoloConfig):
        super().__init__(config)
        self.volo = DropKeyVoloModel(config)
        self.add_classifier(config)
        dense = config.dense_head and self.num_labels > 0
        self.token_classifier = nn.Linear(config.hidden_size, self.num_labels) if dense else None
        self.post_init()

    # "label" in the name of an argument makes `Trainer` expect it in every batch, also where it evaluates
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_targets: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DropKeyVoloClassifierOutput:
        """Classifies images.

        In training with `mix_token`, the logits are those of the mixed images.

        Args:
            pixel_values: `[B, C, height, width]`.
            labels: Class indices `[B]`; or targets `[B, num_labels]` for regression and several labels per image.
            token_targets: What the dense head should say in training, where it differs from the image's label: class
                indices `[B, rows, columns]` or scores `[B, rows, columns, num_labels]` of the 16 x 16 pixel patches.
            interpolate_pos_encoding: Resizes the position embeddings to images of another size.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`, `num_items_in_batch`.

        Returns:
            The loss, if there are labels, the logits `[B, num_labels]`, in training the logits of the tokens, and what
            was requested.

        Raises:
            ValueError: The images are of a size that the model cannot take, or the targets do not fit the model.
        """
        swapped = self._draw_swapped(pixel_values, labels)
        outputs = self.volo(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, swapped_tokens=swapped, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)
        token_logits = None
        if self.token_classifier is not None:
            token_logits = self.token_classifier(outputs.last_hidden_state[:, 1:])
            if not self.training:
                logits, token_logits = logits + 0.5 * token_logits.max(1).values, None
        loss = None
        if labels is not None:
            loss = self._loss(labels, token_targets, logits, token_logits, swapped, **kwargs)
        return DropKeyVoloClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_logits=token_logits,
        )

    def _draw_swapped(self, pixel_values: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Which tokens of this batch are swapped, bool `[rows, columns]`, or None while mix-token is off."""
        if not self.config.mix_token or not self.training or pixel_values is None:
            return None
        if labels is None:
            raise ValueError(
                "`mix_token` mixes the labels too, so training needs `labels`. With a loss outside the model, such as "
                "Trainer's label_smoothing_factor or compute_loss_func, set config.mix_token = False."
            )
        return draw_swapped_tokens(self.config.grid_of(*pixel_values.shape[-2:]), pixel_values.device)

    def _loss(
        self,
        labels: torch.Tensor,
        token_targets: torch.Tensor | None,
        logits: torch.Tensor,
        token_logits: torch.Tensor | None,
        swapped: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss of the logits; with `swapped`, weighted by area between the two images; and the dense head's."""
        loss = self.loss_function(labels, logits, self.config, **kwargs)
        if swapped is not None:
            share = swapped.to(loss.dtype).mean()
            loss = (1 - share) * loss + share * self.loss_function(labels.flip(0), logits, self.config, **kwargs)
        if token_logits is None:
            return loss
        if swapped is not None:
            # each token answers for the image that it came from
            places = token_logits.transpose(1, 2).unflatten(2, swapped.shape)
            token_logits = swap_with_mirror(places, swapped).flatten(2).transpose(1, 2)
        targets = None if token_targets is None else self._token_targets(token_targets, token_logits)
        dense = token_labelling_loss(labels, targets, token_logits, self.config, **kwargs)
        return loss + self.config.dense_loss_weight * dense

    def _token_targets(self, token_targets: torch.Tensor, token_logits: torch.Tensor) -> torch.Tensor:
        """`token_targets` with rows and columns as one axis, after a check of their shape."""
        images, tokens, classes = token_logits.shape
        flat = token_targets.flatten(1, 2) if token_targets.ndim in (3, 4) else token_targets
        if flat.shape not in ((images, tokens), (images, tokens, classes)):
            raise ValueError(
                f"`token_targets` must be [{images}, rows, columns] or [{images}, rows, columns, {classes}] with "
                f"rows * columns = {tokens}, the number of 16 x 16 pixel patches, got {tuple(token_targets.shape)}."
            )
        return flat


__all__ = [
    "DropKeyVoloBackbone",
    "DropKeyVoloForImageClassification",
    "DropKeyVoloModel",
    "DropKeyVoloPreTrainedModel",
]
