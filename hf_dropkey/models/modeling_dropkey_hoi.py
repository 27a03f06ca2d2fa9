"""DropKeyHoi: QPIC (Tamura et al., CVPR 2021) on Transformers' DETR, with DropKey. This file travels with checkpoints.

A pair of a person and an object is a query of DETR with four heads: object class, verbs, and two boxes. The classes below
are Transformers' own with another attention, and a decoder that returns the normalised output of every layer: that of
Transformers feeds it back into the next layer, which is another model. Weights have the names of `DetrModel`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import DetrModel, DetrPreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.detr.modeling_detr import (
    DetrConvEncoder,
    DetrCrossAttention,
    DetrDecoder,
    DetrDecoderLayer,
    DetrDecoderOutput,
    DetrEncoder,
    DetrEncoderLayer,
    DetrLearnedPositionEmbedding,
    DetrMLP,
    DetrMLPPredictionHead,
    DetrModelOutput,
    DetrSelfAttention,
    DetrSinePositionEmbedding,
)
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import dropkey_attention_forward
from .configuration_dropkey_hoi import DropKeyHoiConfig
from .dropkey import DropKeyRatioMixin, dropkey_is_active, layer_ratios
from .loss_dropkey_hoi import HoiPredictions, hoi_loss
from .modeling_dropkey import DropKeyModelMixin
from .pairs_dropkey_hoi import Pair, find_pairs


# a verb's score before training, as of RetinaNet: nearly all verbs of nearly all queries are absent
PRIOR_SCORE = 0.01
# Transformers' ResNet has a stem and stages 0 to 3, timm's calls the latter layer1 to layer4
RESNET_TYPES = ("resnet", "timm_backbone")
LEARNING_STAGES = (".stages.1.", ".stages.2.", ".stages.3.", "layer2.", "layer3.", "layer4.")


@dataclass
class DropKeyHoiOutput(ModelOutput):
    """What `DropKeyHoiForObjectDetection` returns.

    Attributes:
        loss: The weighted sum of all losses, if there are labels.
        loss_dict: The unweighted losses by name.
        logits: Object classes `[B, Q, O + 1]`; the last one is "no pair".
        verb_logits: `[B, Q, V]`; a sigmoid makes each a probability.
        person_boxes: (centre x, centre y, width, height) `[B, Q, 4]`, fractions of the image without its padding.
        object_boxes: The same of the objects.
        auxiliary_outputs: The same four of the earlier decoder layers, if there are labels.
        last_hidden_state: Normalised output of the last decoder layer `[B, Q, D]`.
        intermediate_hidden_states: Normalised outputs of all decoder layers `[L, B, Q, D]`.
        decoder_hidden_states, decoder_attentions, cross_attentions: As of `DetrModel`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: As of `DetrModel`.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    verb_logits: torch.Tensor | None = None
    person_boxes: torch.Tensor | None = None
    object_boxes: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


# --- attention ---------------------------------------------------------------------------------------------------------


