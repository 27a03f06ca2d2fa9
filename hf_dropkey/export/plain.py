"""A checkpoint that any Transformers opens, from a model of this package or a patched one: `export_plain`.

DropKey has no parameters and acts in training only, so the plain model computes the same.
"""

import copy
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection
from ..patching.apply import UNDO, remove_dropkey
from ..patching.sites import transformers_model
from ..saved import PROCESSOR_FILES, base_of, is_adapter, load_config, one_error, saved_class


def export_plain(
    model_or_folder: nn.Module | str | os.PathLike, out: str | os.PathLike, *, overwrite: bool = False
) -> PreTrainedModel:
    """Saves a plain Transformers checkpoint: same weights, same outputs in eval mode, no DropKey, no code.

    Args:
        model_or_folder: A model of this package, a patched model of Transformers, or a folder that holds either. From
            a folder, image processor and tokenizer are copied too.
        out: Folder to write, new or empty.
        overwrite: Replace the saved model in `out`; all other files there are deleted too.

    Returns:
        The plain model in eval mode, with its own copy of the weights if it came from a model.

    Raises:
        ValueError: The architecture is not one of Transformers; or `out` is the folder to export, lies in it, or holds
            it.
        FileExistsError: `out` is not empty and `overwrite` is False, or it holds other files and no saved model.
        NotADirectoryError: `out` is a file.
    """
    target = Path(out)
    source = None if isinstance(model_or_folder, nn.Module) else Path(model_or_folder)
    check_target(source, target, overwrite=overwrite)
    plain = plain_model(
        model_or_folder if isinstance(model_or_folder, nn.Module) else load_model(Path(model_or_folder))
    )
    with replaced(target) as stage:
        plain.save_pretrained(stage)
        copy_processor(source, stage)
    return plain.eval()


def copy_processor(source: Path | None, target: Path) -> None:
    """Copies the files of image processor and tokenizer that lie beside a saved model; none of a model in memory."""
    if source is None:
        return
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_target(source: Path | None, target: Path, *, overwrite: bool) -> None:
    """Raises as `export_plain` does where writing would mix models or delete other files."""
    there = target.resolve()
    if source is not None and source.exists():
        held = source.resolve()
        if held == there:
            raise ValueError(f"{target} would be overwritten by its own export; give another folder")
        if overwrite and (held.is_relative_to(there) or there.is_relative_to(held)):
            raise ValueError(f"one of the folders {target} and {source} lies in the other; give a separate folder")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} is not empty; give another folder, or pass --overwrite (overwrite=True), which deletes all "
            "files in it"
        )
    if not (target / "config.json").is_file():
        raise FileExistsError(
            f"{target} is not empty and holds no saved model, so it is not overwritten; empty it yourself"
        )


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A folder that replaces `target` once it is complete; if writing fails, the old contents stay."""
    real = target.resolve()
    real.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{real.name}-", dir=real.parent) as held:
        stage, old = Path(held, "new"), Path(held, "old")
        stage.mkdir()
        yield stage
        if real.exists():
            real.rename(old)
        stage.rename(real)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """A model of Transformers' own class with a copy of the weights, and a configuration without DropKey.

    Raises:
        ValueError: No class of Transformers fits, or the model carries an adapter.
    """
    root = transformers_model(model)
    if any(".base_layer." in name for name in root.state_dict()):
        raise ValueError(f"{type(root).__name__} carries an adapter; merge it first with model.merge_and_unload()")
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
        ValueError: No class of Transformers fits.
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


def load_model(folder: Path) -> PreTrainedModel:
    """The model in a folder, by the class it was saved as.

    Raises:
        ValueError: It is an adapter, or cannot be loaded.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter of {base_of(folder)} and has no whole weights; train with --merge_adapter, or pass "
            "load_classifier(folder).merge_and_unload()"
        )
    cls: Any = saved_class(load_config(folder), folder)
    with one_error(f"the model in {folder} cannot be loaded"):
        model: PreTrainedModel = cls.from_pretrained(folder)
    return model
