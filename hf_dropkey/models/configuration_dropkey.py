"""What the configurations of all DropKey models share: the fields, their checks, and a folder that carries its code.

This file travels with checkpoints: it imports transformers, huggingface_hub and its neighbours only.
"""

import copy
import difflib
import operator
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import as_validated_field
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_in_module, get_relative_import_files, init_hf_modules
from transformers.utils import logging

from .dropkey import PATTERNS, SCHEDULES, check_choice, check_ratio, layer_ratios


logger = logging.get_logger(__name__)

REMOTE_PACKAGE = "transformers_modules"
# what `apply_dropkey` remembers beside the fields of every family
PATCHING_FIELDS = ("dropkey_include", "dropkey_exclude", "dropkey_cross_attention", "dropkey_drop_path_rate")


def shadowing_fields(cls: type, names: Iterable[str]) -> list[str]:
    """Which of `names`, as fields of a config.json, would take the place of a method or a class attribute of `cls`.

    Transformers puts every field that a configuration class does not declare on the instance, where it hides what the
    class has under that name: `_auto_class`, `attribute_map`, `to_dict`. Such a checkpoint decides what its reader saves.
    """
    declared = {field.name for field in fields(cls)} | {"auto_map", "model_type"}

    def hidden(name: str) -> bool:
        found = getattr(cls, name, None)
        # read past the descriptor, as Transformers has properties of the class itself
        own = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), found)
        return hasattr(cls, name) and not (isinstance(own, property) and own.fset is not None)

    return sorted(name for name in set(names) - declared if hidden(name))


@as_validated_field
def ratio_field(value: float) -> None:
    """A configuration field that holds a drop ratio in [0, 1)."""
    check_ratio(value, "a DropKey ratio")


@as_validated_field
def schedule_field(value: str) -> None:
    """A configuration field that names a schedule over depth."""
    check_choice(value, SCHEDULES, "dropkey_schedule")


@as_validated_field
def pattern_field(value: str) -> None:
    """A configuration field that names what is dropped together."""
    check_choice(value, PATTERNS, "dropkey_pattern")


@as_validated_field
def window_field(value: int) -> None:
    """A configuration field that holds a window size in patches, at least 1."""
    if value < 1:
        raise ValueError(f"`dropkey_window` must be at least 1 patch, got {value!r}.")


class _Call:
    """Stands in a pickle for the result of a call made when it is read."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


class _RemoteClass(_Call):
    """Stands in a pickle for a class of a checkpoint's own code, which a fresh process imports first."""

    def __init__(self, cls: type):
        self.cls = cls
        # a pair evaluates the call that puts the modules cache on the import path before the name is taken from it
        name = _Call(operator.getitem, (_Call(init_hf_modules), cls.__name__), 1)
        super().__init__(get_class_in_module, name, cls.__module__.replace(".", os.sep) + ".py")

    def __deepcopy__(self, memo: dict) -> type:
        return self.cls


