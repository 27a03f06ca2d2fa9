"""Loads any saved image classifier, and adapters together with the model that they are for."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from ..extras import needed
from ..images.classes import check_id2label
from ..models.configuration_dropkey_features import DropKeyFeaturesConfig
from ..patching.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG
from ..saved import base_of, check_model_source, is_adapter, quiet_loading
from .arguments import ModelArguments
from .model import is_native, make_model
from .prediction import whole_classifier
from .pretrained import load_weights


def load_classifier(
    source: str | Path,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    base: str | Path | None = None,
) -> Any:
    """An image classifier in eval mode: a whole model, or an adapter on its base model, a `PeftModel`.

    Args:
        source: Folder, or id on the Hub.
        revision: Branch, tag or commit of `source`.
        trust_remote_code: Run the code that comes with the model.
        attn_implementation: Attention backend.
        base: The adapter's base model, where it is not at the place that the adapter names.

    Raises:
        FileNotFoundError: The folder lacks files.
        ImportError: It is an adapter, and PEFT is not installed.
        ValueError: It is an adapter that does not fit its base model, or one without the configuration of its classes; or no
            image classifier with all its weights.
    """
    check_model_source(str(source), adapters=True)
    folder = adapter_folder(str(source), revision)
    if folder is None:
        found, _ = PreTrainedConfig.get_config_dict(str(source), revision=revision)
        check_id2label(found, str(source))
        options = {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
        }
        whole: PreTrainedModel = whole_classifier(str(source), found, options)
        return whole
    with needed("peft"):
        from peft import PeftModel, get_peft_model_state_dict
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    arguments = ModelArguments(
        model_name_or_path=str(base or base_of(folder)),
        revision=settings.get("revision") or "main",
        trust_remote_code=trust_remote_code,
        # the classifier is the adapter's
        ignore_mismatched_sizes=True,
        attn_implementation=attn_implementation,
    )
    check_base(arguments, folder)
    config = base_config(folder, arguments)
    # what is missing or of another size there is in the adapter, or checked below
    with quiet_loading():
        whole = make_model(config, arguments) if is_native(config) else load_weights(config, arguments)[0]
    adapted = PeftModel.from_pretrained(whole, str(folder))
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        saved = set(weights.keys())
    strange = sorted(saved ^ set(get_peft_model_state_dict(adapted)))
    if strange:
        raise ValueError(
            f"the adapter {source} does not fit {arguments.model_name_or_path}: {len(strange)} of their weights differ, such "
            f"as {strange[0]}; name the model that it was trained on with base="
        )
    return adapted.eval()


def adapter_folder(source: str, revision: str) -> Path | None:
    """The folder of an adapter, downloaded if it is on the Hub; None for a whole model.

    Raises:
        FileNotFoundError: An adapter on the Hub lacks a file.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder if is_adapter(folder) else None
    # in a repository with both, the whole model counts
    missing: dict[str, Any] = {
        "revision": revision,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    if cached_file(source, "config.json", **missing) or not cached_file(source, ADAPTER_CONFIG, **missing):
        return None
    found = {name: cached_file(source, name, **missing) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG)}
    lost = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if found[name] is None]
    if lost:
        raise FileNotFoundError(f"the adapter {source} lacks {', '.join(lost)}; complete it, or use another one")
    return Path(str(found[ADAPTER_CONFIG])).parent


def check_base(arguments: ModelArguments, folder: Path) -> None:
    """Raises FileNotFoundError if an adapter's base model is a path where nothing is, ValueError if it is not a whole model."""
    source = str(arguments.model_name_or_path)
    try:
        check_model_source(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the adapter {folder} is for the model {source}, which is not there or not whole ({error}); put it there, or "
            "write its place into base_model_name_or_path of adapter_config.json"
        ) from error


def base_config(folder: Path, arguments: ModelArguments) -> PreTrainedConfig:
    """The configuration of an adapter's base model, with the classes and settings that the adapter was trained with.

    Raises:
        ValueError: The adapter has no such file.
    """
    file = folder / BASE_CONFIG
    if not file.is_file():
        raise ValueError(
            f"the adapter {folder} has no {BASE_CONFIG} with its classes, so it is not of hf_dropkey; load its base model "
            "with its classes yourself, and then the adapter with peft.PeftModel.from_pretrained"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("model_type") in CONFIG_MAPPING:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file)
        base, _ = PreTrainedConfig.get_config_dict(str(arguments.model_name_or_path), revision=arguments.revision)
        if base.get("model_type") != config.model_type and isinstance(config, DropKeyFeaturesConfig):
            # the classifier was new, on the features of the base model
            config.architectures = None
        return config
    # of a model with code of its own, which is where the base model is
    config = AutoConfig.from_pretrained(
        str(arguments.model_name_or_path),
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code or None,
    )
    for name, value in found.items():
        if name not in ("auto_map", "architectures", "model_type", "transformers_version"):
            setattr(config, name, value)
    config.id2label = {int(number): str(name) for number, name in found["id2label"].items()}
    return config
