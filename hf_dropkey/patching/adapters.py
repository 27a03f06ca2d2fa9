"""What an adapter of PEFT remembers of DropKey: read from a loaded adapter, written to a saved one.

An adapter is saved without the configuration of its base model, where a patched model keeps its settings. PEFT drops
unknown fields of `adapter_config.json` when it reads the file, but takes `auto_mapping` as it is, so the settings stand
there, under `dropkey`. Nothing here imports PEFT.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# the configuration of the model that an adapter of this package was trained on, with its classes
BASE_CONFIG = "base_config.json"
FIELD = "dropkey"
PREFIX = "dropkey_"


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is one of PEFT, `PeftModel`, which saves adapters only."""
    return isinstance(getattr(model, "peft_config", None), Mapping) and hasattr(model, "get_base_model")


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """The DropKey settings that a model's adapters remember, by field (`dropkey_ratio`); empty for other models.

    The model is a `PeftModel`, one that wraps it, or a model of Transformers that loaded an adapter itself.

    Raises:
        ValueError: Two adapters remember different settings, of which the model can follow one.
    """
    adapted: Any = (getattr(module, "peft_config", None) for module in model.modules())
    configs: Any = next((found for found in adapted if isinstance(found, Mapping)), {})
    found = {name: _remembered(getattr(config, "auto_mapping", None)) for name, config in configs.items()}
    found = {name: settings for name, settings in found.items() if settings}
    if len({json.dumps(settings, sort_keys=True) for settings in found.values()}) > 1:
        raise ValueError(
            f"the adapters {sorted(found)} remember different DropKey settings; pass those to train with, for example "
            "apply_dropkey(model, ratio=0.1)"
        )
    return next(iter(found.values()), {})


def _remembered(mapping: Any) -> dict[str, Any]:
    settings = mapping.get(FIELD) if isinstance(mapping, Mapping) else None
    if not isinstance(settings, Mapping):
        return {}
    return {str(name): value for name, value in settings.items() if str(name).startswith(PREFIX)}


def save_adapter_settings(model: nn.Module, folder: str | Path) -> None:
    """Completes an adapter that `PeftModel.save_pretrained` wrote: DropKey settings, and the base model's configuration.

    The settings go into `adapter_config.json`. `base_config.json` holds the configuration with the classes, from which
    `load_classifier` builds the model that the adapter fits.

    Args:
        model: The `PeftModel` whose adapter the folder holds.
        folder: Where it was saved.

    Raises:
        TypeError: The model is not one of PEFT.
        FileNotFoundError: The folder holds no adapter.
    """
    if not is_adapted(model):
        raise TypeError(f"expected a model of PEFT, got {type(model).__name__}, which remembers its settings itself")
    folder = Path(folder)
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}; save the adapter there first")
    base: Any = model.get_base_model()  # type: ignore[operator]  # of PEFT
    settings = {name: value for name, value in vars(base.config).items() if name.startswith(PREFIX)}
    saved = json.loads(file.read_text(encoding="utf-8"))
    if settings:
        saved["auto_mapping"] = {**(saved.get("auto_mapping") or {}), FIELD: settings}
        file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = base.config.to_dict()
    config["architectures"] = [type(base).__name__]
    (folder / BASE_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
