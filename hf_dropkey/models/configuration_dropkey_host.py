"""A model of Transformers around a DropKey backbone, in a folder that carries the backbone's code.

Transformers looks up the class of a nested configuration among the classes that it knows, and reads an `auto_map` of the
outermost configuration only. So the saved configuration of such a model names `DropKeyHostConfig`, which makes the
backbone of the folder known and then reads the model's own configuration. This file travels with checkpoints.
"""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

import operator
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoBackbone, AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_dropkey import REMOTE_PACKAGE, _Call, _RemoteClass


Host = TypeVar("Host")
OWN_FILE = Path(__file__)
OWN_AUTO_MAP = {"AutoConfig": f"{OWN_FILE.stem}.DropKeyHostConfig"}


class HostConfigMixin:
    """Saves the code of the DropKey backbones inside; goes before the class of the model's configuration.

    `HostConfigMixin[DetrConfig]` is that class for a `DetrConfig`, and one class however often it is requested.
    """

    auto_map: Any

    @classmethod
    def __class_getitem__(cls, base: type) -> type:
        return _host_class(base)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds a class by its name, which is that of the class below
        mixin: Any = HostConfigMixin
        if HostConfigMixin.__module__.split(".")[0] == REMOTE_PACKAGE:
            mixin = _RemoteClass(HostConfigMixin)
        own = _Call(operator.getitem, mixin, type(self).__mro__[2])
        return object.__new__, (own,), vars(self).copy()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in Transformers, with the code of every DropKey backbone inside and an `auto_map` that leads to it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        sources = [OWN_FILE, *(type(found).modeling_file(found) for found in dropkey_backbones(self))]
        for file in {str(path) for source in sources for path in (source, *get_relative_import_files(source))}:
            if not (folder / Path(file).name).exists() or not os.path.samefile(file, folder / Path(file).name):
                shutil.copyfile(file, folder / Path(file).name)
        before = vars(self).get("auto_map")
        self.auto_map = dict(OWN_AUTO_MAP)
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]  # as said
        finally:
            if before is None:
                del self.auto_map
            else:
                self.auto_map = before


@cache
def _host_class(base: Any) -> type:
    return type(base.__name__, (HostConfigMixin, base), {"__module__": base.__module__})


def nested_configs(config: Any) -> list[Any]:
    """The configurations inside a configuration, at any depth."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return inside + [deeper for value in inside for deeper in nested_configs(value)]


def dropkey_backbones(config: Any) -> list[Any]:
    """The configurations of DropKey backbones inside a configuration."""
    # found by attribute: a loaded checkpoint's class is another one than the installed class
    return [found for found in nested_configs(config) if hasattr(found, "modeling_file")]


def carry_backbone_code(model: Host) -> Host:
    """Makes a model of Transformers around a DropKey backbone save the backbone's code, from now on.

    What it saves then loads with `trust_remote_code=True` through the Auto classes, such as
    `AutoModelForObjectDetection`, where this package is not installed, and saves with its code there too. With the
    package nothing changes: the model's own class loads it.

    Args:
        model: For example a `DetrForObjectDetection`, or its configuration.

    Returns:
        The same object.

    Raises:
        ValueError: There is no DropKey backbone inside.
    """
    config: Any = getattr(model, "config", model)
    if isinstance(config, HostConfigMixin):
        return model
    if not isinstance(config, PreTrainedConfig) or not dropkey_backbones(config):
        raise ValueError(
            f"{type(model).__name__} has no DropKey backbone whose code could be saved with it. Make it with a "
            "configuration of this package as backbone_config, such as DropKeyViTConfig."
        )
    kind: Any = type(config)
    config.__class__ = _host_class(kind)
    return model


def _unknown_backbones(fields: Any) -> list[dict[str, Any]]:
    """The nested configurations, as in config.json, that carry their code and whose class is not an installed one."""
    if not isinstance(fields, dict):
        return []
    found = [inner for value in fields.values() for inner in _unknown_backbones(value)]
    auto_map, kind = fields.get("auto_map"), str(fields.get("model_type"))
    if isinstance(auto_map, dict) and {"AutoConfig", "AutoBackbone"} <= set(auto_map):
        known = CONFIG_MAPPING[kind].__module__ if kind in CONFIG_MAPPING else REMOTE_PACKAGE
        # the installed package's class stays; another folder's does not read this folder
        found += [fields] if known.split(".")[0] == REMOTE_PACKAGE else []
    return found


class DropKeyHostConfig:
    """Reads the configuration of a model around a DropKey backbone, from a folder that carries the backbone's code."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to register: what is read is an object of Transformers' own class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """The model's configuration, of Transformers' own class, with a backbone whose code lies in the same folder.

        Raises:
            ValueError: The folder names code of another repository.
        """
        places = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "subfolder")
        where = {name: kwargs[name] for name in places if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
        where.pop("subfolder", None)
        for backbone in _unknown_backbones(fields):
            classes = []
            for auto in ("AutoConfig", "AutoBackbone"):
                reference = backbone["auto_map"][auto]
                if "--" in reference:
                    raise ValueError(
                        f"config.json of {pretrained_model_name_or_path} takes code of its backbone from another "
                        f"repository ({reference}). Only code in the same folder is run: save the model again with it."
                    )
                classes.append(get_class_from_dynamic_module(reference, pretrained_model_name_or_path, **where))
            config_class, model_class = classes
            AutoConfig.register(backbone["model_type"], config_class, exist_ok=True)
            AutoBackbone.register(config_class, model_class, exist_ok=True)
        found = CONFIG_MAPPING[fields["model_type"]].from_pretrained(pretrained_model_name_or_path, **kwargs)
        carry_backbone_code(found[0] if isinstance(found, tuple) else found)
        return found


__all__ = ["DropKeyHostConfig", "carry_backbone_code"]
