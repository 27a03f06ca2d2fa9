"""DropKey for Hugging Face Transformers.

Importing the package registers its models with the Auto classes, so `AutoModelForImageClassification.from_pretrained`
loads their checkpoints without `trust_remote_code`. `__all__` is the public interface; everything else is internal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
)
from transformers.pipelines import PIPELINE_REGISTRY

from . import moved
from .evaluate_modules import metric_path
from .export import DropKeyONNX, export_graph, export_plain
from .inference import MonteCarloPrediction, dropkey_seed, monte_carlo_predict
from .models import (
    DropKeyCeitBackbone,
    DropKeyCeitConfig,
    DropKeyCeitForImageClassification,
    DropKeyCeitModel,
    DropKeyCeitPreTrainedModel,
    DropKeyFeaturesConfig,
    DropKeyFeaturesForImageClassification,
    DropKeyHoiConfig,
    DropKeyHoiForObjectDetection,
    DropKeyHoiModel,
    DropKeyHoiPreTrainedModel,
    DropKeyMeshConfig,
    DropKeyMeshForBodyMesh,
    DropKeyMeshModel,
    DropKeyMeshPreTrainedModel,
    DropKeyT2TViTBackbone,
    DropKeyT2TViTConfig,
    DropKeyT2TViTForImageClassification,
    DropKeyT2TViTModel,
    DropKeyT2TViTPreTrainedModel,
    DropKeyViTBackbone,
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
    DropKeyViTPreTrainedModel,
    DropKeyVoloBackbone,
    DropKeyVoloConfig,
    DropKeyVoloForImageClassification,
    DropKeyVoloModel,
    DropKeyVoloPreTrainedModel,
    HoiPipeline,
)
from .models.attention import default_backend, dropkey_attention
from .models.configuration_dropkey_hoi import HOI_TASK
from .models.configuration_dropkey_host import carry_backbone_code
from .models.dropkey import DropKey, drop_keys, layer_ratios
from .models.sample_masks import number_layers, sample_ids
from .patching import (
    DropKeyReport,
    DropPathReport,
    PatchDropoutReport,
    apply_drop_path,
    apply_dropkey,
    apply_patch_dropout,
    dropkey,
    dropkey_active,
    dropkey_disabled,
    remove_drop_path,
    remove_dropkey,
    remove_patch_dropout,
)
from .version import __version__


if TYPE_CHECKING:
    from .classification.adapters import load_classifier
    from .fast_masks import disable_fast_masks, enable_fast_masks, fast_masks_enabled
    from .hub.push import push_folder
    from .hub.trainer import HubTrainer
    from .patching.adapters import save_adapter_settings
    from .training.callbacks import (
        DropKeyGuardCallback,
        DropKeyLogCallback,
        DropKeyScheduleCallback,
        DropKeySeedCallback,
    )

for _config, _model, _backbone, _classifier in (
    (DropKeyViTConfig, DropKeyViTModel, DropKeyViTBackbone, DropKeyViTForImageClassification),
    (DropKeyT2TViTConfig, DropKeyT2TViTModel, DropKeyT2TViTBackbone, DropKeyT2TViTForImageClassification),
    (DropKeyVoloConfig, DropKeyVoloModel, DropKeyVoloBackbone, DropKeyVoloForImageClassification),
    (DropKeyCeitConfig, DropKeyCeitModel, DropKeyCeitBackbone, DropKeyCeitForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoBackbone.register(_config, _backbone, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
AutoConfig.register(DropKeyFeaturesConfig.model_type, DropKeyFeaturesConfig, exist_ok=True)
AutoModelForImageClassification.register(DropKeyFeaturesConfig, DropKeyFeaturesForImageClassification, exist_ok=True)
AutoConfig.register(DropKeyHoiConfig.model_type, DropKeyHoiConfig, exist_ok=True)
AutoModel.register(DropKeyHoiConfig, DropKeyHoiModel, exist_ok=True)
AutoModelForObjectDetection.register(DropKeyHoiConfig, DropKeyHoiForObjectDetection, exist_ok=True)
if HOI_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        HOI_TASK, pipeline_class=HoiPipeline, pt_model=AutoModelForObjectDetection, type="image"
    )
AutoModelForMaskedImageModeling.register(DropKeyViTConfig, DropKeyViTForMaskedImageModeling, exist_ok=True)

# one class: the mesh is what people load
AutoConfig.register(DropKeyMeshConfig.model_type, DropKeyMeshConfig, exist_ok=True)
AutoModel.register(DropKeyMeshConfig, DropKeyMeshForBodyMesh, exist_ok=True)

moved.install()

# public names whose modules need more than the core, or that only some programs need: loaded when requested
LAZY = {
    "DropKeyGuardCallback": "training.callbacks",
    "DropKeyLogCallback": "training.callbacks",
    "DropKeyScheduleCallback": "training.callbacks",
    "DropKeySeedCallback": "training.callbacks",
    "HubTrainer": "hub.trainer",
    "disable_fast_masks": "fast_masks",
    "enable_fast_masks": "fast_masks",
    "fast_masks_enabled": "fast_masks",
    "load_classifier": "classification.adapters",
    "push_folder": "hub.push",
    "save_adapter_settings": "patching.adapters",
}

__all__ = [
    "DropKey",
    "DropKeyCeitBackbone",
    "DropKeyCeitConfig",
    "DropKeyCeitForImageClassification",
    "DropKeyCeitModel",
    "DropKeyCeitPreTrainedModel",
    "DropKeyFeaturesConfig",
    "DropKeyFeaturesForImageClassification",
    "DropKeyGuardCallback",
    "DropKeyHoiConfig",
    "DropKeyHoiForObjectDetection",
    "DropKeyHoiModel",
    "DropKeyHoiPreTrainedModel",
    "DropKeyLogCallback",
    "DropKeyMeshConfig",
    "DropKeyMeshForBodyMesh",
    "DropKeyMeshModel",
    "DropKeyMeshPreTrainedModel",
    "DropKeyONNX",
    "DropKeyReport",
    "DropKeyScheduleCallback",
    "DropKeySeedCallback",
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
    "DropPathReport",
    "HoiPipeline",
    "HubTrainer",
    "MonteCarloPrediction",
    "PatchDropoutReport",
    "__version__",
    "apply_drop_path",
    "apply_dropkey",
    "apply_patch_dropout",
    "carry_backbone_code",
    "default_backend",
    "disable_fast_masks",
    "drop_keys",
    "dropkey",
    "dropkey_active",
    "dropkey_attention",
    "dropkey_disabled",
    "dropkey_seed",
    "enable_fast_masks",
    "export_graph",
    "export_plain",
    "fast_masks_enabled",
    "layer_ratios",
    "load_classifier",
    "metric_path",
    "monte_carlo_predict",
    "number_layers",
    "push_folder",
    "remove_drop_path",
    "remove_dropkey",
    "remove_patch_dropout",
    "sample_ids",
    "save_adapter_settings",
]


def __getattr__(name: str) -> Any:
    """The lazy public names, and the modules of version 0.1."""
    if name in LAZY:
        return getattr(import_module(f"hf_dropkey.{LAZY[name]}"), name)
    if name in moved.MOVED and name not in moved.IN_PLACE:
        return import_module(f"hf_dropkey.{name}")
    raise AttributeError(f"module 'hf_dropkey' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
