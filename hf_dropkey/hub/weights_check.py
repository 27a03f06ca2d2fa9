"""Whether a checkpoint's weights are what its model loads: the files by name, the tensors key by key.

No code of the checkpoint runs: files are read as safetensors, and the model is built by the class of this package or
of Transformers, first without memory and within bounds that the file itself sets, then with the weights.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import models
from .contents import Entry, has_holes, leaves
from .references import configuration_class


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
# beside its weights a model may have parameters that are not saved: tied ones, and a few constants
SPARE_TENSORS, SPARE_ELEMENTS = 1000, 10**7
# fields that say how often something is built or written, by name; no model has more of them than tensors
COUNTS = re.compile(r"(num|n)_[a-z_]*(layers?|blocks?|stages?|heads?|levels?|queries|groups?|experts?)|depths?|layers")
LARGEST_SIDE = 65536
# what building or loading a model from made-up numbers raises
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


class TooLarge(ValueError):
    """The model of a configuration is far larger than its weights."""


def header(entry: Entry) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a safetensors file.

    Raises:
        ValueError: It is sparse, damaged, or not a safetensors file.
    """
    if has_holes(entry):
        raise ValueError(f"is a sparse file: {entry.size} bytes, of which the disk holds few")
    try:
        with safe_open(entry.path, framework="np") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"is damaged or not a safetensors file ({error})") from error


def weights_problems(folder: str, found: Mapping[str, Entry], parsed: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the weights in one folder of a checkpoint, one sentence each.

    Args:
        folder: The folder's path in the checkpoint, "" for its top.
        found: All files by name.
        parsed: Contents of the JSON files.
    """
    names = [PurePosixPath(folder, name).as_posix() for name in (WHOLE, INDEX)]
    if names[0] in found:
        shards, keys = [names[0]], None
    elif names[1] in found:
        weight_map = parsed[names[1]].get("weight_map") if isinstance(parsed.get(names[1]), dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            yield f"{names[1]} has no 'weight_map' that names the file of each weight"
            return
        strange = [value for value in weight_map.values() if not (isinstance(value, str) and SHARD.fullmatch(value))]
        if strange:
            yield f"{names[1]} names {json.dumps(strange[0])}, where only *.safetensors files beside it are allowed"
            return
        keys = {key: PurePosixPath(folder, value).as_posix() for key, value in weight_map.items()}
        shards = sorted(set(keys.values()))
    else:
        yield f"there are no weights in safetensors: neither {names[0]} nor {names[1]}"
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if shard not in found or found[shard].leaves:
            yield f"{shard} is not there, though {names[1]} names it"
            return
        try:
            held = header(found[shard])
        except ValueError:
            # reported with the other files
            return
        wrong = [key for key in held if keys is not None and keys.get(key) != shard]
        if wrong:
            yield f"{shard} holds {json.dumps(wrong[0])}, which {names[1]} does not say"
            return
        shapes |= held
    missing = sorted(set(keys or {}) - set(shapes))
    if missing:
        yield f"{names[1]} names {json.dumps(missing[0])}, which its file does not hold"
        return
    config = PurePosixPath(folder, "config.json").as_posix()
    if isinstance(parsed.get(config), dict):
        yield from (f"{config}: {reason}" for reason in _too_large(parsed[config], shapes))


def _too_large(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Numbers that would make a model far larger than the weights, before anything is built from them."""
    widest = max((side for shape in shapes.values() for side in shape), default=0)
    for path, value in leaves(config):
        if not isinstance(value, int | float) or isinstance(value, bool) or path[0] in ("label2id", "id2label"):
            continue
        name = next((key for key in reversed(path) if not key.isdigit()), "")
        if COUNTS.fullmatch(name) and value > max(len(shapes), 64):
            yield f"{'.'.join(path)} is {value}, but the weights have {len(shapes)} tensors"
        elif name in ("num_labels", "_num_labels") and value > max(widest, 1000):
            yield f"{'.'.join(path)} is {value}, but no tensor has more than {widest} rows"
        elif (
            isinstance(value, int)
            and value > max(widest, LARGEST_SIDE)
            and not name.endswith(("_id", "_ids", "_length"))
        ):
            yield f"{'.'.join(path)} is {value}, larger than any side of a tensor in the weights ({widest})"


def loading_problems(folder: Path, config: dict[str, Any], found: Mapping[str, Entry]) -> Iterator[str]:
    """Weights that the loader finds missing or of another shape. Only for files without problems.

    Args:
        folder: A folder with configuration and weights.
        config: What config.json holds.
        found: The files of the folder by name.
    """
    try:
        cls = model_class(config)
        shapes = {
            key: shape
            for entry in found.values()
            if entry.kind == ".safetensors"
            for key, shape in header(entry).items()
        }
        with quiet():
            made = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with bounded(shapes), torch.device("meta"):
                cls(made)
            # with the report it returns a pair, which its types do not show
            load: Any = cls.from_pretrained
            _, report = load(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except FAILURES as error:
        yield f"no model can be made of config.json and the weights ({' '.join(str(error).split())[:500]})"
        return
    for key, saved, expected in sorted(report["mismatched_keys"])[:1]:
        yield f"the weights have {key} of shape {list(saved)}, where {cls.__name__} has {list(expected)}"
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"the weights lack {missing[0]}{more} of {cls.__name__}, which the loader would fill with random numbers"


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The class a checkpoint was saved as, of this package or of Transformers.

    Raises:
        ValueError: Neither has one that fits the configuration.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError("'architectures' does not name the class that the weights are of")
    cls: Any = getattr(models, name, None) or getattr(transformers, name, None)
    fits = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and issubclass(cls, nn.Module)
    if not fits or cls.config_class is None:
        raise ValueError(f"neither hf_dropkey nor Transformers has a model {name}")
    expected: type[PreTrainedConfig] = configuration_class(config.get("model_type"))
    if not issubclass(expected, cls.config_class):
        raise ValueError(f"{name} is not a model of type {config.get('model_type')!r}")
    found: type[PreTrainedModel] = cls
    return found


@contextmanager
def bounded(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Stops a model that is being built as soon as it has far more parameters than the weights.

    Raises:
        TooLarge: It has more.
    """
    tensors = 2 * len(shapes) + SPARE_TENSORS
    elements = 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) + SPARE_ELEMENTS
    count, size = 0, 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, size
        count, size = count + 1, size + (parameter.numel() if parameter is not None else 0)
        if count > tensors or size > elements:
            raise TooLarge("the model of the configuration is far larger than the weights")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Transformers while a model is loaded only to be checked."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
