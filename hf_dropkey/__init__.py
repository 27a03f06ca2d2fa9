"""DropKey for Hugging Face Transformers.

Importing the package registers its models with the Auto classes, so `AutoModelForImageClassification.from_pretrained`
loads their checkpoints without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .export import export_plain
from .inference import monte_carlo_predict
from .models.attention import default_backend
from .models.configuration_dropkey_ceit import DropKeyCeitConfig
from .models.configuration_dropkey_hoi import HOI_TASK, DropKeyHoiConfig
from .models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from .models.configuration_dropkey_vit import DropKeyViTConfig
from .models.configuration_dropkey_volo import DropKeyVoloConfig
from .models.dropkey import layer_ratios
from .models.modeling_dropkey_ceit import DropKeyCeitForImageClassification, DropKeyCeitModel
from .models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection, DropKeyHoiModel
from .models.modeling_dropkey_t2t_vit import DropKeyT2TViTForImageClassification, DropKeyT2TViTModel
from .models.modeling_dropkey_vit import (
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
    DropKeyViTPreTrainedModel,
)
from .models.modeling_dropkey_volo import DropKeyVoloForImageClassification, DropKeyVoloModel
from .models.pipeline_dropkey_hoi import HoiPipeline
from .patching import apply_dropkey, dropkey_active, dropkey_disabled, remove_dropkey


__version__ = "0.1.0"

for _config, _model, _classifier in (
    (DropKeyViTConfig, DropKeyViTModel, DropKeyViTForImageClassification),
    (DropKeyT2TViTConfig, DropKeyT2TViTModel, DropKeyT2TViTForImageClassification),
    (DropKeyVoloConfig, DropKeyVoloModel, DropKeyVoloForImageClassification),
    (DropKeyCeitConfig, DropKeyCeitModel, DropKeyCeitForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
AutoConfig.register(DropKeyHoiConfig.model_type, DropKeyHoiConfig, exist_ok=True)
AutoModel.register(DropKeyHoiConfig, DropKeyHoiModel, exist_ok=True)
AutoModelForObjectDetection.register(DropKeyHoiConfig, DropKeyHoiForObjectDetection, exist_ok=True)
if HOI_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        HOI_TASK, pipeline_class=HoiPipeline, pt_model=AutoModelForObjectDetection, type="image"
    )
AutoModelForMaskedImageModeling.register(DropKeyViTConfig, DropKeyViTForMaskedImageModeling, exist_ok=True)

__all__ = [
    "DropKeyCeitConfig",
    "DropKeyCeitForImageClassification",
    "DropKeyCeitModel",
    "DropKeyHoiConfig",
    "DropKeyHoiForObjectDetection",
    "DropKeyHoiModel",
    "DropKeyT2TViTConfig",
    "DropKeyT2TViTForImageClassification",
    "DropKeyT2TViTModel",
    "DropKeyViTConfig",
    "DropKeyViTForImageClassification",
    "DropKeyViTForMaskedImageModeling",
    "DropKeyViTModel",
    "DropKeyViTPreTrainedModel",
    "DropKeyVoloConfig",
    "DropKeyVoloForImageClassification",
    "DropKeyVoloModel",
    "HoiPipeline",
    "apply_dropkey",
    "default_backend",
    "dropkey_active",
    "dropkey_disabled",
    "export_plain",
    "layer_ratios",
    "monte_carlo_predict",
    "remove_dropkey",
]