class RemotePickleMixin:
    """Lets objects of a checkpoint's own code be pickled to a spawned process, which has not imported that code."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self).__module__.split(".")[0] != REMOTE_PACKAGE:
            return reduced
        return object.__new__, (_RemoteClass(type(self)),), *reduced[2:]


@dataclass(kw_only=True)
class DropKeyConfigMixin(RemotePickleMixin):
    """The flat DropKey fields of a configuration, checked on every assignment, and `save_pretrained` with all code.

    Args:
        dropkey_ratio (`float`, defaults to 0.1):
            The largest drop ratio of any layer, in [0, 1). 0 is plain attention. The paper's best values are 0.05 and
            0.1 on ImageNet and 0.3 on CIFAR.
        dropkey_final_ratio (`float`, defaults to 0.0):
            The ratio at the other end of the ramp over depth, in [0, dropkey_ratio].
        dropkey_schedule (`str`, defaults to `"decreasing"`):
            `"decreasing"` from the first layer to the last, `"constant"` or `"increasing"`.
        dropkey_pattern (`str`, defaults to `"score"`):
            What is dropped together: `"score"` (the paper), `"key"`, `"token"`, `"block"` or `"cross"`.
        dropkey_window (`int`, defaults to 3):
            Side of a block, or length of each arm of a cross, in patches.
        dropkey_with_attention_dropout (`bool`, defaults to `False`):
            Allows `attention_probs_dropout_prob` above 0 beside DropKey, which it is meant to replace.
    """

    dropkey_ratio: float | int = ratio_field(default=0.1)
    dropkey_final_ratio: float | int = ratio_field(default=0.0)
    dropkey_schedule: str = schedule_field(default="decreasing")
    dropkey_pattern: str = pattern_field(default="score")
    dropkey_window: int = window_field(default=3)
    dropkey_with_attention_dropout: bool = False

    # Auto class -> "module.Class", for every class of the family
    family_auto_map: ClassVar[dict[str, str]] = {}
    # task -> what Transformers' `custom_pipelines` says of it, for every pipeline of the family
    family_pipelines: ClassVar[dict[str, dict[str, Any]]] = {}
    # of checkpoints of the plain model, which have the same weights
    plain_model_types: ClassVar[tuple[str, ...]] = ()
    # the same as `family_auto_map`, or what a loaded checkpoint says
    auto_map: ClassVar[dict[str, str]]
    custom_pipelines: ClassVar[dict[str, dict[str, Any]]]

    def __post_init__(self, **kwargs: Any) -> None:
        shadowing = shadowing_fields(type(self), kwargs)
        if shadowing:
            raise ValueError(
                f"config.json has {', '.join(shadowing)} as fields, which are methods or class attributes of "
                f"{type(self).__name__}: it could plant code in what is saved from it. Do not use this checkpoint, or "
                "delete them"
            )
        known = {*(field.name for field in fields(self)), *PATCHING_FIELDS}
        for name in sorted(name for name in kwargs if name.startswith("dropkey_") and name not in known):
            near = difflib.get_close_matches(name, known, n=1)
            logger.warning(
                "%s has no field %s, which changes nothing%s",
                type(self).__name__,
                name,
                f"; did you mean {near[0]}?" if near else ".",
            )
        # a plain checkpoint's "model_type" would shadow the class attribute that Transformers looks conversions up by
        kwargs.pop("model_type", None)
        # the loader says where it read from; a name in the file would send `from_config` elsewhere for its code
        kwargs.pop("_name_or_path", None)
        kwargs.setdefault("auto_map", dict(type(self).family_auto_map))
        if type(self).family_pipelines:
            kwargs.setdefault("custom_pipelines", copy.deepcopy(type(self).family_pipelines))
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the configuration class this is mixed into has it

    def validate_dropkey(self) -> None:
        """Raises ValueError where DropKey fields contradict each other or the rest of the configuration.

        Runs when a configuration is made or saved, and again when a model is built from it, because
        `from_pretrained(..., dropkey_ratio=...)` assigns fields one by one in between.
        """
        layer_ratios(1, self.dropkey_ratio, self.dropkey_final_ratio, self.dropkey_schedule)
        dropout = getattr(self, "attention_probs_dropout_prob", 0.0)
        if dropout > 0 and self.dropkey_ratio > 0 and not self.dropkey_with_attention_dropout:
            raise ValueError(
                f"`attention_probs_dropout_prob` ({dropout}) and `dropkey_ratio` ({self.dropkey_ratio}) are both above "
                "0, but DropKey replaces dropout on attention weights. Set one of them to 0, or pass "
                "dropkey_with_attention_dropout=True if you mean both."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in Transformers, from a checkpoint of this family or of the plain model that it extends.

        Raises:
            ValueError: The checkpoint is of another architecture, most of whose weights would be left out.
        """
        found, rest = super().get_config_dict(  # type: ignore[misc]  # as in `__post_init__`
            pretrained_model_name_or_path, **kwargs
        )
        own: str = cls.model_type  # type: ignore[attr-defined]  # as above
        kind = found.get("model_type", own)
        if kind not in (own, *cls.plain_model_types):
            raise ValueError(
                f"{pretrained_model_name_or_path} has model_type {kind!r} and {cls.__name__} reads "
                f"{', '.join((own, *cls.plain_model_types))}. Load it with its own class, or an Auto "
                "class, and call hf_dropkey.apply_dropkey(model, ratio=...)."
            )
        return {**found, "model_type": own} if found else found, rest

    def modeling_file(self) -> Path:
        """The source file of the family's models, which leads to every file that a checkpoint needs."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the configuration with the code of the whole family and an `auto_map` that names every class of it.

        Models save their configuration through this, so any saved folder loads with `trust_remote_code=True` through
        each Auto class, and runs in each pipeline of the family, without this package. Entries of a user's own class are
        kept if that class is loaded and registered (`register_for_auto_class`), pipelines if theirs is; what else a loaded config.json names is not handed on.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        modeling_file = type(self).modeling_file(self)
        # no model imports a pipeline, which Transformers looks up by task
        modules = {task["impl"].partition(".")[0] for task in type(self).family_pipelines.values()}
        sources = [modeling_file, *(modeling_file.with_name(f"{module}.py") for module in sorted(modules))]
        for file in {str(path) for source in sources for path in (source, *get_relative_import_files(source))}:
            # a loaded checkpoint may be saved onto the very files it was loaded from
            if not (folder / Path(file).name).exists() or not os.path.samefile(file, folder / Path(file).name):
                shutil.copyfile(file, folder / Path(file).name)
        before: Any = self.auto_map
        entries = before if isinstance(before, dict) else {}
        own = {auto: name for auto, name in entries.items() if _is_registered(auto, name, folder)}
        pipelines = vars(self).get("custom_pipelines")
        self.auto_map = {**type(self).family_auto_map, **own}  # type: ignore[misc]  # an instance attribute, but no field
        own_pipelines = copy.deepcopy(type(self).family_pipelines)
        if pipelines is not None or own_pipelines:
            # `pipeline` puts classes in place of names
            self.custom_pipelines = {**_loaded_pipelines(pipelines, folder), **own_pipelines}  # type: ignore[misc]
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]  # as above
        finally:
            self.auto_map = before  # type: ignore[misc]  # as above
            if pipelines is not None:
                self.custom_pipelines = pipelines  # type: ignore[misc]  # as above


def _parts(reference: Any, folder: Path) -> tuple[str, str]:
    """Module and class of "module.Class" whose file lies in `folder`; two names that nothing has if it is none."""
    module, _, name = reference.partition(".") if isinstance(reference, str) else ("", "", "")
    fine = module.isidentifier() and name.isidentifier() and (folder / f"{module}.py").is_file()
    return (module, name) if fine else ("no module", "no class")


def _loaded_pipelines(pipelines: Any, folder: Path) -> dict[str, Any]:
    """Those of a configuration's own pipelines whose class this process has loaded and whose file lies in `folder`."""

    def loaded(task: Any) -> bool:
        reference = task.get("impl") if isinstance(task, dict) else None
        module, name = _parts(reference, folder)
        return any(
            path.rpartition(".")[2] == module and hasattr(found, name) for path, found in list(sys.modules.items())
        )

    return {name: task for name, task in pipelines.items() if loaded(task)} if isinstance(pipelines, dict) else {}


def _is_registered(auto: str, reference: Any, folder: Path) -> bool:
    """Whether "module.Class" is a class of this process that was registered for an Auto class, with its file in `folder`."""
    module, name = _parts(reference, folder)
    waiting: list[type] = [PreTrainedConfig, PreTrainedModel]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        registered = vars(cls).get("_auto_class") == auto and cls.__name__ == name
        if registered and cls.__module__.rpartition(".")[2] == module:
            return True
    return False
