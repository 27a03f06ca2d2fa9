"""Folders of saved models and adapters: their configuration, class and weights, and the files that they lack."""

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import models
from .patching.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG
from .patching.dispatch import DROPKEY_NAME


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"
# far above those of any model
MOST_CLASSES, MOST_LAYERS, MOST_NESTED = 1_000_000, 10_000, 20
# how configurations end the names of fields that say how many modules there are
LAYER_FIELDS = ("layers", "depth", "depths", "num_blocks", "num_stages")
# what a pipeline needs besides the model
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT without the model that it is for."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def config_file(folder: Path) -> Path:
    """The configuration of the model in a folder; of an adapter, that of its base model as the adapter changed it."""
    return folder / (BASE_CONFIG if is_adapter(folder) else "config.json")


def processor_size(settings: Mapping[str, Any]) -> Any:
    """The size in the settings of a saved image processor: of its crop, else what it resizes to; None without either."""
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    return cropped or (settings.get("size") if settings.get("do_resize", True) else None)


def check_model_folder(folder: Path) -> None:
    """Raises FileNotFoundError for files that a saved model or adapter lacks, ValueError for damaged or impossible contents."""
    report_missing(folder, missing_model_files(folder))
    if is_adapter(folder):
        tensor_shapes(folder / ADAPTER_WEIGHTS)
        return
    check_sizes(folder)
    for shard, names in sorted(_indexed(folder).items()):
        lost = sorted(names - set(tensor_shapes(folder / shard)))
        if lost:
            raise ValueError(
                f"the weights {folder / shard} lack {len(lost)} of those that {INDEX} names, such as {lost[0]}; use "
                "another checkpoint"
            )


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a safetensors file, read from its header.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        # compares the length of the file with the one that its header gives
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118  # no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the weights {file} are damaged ({error}); use another checkpoint") from error


def _indexed(folder: Path) -> dict[str, set[str]]:
    """The files in the index of a sharded model, each with the names of its weights; empty for a model in one file."""
    if not (folder / INDEX).is_file():
        return {}
    found: dict[str, set[str]] = {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(
            f"{folder / INDEX} is damaged (its weight_map is not an object of file names); use another one"
        )
    for name, shard in weight_map.items():
        if Path(shard).name != shard:
            raise ValueError(
                f"{folder / INDEX} names {shard!r}, which is not a file of this folder; use another checkpoint"
            )
        found.setdefault(shard, set()).add(name)
    return found


def check_sizes(folder: Path) -> None:
    """Raises ValueError if the configuration in `folder` has more layers or classes than its weights can hold.

    Just to read such a configuration would fill the memory. Without weights, the limits are far above any model's.
    """
    shapes = [shape for file in sorted(folder.glob("*.safetensors")) for shape in tensor_shapes(file).values()]
    most = {
        # a model without a head may have more classes than rows of any weight, within reason
        "classes": max(10_000, *(max(shape, default=1) for shape in shapes)) if shapes else MOST_CLASSES,
        # each layer has a weight of its own
        "layers": max(100, len(shapes)) if shapes else MOST_LAYERS,
    }
    file = config_file(folder)
    if is_adapter(folder):
        # the weights that the numbers are of are elsewhere
        most = {"classes": MOST_CLASSES, "layers": MOST_LAYERS}
    for name, value in _numbers(read_json(file)):
        kind = "classes" if name == "num_labels" else "layers" if name.endswith(LAYER_FIELDS) else None
        if kind is not None and value < 0:
            raise ValueError(f"{file} has {name} {value}, which is below 0; correct it")
        if kind is not None and value > most[kind]:
            whole = shapes and not is_adapter(folder)
            holds = f"its weights hold at most {most[kind]} {kind}" if whole else f"at most {most[kind]} are allowed"
            raise ValueError(f"{file} has {name} {value}, but {holds}; correct it, or use another checkpoint")


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Whole numbers in a configuration and in those inside of it, with their names; lists by their sum."""
    for name, value in config.items():
        if isinstance(value, dict) and depth < MOST_NESTED:
            yield from _numbers(value, depth + 1)
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(isinstance(number, int | float) for number in numbers):
            # infinite numbers are valid to Python's reader of JSON
            yield name, math.ceil(min(sum(numbers), sys.maxsize)) if not math.isnan(sum(numbers)) else 0


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: The file is cut off, or does not hold an object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} is damaged (it holds a {type(found).__name__}, not an object); use another checkpoint"
        )
    return found


def check_model_source(source: str, *, adapters: bool = False) -> None:
    """Checks what stands for a model, a folder or an id of the Hub: a folder is whole, and a path without one is reported.

    Args:
        source: Folder or id.
        adapters: Whether an adapter of PEFT will do.

    Raises:
        FileNotFoundError: It is a path, which no id of the Hub is, and no folder lies there; or the folder lacks files.
        ValueError: As `check_model_folder`; or it is an adapter.
    """
    if Path(source).is_dir():
        check_model_folder(Path(source))
        if is_adapter(Path(source)) and not adapters:
            raise ValueError(
                f"--model_name_or_path {source} is an adapter of {base_of(Path(source))}, not a whole model; train it on "
                "with --resume_from_checkpoint, or save it merged with --merge_adapter and start from that"
            )
    elif Path(source).is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(
            f"--model_name_or_path {source} is {'a file' if Path(source).is_file() else 'not there'}; give the folder of a "
            "saved model, or an id of the Hub such as owner/name"
        )


def base_of(folder: Path) -> str:
    """The model that the adapter in a folder is for, a folder or an id of the Hub.

    Raises:
        ValueError: The adapter does not say.
    """
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} has base_model_name_or_path {named!r}; write there the model that the adapter "
            "is for, a folder or an id of the Hub"
        )
    return named


def check_attention(name: str | None) -> None:
    """Raises ValueError for an `attn_implementation` that neither Transformers nor this package has."""
    # "owner/name" is a kernel of the Hub
    if name is None or "/" in name:
        return
    known = ["eager", *(one for one in ALL_ATTENTION_FUNCTIONS.keys() if "|" not in one and one != DROPKEY_NAME)]  # noqa: SIM118  # no dict
    if name not in known:
        raise ValueError(f"--attn_implementation {name} is unknown; choose from {', '.join(sorted(known))}")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Leaves out Transformers' table of new and resized weights, for loaders that report these themselves.

    A table with weights of the checkpoint that the model does not have is shown.
    """
    handlers = logging.getLogger("transformers").handlers
    for handler in handlers:
        handler.addFilter(_expected)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_expected)


