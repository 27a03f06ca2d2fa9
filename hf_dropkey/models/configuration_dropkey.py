"""What the configurations of all DropKey models share: the fields, their checks, and a folder that carries its code.

This file travels with checkpoints: it imports transformers, huggingface_hub and its neighbours only.
"""

import copy
import operator
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import as_validated_field
from transformers.dynamic_module_utils import get_class_in_module, get_relative_import_files, init_hf_modules

from .dropkey import PATTERNS, SCHEDULES, check_choice, check_ratio, layer_ratios


REMOTE_PACKAGE = "transformers_modules"


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
    # the same, or what a loaded checkpoint says
    auto_map: ClassVar[dict[str, str]]
    custom_pipelines: ClassVar[dict[str, dict[str, Any]]]

    def __post_init__(self, **kwargs: Any) -> None:
        # a plain checkpoint's "model_type" would shadow the class attribute that Transformers looks conversions up by
        kwargs.pop("model_type", None)
        kwargs.setdefault("auto_map", dict(self.family_auto_map))
        if self.family_pipelines:
            kwargs.setdefault("custom_pipelines", copy.deepcopy(self.family_pipelines))
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

    def modeling_file(self) -> Path:
        """The source file of the family's models, which leads to every file that a checkpoint needs."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the configuration with the code of the whole family and an `auto_map` that names every class of it.

        Models save their configuration through this, so any saved folder loads with `trust_remote_code=True` through
        each Auto class, and runs in each pipeline of the family, without this package. Entries that a user's own
        registered class has just added are kept.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        modeling_file = self.modeling_file()
        for file in {str(modeling_file), *get_relative_import_files(modeling_file)}:
            # a loaded checkpoint may be saved onto the very files it was loaded from
            if not (folder / Path(file).name).exists() or not os.path.samefile(file, folder / Path(file).name):
                shutil.copyfile(file, folder / Path(file).name)
        before = self.auto_map
        own = {
            auto: name
            for auto, name in before.items()
            if "--" not in name and (folder / f"{name.split('.')[0]}.py").is_file()
        }
        self.auto_map = {**self.family_auto_map, **own}  # type: ignore[misc]  # an instance attribute, but no field
        if self.family_pipelines:
            # a checkpoint loaded from the hub names its pipelines with the repository in front
            known = {**getattr(self, "custom_pipelines", {}), **copy.deepcopy(self.family_pipelines)}
            self.custom_pipelines = known  # type: ignore[misc]  # as above
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]  # as above
        finally:
            self.auto_map = before  # type: ignore[misc]  # as above
