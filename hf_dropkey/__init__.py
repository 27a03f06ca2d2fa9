"""DropKey for Hugging Face Transformers.

Importing the package registers its models with the Auto classes, so `AutoModelForImageClassification.from_pretrained`
loads their checkpoints without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling

from .models.configuration_dropkey_vit import DropKeyViTConfig
from .models.dropkey import layer_ratios
from .models.modeling_dropkey_vit import (
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
    DropKeyViTPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("dropkey_vit", DropKeyViTConfig, exist_ok=True)
AutoModel.register(DropKeyViTConfig, DropKeyViTModel, exist_ok=True)
AutoModelForImageClassification.register(DropKeyViTConfig, DropKeyViTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(DropKeyViTConfig, DropKeyViTForMaskedImageModeling, exist_ok=True)

__all__ = [
    "DropKeyViTConfig",
    "DropKeyViTForImageClassification",
    "DropKeyViTForMaskedImageModeling",
    "DropKeyViTModel",
    "DropKeyViTPreTrainedModel",
    "layer_ratios",
]
