"""What a folder of a saved model holds, and what it lacks."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

from . import models


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
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


def check_model_folder(folder: Path) -> None:
    """Raises FileNotFoundError naming what a saved model lacks, ValueError naming weights that are cut off."""
    report_missing(folder, missing_model_files(folder))
    for file in sorted(folder.glob("*.safetensors")):
        try:
            # compares the length of the file with the one that its header gives
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"the weights {file} are damaged ({error}); use another checkpoint") from error


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ValueError: The file is cut off.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); use another checkpoint") from error
    return found


def missing_model_files(folder: Path) -> list[str]:
    """Names of files that the model in `folder` needs and does not have: configuration, weights, its own code."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a saved model or a checkpoint")
    if not (folder / "config.json").is_file():
        return ["config.json"]
    missing = []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index)["weight_map"].values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    elif not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    auto_map = read_json(folder / "config.json").get("auto_map", {})
    # "repo--module.Class" is code of another repository
    modules = {name.split(".")[0] for name in auto_map.values() if "--" not in name}
    return missing + [f"{module}.py" for module in missing_modules(folder, modules)]


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
            f"{folder} lacks {', '.join(missing)}; complete it, or use another one (a run that was stopped while it "
            "saved leaves such a folder, the checkpoint before it is whole)"
        )


def saved_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """The class that the model in `folder` was saved as, of this package or of Transformers.

    Raises:
        ValueError: Neither has it.
    """
    names = config.architectures or []
    for name in names:
        found: type[PreTrainedModel] | None = getattr(models, name, None) or getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"{folder} was saved as {', '.join(names) or 'no named class'}, which neither hf_dropkey nor Transformers has. "
        "Load the model yourself and pass it instead of the folder"
    )
