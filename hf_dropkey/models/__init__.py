"""The models, and what they share: all that travels with a checkpoint."""

from .configuration_dropkey_ceit import DropKeyCeitConfig
from .configuration_dropkey_features import DropKeyFeaturesConfig
from .configuration_dropkey_hoi import DropKeyHoiConfig
from .configuration_dropkey_mesh import DropKeyMeshConfig
from .configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from .configuration_dropkey_vit import DropKeyViTConfig
from .configuration_dropkey_volo import DropKeyVoloConfig
from .modeling_dropkey_ceit import (
    DropKeyCeitBackbone,
    DropKeyCeitForImageClassification,
    DropKeyCeitModel,
    DropKeyCeitPreTrainedModel,
)
from .modeling_dropkey_features import DropKeyFeaturesForImageClassification
from .modeling_dropkey_hoi import (
    DropKeyHoiForObjectDetection,
    DropKeyHoiModel,
    DropKeyHoiPreTrainedModel,
)
from .modeling_dropkey_mesh import (
    DropKeyMeshForBodyMesh,
    DropKeyMeshModel,
    DropKeyMeshPreTrainedModel,
)
from .modeling_dropkey_t2t_vit import (
    DropKeyT2TViTBackbone,
    DropKeyT2TViTForImageClassification,
    DropKeyT2TViTModel,
    DropKeyT2TViTPreTrainedModel,
)
from .modeling_dropkey_vit import (
    DropKeyViTBackbone,
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
    DropKeyViTPreTrainedModel,
)
from .modeling_dropkey_volo import (
    DropKeyVoloBackbone,
    DropKeyVoloForImageClassification,
    DropKeyVoloModel,
    DropKeyVoloPreTrainedModel,
)
from .pipeline_dropkey_hoi import HoiPipeline


__all__ = [
    "DropKeyCeitBackbone",
    "DropKeyCeitConfig",
    "DropKeyCeitForImageClassification",
    "DropKeyCeitModel",
    "DropKeyCeitPreTrainedModel",
    "DropKeyFeaturesConfig",
    "DropKeyFeaturesForImageClassification",
    "DropKeyHoiConfig",
    "DropKeyHoiForObjectDetection",
    "DropKeyHoiModel",
    "DropKeyHoiPreTrainedModel",
    "DropKeyMeshConfig",
    "DropKeyMeshForBodyMesh",
    "DropKeyMeshModel",
    "DropKeyMeshPreTrainedModel",
    "DropKeyT2TViTBackbone",
    "DropKeyT2TViTConfig",
    "DropKeyT2TViTForImageClassification",
    "DropKeyT2TViTModel",
    "DropKeyT2TViTPreTrainedModel",
    "DropKeyViTBackbone",
    "DropKeyViTConfig",
    "DropKeyViTForImageClassification",
    "DropKeyViTForMaskedImageModeling",
    "DropKeyViTModel",
    "DropKeyViTPreTrainedModel",
    "DropKeyVoloBackbone",
    "DropKeyVoloConfig",
    "DropKeyVoloForImageClassification",
    "DropKeyVoloModel",
    "DropKeyVoloPreTrainedModel",
    "HoiPipeline",
]