class DropKeyDetrAttentionMixin(DropKeyRatioMixin):
    """DropKey for an attention of DETR; goes before the attention's class in the bases.

    Attributes:
        dropkey_ratio: Drop ratio of this attention, a plain float that may be changed at any time.
        dropkey_pattern: What is dropped together.
        dropkey_window: As other attentions have it; no pattern of this model needs one.
    """

    def __init__(self, config: DropKeyHoiConfig, num_attention_heads: int, dropkey_ratio: float):
        # the classes behind this one are Transformers', and take these names
        super().__init__(
            config=config,  # type: ignore[call-arg]  # the attention this is mixed into has these
            hidden_size=config.d_model,
            num_attention_heads=num_attention_heads,
            dropout=config.attention_dropout,
        )
        self.dropkey_ratio = dropkey_ratio
        self.dropkey_pattern = config.dropkey_pattern
        self.dropkey_window = config.dropkey_window
        self.dropkey_configured = config.dropkey_ratio

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention with DropKey between tokens `[B, N, C]` and `[B, M, C]`, from before the projections."""
        module: Any = self
        projected = [
            project(tokens).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for project, tokens in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, value))
        ]
        output, weights = dropkey_attention_forward(
            module,
            projected[0],
            projected[1],
            projected[2],
            attention_mask,
            implementation=module.config._attn_implementation,
            scaling=module.scaling,
            dropout=module.attention_dropout if module.training else 0.0,
        )
        return module.o_proj(output.flatten(-2)), weights


class DropKeyHoiSelfAttention(DropKeyDetrAttentionMixin, DetrSelfAttention):
    """DETR's self-attention, with DropKey in training."""

    def forward(  # type: ignore[override]  # Transformers lists its keyword arguments, which pass through here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DetrSelfAttention.forward`."""
        if not dropkey_is_active(self):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        placed = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        return self.attend(placed, placed, hidden_states, attention_mask)


class DropKeyHoiCrossAttention(DropKeyDetrAttentionMixin, DetrCrossAttention):
    """DETR's cross-attention, with DropKey in training."""

    def forward(  # type: ignore[override]  # as above
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        encoder_position_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DetrCrossAttention.forward`."""
        if not dropkey_is_active(self):
            return super().forward(
                hidden_states,
                key_value_states,
                attention_mask,
                position_embeddings,
                encoder_position_embeddings,
                **kwargs,
            )
        query = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        key = key_value_states
        if encoder_position_embeddings is not None:
            key = key + encoder_position_embeddings
        return self.attend(query, key, key_value_states, attention_mask)


# --- encoder and decoder -----------------------------------------------------------------------------------------------


class DropKeyHoiEncoderLayer(DetrEncoderLayer):
    """DETR's encoder layer with DropKey in its attention at the ratio `dropkey_ratio`."""

    def __init__(self, config: DropKeyHoiConfig, dropkey_ratio: float):
        # the parts of DetrEncoderLayer, in its order
        super(DetrEncoderLayer, self).__init__()
        self.hidden_size = config.d_model
        self.self_attn = DropKeyHoiSelfAttention(config, config.encoder_attention_heads, dropkey_ratio)
        self.self_attn_layer_norm = nn.LayerNorm(self.hidden_size)
        self.dropout = config.dropout
        self.mlp = DetrMLP(config, self.hidden_size, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(self.hidden_size)


class DropKeyHoiDecoderLayer(DetrDecoderLayer):
    """DETR's decoder layer with DropKey in its attentions, at a ratio each."""

    def __init__(self, config: DropKeyHoiConfig, self_ratio: float, cross_ratio: float):
        # the parts of DetrDecoderLayer, in its order
        super(DetrDecoderLayer, self).__init__()
        self.hidden_size = config.d_model
        self.self_attn = DropKeyHoiSelfAttention(config, config.decoder_attention_heads, self_ratio)
        self.dropout = config.dropout
        self.self_attn_layer_norm = nn.LayerNorm(self.hidden_size)
        self.encoder_attn = DropKeyHoiCrossAttention(config, config.decoder_attention_heads, cross_ratio)
        self.encoder_attn_layer_norm = nn.LayerNorm(self.hidden_size)
        self.mlp = DetrMLP(config, self.hidden_size, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(self.hidden_size)


def scheduled(config: DropKeyHoiConfig, enabled: Sequence[bool]) -> list[float]:
    """The drop ratios of one stack's attentions in order of execution: the schedule over the enabled ones, 0 elsewhere."""
    settings = config.dropkey_ratio, config.dropkey_final_ratio, config.dropkey_schedule
    ratios = iter(layer_ratios(sum(enabled), *settings) if any(enabled) else [])
    return [next(ratios) if chosen else 0.0 for chosen in enabled]


class DropKeyHoiPreTrainedModel(DropKeyModelMixin, DetrPreTrainedModel):
    """What the models share: configuration class, flags, initial weights."""

    config: DropKeyHoiConfig
    config_class = DropKeyHoiConfig
    _no_split_modules = ["DetrConvEncoder", "DropKeyHoiEncoderLayer", "DropKeyHoiDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # as in the official code: torch's own start but in the transformer (`xavier_weights`). With Transformers' standard
        # deviation of 0.02 the box heads pass on so little that they take twice as long to learn
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
        if isinstance(module, DropKeyHoiQueries):
            init.normal_(module.weight)
        elif isinstance(module, DropKeyHoiVerbClassifier):
            init.constant_(module.bias, math.log(PRIOR_SCORE / (1 - PRIOR_SCORE)))

    @torch.no_grad()
    def xavier_weights(self, module: nn.Module) -> None:
        """First weights of the modules of encoder and decoder, as in the official code."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std)
            init.zeros_(module.bias)
        else:
            DropKeyHoiPreTrainedModel._init_weights(self, module)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in Transformers; a name alone leaves the convolutional backbone as it is, which knows no attention."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation, "backbone_config": "eager"}
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @staticmethod
    def source_file() -> Path:
        """This file."""
        return Path(__file__)


class DropKeyHoiEncoder(DropKeyHoiPreTrainedModel, DetrEncoder):
    """DETR's encoder, whose layers drop keys if `dropkey_encoder`."""

    _can_record_outputs = {"hidden_states": DropKeyHoiEncoderLayer, "attentions": DropKeyHoiSelfAttention}

    def __init__(self, config: DropKeyHoiConfig):
        DetrPreTrainedModel.__init__(self, config)
        self.dropout = config.dropout
        ratios = scheduled(config, [config.dropkey_encoder] * config.encoder_layers)
        self.layers = nn.ModuleList([DropKeyHoiEncoderLayer(config, ratio) for ratio in ratios])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.xavier_weights(module)


class DropKeyHoiDecoder(DropKeyHoiPreTrainedModel, DetrDecoder):
    """DETR's decoder, whose layers drop keys if `dropkey_decoder` and `dropkey_cross_attention`.

    Returns the normalised output of every layer; the next layer gets it before the norm, as in the official code.
    """

    _can_record_outputs = {
        "hidden_states": DropKeyHoiDecoderLayer,
        "attentions": DropKeyHoiSelfAttention,
        "cross_attentions": DropKeyHoiCrossAttention,
    }

    def __init__(self, config: DropKeyHoiConfig):
        DetrPreTrainedModel.__init__(self, config)
        self.dropout = config.dropout
        enabled = []
        for index in range(config.decoder_layers):
            # the first layer's queries start at zero, so all its values are equal; and a lone query has a single key
            enabled += [
                config.dropkey_decoder and index > 0 and config.num_queries > 1,
                config.dropkey_cross_attention,
            ]
        ratios = scheduled(config, enabled)
        self.layers = nn.ModuleList(
            [DropKeyHoiDecoderLayer(config, *pair) for pair in zip(ratios[::2], ratios[1::2], strict=True)]
        )
        self.layernorm = nn.LayerNorm(config.d_model)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.xavier_weights(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        spatial_position_embeddings: torch.Tensor | None = None,
        object_queries_position_embeddings: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DetrDecoderOutput:
        """As `DetrDecoder.forward`, with the normalised outputs of all layers as `intermediate_hidden_states`.

        Returns:
            `intermediate_hidden_states` `[L, B, Q, D]`, of which `last_hidden_state` is the last.
        """
        hidden_states = inputs_embeds
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        normalised = []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask,
                spatial_position_embeddings,
                object_queries_position_embeddings,
                # a positional argument, for activation checkpointing
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
            normalised.append(self.layernorm(hidden_states))
        return DetrDecoderOutput(last_hidden_state=normalised[-1], intermediate_hidden_states=torch.stack(normalised))


class DropKeyHoiSinePositionEmbedding(DetrSinePositionEmbedding):
    """DETR's sine position embedding, computed in float32 whatever the dtype, as the official code does."""

    def forward(self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Any = None) -> torch.Tensor:
        """As `DetrSinePositionEmbedding.forward`."""
        return super().forward(shape, device, torch.float32, mask).to(dtype)


# --- models ------------------------------------------------------------------------------------------------------------


class DropKeyHoiQueries(nn.Embedding):
    """Learned queries, which start with a standard deviation of 1 as in the official DETR.

    With Transformers' 0.02 they start so close together that all of them find one pair.
    """


class DropKeyHoiVerbClassifier(nn.Linear):
    """The verb logits, which start at `PRIOR_SCORE`."""


def freeze_first_stage(backbone: nn.Module) -> None:
    """Keeps the stem and first stage of a ResNet as they are, and lets the rest learn, as the original DETR does.

    Transformers 5.23 means to, but looks for names that its own ResNet does not have, which freezes all of it.
    """
    learning = [any(stage in name for stage in LEARNING_STAGES) for name, _ in backbone.named_parameters()]
    # timm has backbones of other kinds too
    if any(learning):
        for parameter, learns in zip(backbone.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)


class DropKeyHoiModel(DropKeyHoiPreTrainedModel, DetrModel):
    """Backbone, encoder and decoder of DETR with DropKey; arguments and outputs as `transformers.DetrModel`.

    `intermediate_hidden_states` are always returned.
    """

    def __init__(self, config: DropKeyHoiConfig):
        config.validate_dropkey()
        # the parts of DetrModel, in its order, without building its encoder and decoder first
        DetrPreTrainedModel.__init__(self, config)
        self.backbone = DetrConvEncoder(config)
        backbone: Any = config.backbone_config
        if backbone.model_type in RESNET_TYPES:
            freeze_first_stage(self.backbone)
        if config.position_embedding_type == "sine":
            self.position_embedding: Any = DropKeyHoiSinePositionEmbedding(config.d_model // 2, normalize=True)
        elif config.position_embedding_type == "learned":
            self.position_embedding = DetrLearnedPositionEmbedding(config.d_model // 2)
        else:
            raise ValueError(
                f"`position_embedding_type` must be 'sine' or 'learned', got {config.position_embedding_type!r}."
            )
        self.query_position_embeddings = DropKeyHoiQueries(config.num_queries, config.d_model)
        self.input_projection = nn.Conv2d(self.backbone.intermediate_channel_sizes[-1], config.d_model, kernel_size=1)
        self.encoder = DropKeyHoiEncoder(config)
        self.decoder = DropKeyHoiDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DetrModelOutput:
        """As `DetrModel.forward`.

        Raises:
            ValueError: `pixel_values` is not `[B, C, height, width]`, or `pixel_mask` not `[B, height, width]`.
        """
        if pixel_values is not None:
            shape, channels = tuple(pixel_values.shape), self.config.num_channels
            if len(shape) != 4 or shape[1] != channels:
                raise ValueError(
                    f"`pixel_values` must have the shape [batch, {channels}, height, width], got {shape}. Make it with "
                    "the checkpoint's image processor."
                )
            if pixel_mask is not None and tuple(pixel_mask.shape) != (shape[0], *shape[2:]):
                raise ValueError(
                    f"`pixel_mask` must have the shape {(shape[0], *shape[2:])} of the images, got "
                    f"{tuple(pixel_mask.shape)}."
                )
            pixel_values = pixel_values.to(self.dtype)
        return super().forward(pixel_values, pixel_mask, **kwargs)


class DropKeyHoiForObjectDetection(DropKeyHoiPreTrainedModel):
    """Finds pairs of a person and an object with the verbs between them: QPIC's heads on `DropKeyHoiModel`.

    Training needs SciPy, for the matching.
    """

    def __init__(self, config: DropKeyHoiConfig):
        super().__init__(config)
        self.model = DropKeyHoiModel(config)
        width = config.d_model
        self.class_labels_classifier = nn.Linear(width, len(config.object_names()) + 1)
        self.verb_classifier = DropKeyHoiVerbClassifier(width, config.num_verbs)
        self.person_bbox_predictor = DetrMLPPredictionHead(width, width, 4, num_layers=3)
        self.object_bbox_predictor = DetrMLPPredictionHead(width, width, 4, num_layers=3)
        self.post_init()

    def predict(self, hidden_states: torch.Tensor) -> HoiPredictions:
        """The four heads on normalised decoder states `[..., D]`; boxes in float32 at least."""
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        return HoiPredictions(
            self.class_labels_classifier(hidden_states),
            self.verb_classifier(hidden_states),
            self.person_bbox_predictor(hidden_states).to(precise).sigmoid(),
            self.object_bbox_predictor(hidden_states).to(precise).sigmoid(),
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Any,
    ) -> DropKeyHoiOutput:
        """Finds pairs.

        Args:
            pixel_values: `[B, C, height, width]`.
            pixel_mask: 1 for pixels, 0 for padding `[B, height, width]`.
            labels: For each image a dictionary: `class_labels` object classes `[n]`, `verb_labels` 0 or 1 `[n, V]`,
                `person_boxes` and `object_boxes` (centre x, centre y, width, height) as fractions of the image `[n, 4]`.
                A missing object has a box of zeros. Images without pairs have n = 0.
            kwargs: As of `DetrModel.forward`.

        Returns:
            Predictions of the last decoder layer; with labels also the losses and the other layers' predictions.

        Raises:
            ImportError: There are labels, but no SciPy.
            ValueError: Inputs do not fit the model.
        """
        # what Trainer counts for losses that are sums; this one counts by itself
        kwargs.pop("num_items_in_batch", None)
        outputs = self.model(pixel_values, pixel_mask=pixel_mask, **kwargs)
        predictions = self.predict(outputs.last_hidden_state)
        loss, losses, earlier = None, None, None
        if labels is not None:
            states = outputs.intermediate_hidden_states[:-1] if self.config.auxiliary_loss else ()
            layers = [self.predict(state) for state in states]
            loss, losses = hoi_loss([*layers, predictions], labels, self.config)
            earlier = [layer._asdict() for layer in layers]
        return DropKeyHoiOutput(
            loss=loss,
            loss_dict=losses,
            **predictions._asdict(),
            auxiliary_outputs=earlier,
            last_hidden_state=outputs.last_hidden_state,
            intermediate_hidden_states=outputs.intermediate_hidden_states,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def post_process(
        self,
        outputs: DropKeyHoiOutput,
        target_sizes: Any,
        threshold: float = 0.1,
        top_k: int | None = 100,
        nms: float | None = None,
    ) -> list[list[Pair]]:
        """Readable pairs of each image, the best first.

        Args:
            outputs: What the model returned.
            target_sizes: Height and width in pixels of each image `[B, 2]`, before any resizing.
            threshold: Verbs with a lower score are left out, and pairs without a verb; in [0, 1].
            top_k: At most so many pairs an image; None: all.
            nms: Leaves out a pair where a better one with the same object class overlaps it by more than this IoU in
                both boxes; in [0, 1]. Default: none is left out.

        Returns:
            For each image a list of dictionaries: `person_box` and `object_box` (left, top, right, bottom) in pixels,
            `object` the class name, `object_score`, and `verbs`, the score of each verb, the best first. Scores of
            verbs include the object's. A missing object is None, as its box.

        Raises:
            ValueError: An argument is out of range.
        """
        return find_pairs(
            outputs,
            target_sizes,
            objects=self.config.object_names(),
            verbs=list(self.config.verbs or ()),
            missing_label=self.config.missing_label,
            threshold=threshold,
            top_k=top_k,
            nms=nms,
        )


__all__ = ["DropKeyHoiForObjectDetection", "DropKeyHoiModel", "DropKeyHoiOutput", "DropKeyHoiPreTrainedModel"]
