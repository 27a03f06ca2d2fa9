"""A checkpoint that any Transformers opens, from a model of this package or a patched one: `export_plain`.

DropKey has no parameters and acts in training only, so the plain model computes the same.
"""

import copy
import inspect
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection
from .patching.apply import UNDO, remove_dropkey
from .patching.sites import transformers_model
from .saved import PROCESSOR_FILES, saved_class


def export_plain(model_or_folder: nn.Module | str | os.PathLike, out: str | os.PathLike) -> PreTrainedModel:
    """Saves a plain Transformers checkpoint: same weights, same outputs in eval mode, no DropKey, no code.

    Args:
        model_or_folder: A model of this package, a patched model of Transformers, or a folder that holds either. From a
            folder, image processor and tokenizer come along.
        out: Folder to write.

    Returns:
        The plain model in eval mode, with its own copy of the weights if it came from a model.

    Raises:
        ValueError: The architecture is not one of Transformers, or `out` is the folder to export.
    """
    if isinstance(model_or_folder, nn.Module):
        plain = plain_model(model_or_folder)
        plain.save_pretrained(out)
        return plain.eval()
    source, target = Path(model_or_folder), Path(out)
    if target.exists() and source.resolve() == target.resolve():
        raise ValueError(f"{out} would be overwritten by its own export. Give another folder.")
    plain = plain_model(_load(source))
    plain.save_pretrained(target)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return plain.eval()


def plain_model(model: nn.Module) -> PreTrainedModel:
    """A model of Transformers' own class with a copy of the weights, and a configuration without DropKey.

    Raises:
        ValueError: There is no such class, or the model carries an adapter.
    """
    root = transformers_model(model)
    if any(".base_layer." in name for name in root.state_dict()):
        raise ValueError(f"{type(root).__name__} carries an adapter. Merge it first: model.merge_and_unload().")
    cls: Any = plain_class(type(root))
    if cls is type(root):
        plain = copy.deepcopy(root)
        if UNDO in vars(plain):
            remove_dropkey(plain)
        for name in [name for name in vars(plain.config) if name.startswith("dropkey_")]:
            delattr(plain.config, name)
        return plain
    plain = cls(plain_config(root.config, cls.config_class), **_same_parts(cls, root))
    plain.load_state_dict(root.state_dict())
    return plain.to(dtype=root.dtype, device=root.device)


def plain_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The nearest class of Transformers' own that `cls` is or extends, with the same parameters.

    Raises:
        ValueError: There is none.
    """
    for base in cls.__mro__:
        # bases without a forward are families, not models
        if base.__module__.startswith("transformers.models.") and "forward" in vars(base):
            return base
    inside = ""
    if issubclass(cls, DropKeyHoiForObjectDetection):
        inside = (
            " Its heads for verbs and pairs are of no model of Transformers, but the DETR inside is: "
            "export_plain(model.model, out) writes that, without the heads."
        )
    raise ValueError(
        f"{cls.__name__} extends no model of Transformers, so there is no plain architecture to export it to. Its own "
        f"checkpoint opens anywhere with trust_remote_code=True.{inside}"
    )


def plain_config(config: PreTrainedConfig, cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration without DropKey's fields and without the code of a checkpoint, as an instance of `cls`."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("dropkey_")}
    # what this package's own class declares, also where it has another default or type than the plain one
    own = {
        name
        for base in type(config).__mro__
        if not issubclass(cls, base)
        for name in vars(base).get("__annotations__", ())
    }
    for name in ("auto_map", "custom_pipelines", "model_type", "architectures", *own):
        fields.pop(name, None)
    return cls.from_dict(fields)


def _same_parts(cls: type[PreTrainedModel], root: PreTrainedModel) -> dict[str, Any]:
    """Constructor arguments that give the plain model the optional parts of the other."""
    parts = {"add_pooling_layer": "pooler", "use_mask_token": "embeddings.mask_token"}
    accepted = inspect.signature(cls.__init__).parameters
    return {argument: _has(root, path) for argument, path in parts.items() if argument in accepted}


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _load(folder: Path) -> PreTrainedModel:
    """The model in a folder, by the class it was saved as."""
    cls: Any = saved_class(AutoConfig.from_pretrained(folder), folder)
    model: PreTrainedModel = cls.from_pretrained(folder)
    return model