def _expected(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "LOAD REPORT" not in message or "UNEXPECTED" in message


def missing_model_files(folder: Path) -> list[str]:
    """Names of files that the model in `folder` needs and does not have: configuration, weights, its own code."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a saved model or a checkpoint")
    if is_adapter(folder):
        return [] if (folder / ADAPTER_WEIGHTS).is_file() else [ADAPTER_WEIGHTS]
    if not (folder / "config.json").is_file():
        return ["config.json"]
    missing = []
    if (folder / INDEX).is_file():
        missing += sorted(shard for shard in _indexed(folder) if not (folder / shard).is_file())
    elif not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    auto_map: Any = read_json(folder / "config.json").get("auto_map")
    names = auto_map.values() if isinstance(auto_map, dict) else ()
    # "repo--module.Class" is code of another repository; image processors also have lists and objects here
    modules = {name.split(".")[0] for name in names if isinstance(name, str) and "--" not in name}
    return missing + [f"{module}.py" for module in missing_modules(folder, modules)]


def missing_weights(folder: Path) -> list[str]:
    """Names of weights that the model in `folder` has and its files lack; empty if its class is unknown.

    Raises:
        ValueError: The weights have other shapes than the model, or cannot be read.
    """
    if is_adapter(folder):
        # what it lacks is in the base model
        return []
    config = load_config(folder)
    try:
        cls: Any = saved_class(config, folder)
    except ValueError:
        # a class outside of this package and Transformers, which only its owner can load
        return []
    with one_error(f"the weights in {folder} do not fit its configuration"):
        _, report = cls.from_pretrained(folder, config=config, output_loading_info=True)
    return sorted(report["missing_keys"])


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """Turns errors of Transformers and torch for an impossible configuration into one line that starts with `what`.

    Raises:
        ValueError: Something was raised inside.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{what} ({type(error).__name__}: {' '.join(str(error).split())}); use another one"
        ) from error


def missing_modules(folder: Path, modules: Iterable[str]) -> list[str]:
    """Which of `modules` in `folder`, and of all that they import from there, have no file."""
    found: set[str] = set()
    waiting = set(modules)
    while waiting:
        module = waiting.pop()
        found.add(module)
        if (folder / f"{module}.py").is_file():
            waiting |= set(get_relative_imports(folder / f"{module}.py")) - found
    return sorted(module for module in found if not (folder / f"{module}.py").is_file())


def report_missing(folder: Path, missing: list[str]) -> None:
    """Raises FileNotFoundError if anything is missing."""
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; complete it, or use another one (a run that was stopped while "
            "saving leaves such a folder; the checkpoint before it is complete)"
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder; no code of the folder runs.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: It is damaged, or of a model that neither this package nor Transformers has.
    """
    file = config_file(folder)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name}; pass the folder of a saved model")
    check_sizes(folder)
    with one_error(f"{file} cannot be used"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(file, trust_remote_code=False)
    return config


def saved_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that the model in `folder` was saved as, of this package or of Transformers.

    Raises:
        ValueError: Neither has it, or it is the class of another configuration.
    """
    names = config.architectures or []
    names = [str(name) for name in names] if isinstance(names, list | tuple) else [str(names)]
    for name in names:
        found: Any = getattr(models, name, None) or getattr(transformers, name, None)
        if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
            continue
        if found.config_class is None or not isinstance(config, found.config_class):
            raise ValueError(
                f"{folder} was saved as {name}, which has no configuration of model_type {config.model_type!r}; "
                "correct `architectures` or `model_type` in its config.json"
            )
        return found
    raise ValueError(
        f"{folder} was saved as {', '.join(names) or 'no named class'}, which is not a model of hf_dropkey or "
        "Transformers; load the model yourself and pass it instead of the folder"
    )
