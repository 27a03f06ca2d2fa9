"""A linear classifier on the features of any vision model of Transformers. This file travels with checkpoints."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_dropkey_features import DropKeyFeaturesConfig
from .modeling_dropkey import image_classification_loss


class DropKeyFeaturesForImageClassification(PreTrainedModel):
    """Logits from the pooled features of `features`, a vision model that `AutoModel` builds."""

    config: DropKeyFeaturesConfig
    config_class = DropKeyFeaturesConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DropKeyFeaturesConfig):
        config.validate_pooling()
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.features = AutoModel.from_config(config.features_config)
        self.classifier = nn.Linear(config.width, self.num_labels)
        self.loss_type = "ForImageClassification"
        self.loss_function = image_classification_loss
        self.post_init()

    def pooled(self, outputs: Any) -> torch.Tensor:
        """The features `[B, C]` of the vision model's outputs.

        Raises:
            ValueError: The vision model gives no pooled output.
        """
        tokens: torch.Tensor = outputs.last_hidden_state
        if self.config.pooling == "pooler":
            if getattr(outputs, "pooler_output", None) is None:
                raise ValueError(
                    f"{type(self.features).__name__} gives no pooled output; choose pooling='class' or 'mean'."
                )
            return outputs.pooler_output.flatten(1)
        if self.config.pooling == "class":
            return tokens[:, 0]
        # tokens [B, N, C], or a map [B, C, rows, columns]
        return tokens.mean(dim=1) if tokens.ndim == 3 else tokens.flatten(2).mean(dim=2)

    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: `[B, channels, height, width]`.
            labels: Class indices `[B]`; or targets `[B, num_labels]` for regression and several labels per image.
            kwargs: `num_items_in_batch` for the loss; what else the vision model takes.

        Returns:
            The loss, if there are labels, the logits `[B, num_labels]`, and what was requested.
        """
        items = kwargs.pop("num_items_in_batch", None)
        kwargs["return_dict"] = True
        outputs = self.features(pixel_values=pixel_values, **kwargs)
        logits = self.classifier(self.pooled(outputs))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=items)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )


# saved with their code, as Transformers does it for classes of users
DropKeyFeaturesConfig.register_for_auto_class()
DropKeyFeaturesForImageClassification.register_for_auto_class("AutoModelForImageClassification")


__all__ = ["DropKeyFeaturesForImageClassification"]
