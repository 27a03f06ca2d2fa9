"""What a loader would follow in the JSON files of a checkpoint: all but plain values and our own classes is reported.

Transformers, PEFT and the Hub's libraries read class references, other repositories, kernels, templates and paths from
JSON, at any depth and in forms that grow with every release. So this is a list of what is allowed, not of what is
known to be bad: numbers, words and labels; and `module.Class` where a class reference belongs, if `module.py` lies
beside, is code of this package and defines that class.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .. import models
from ..models.configuration_dropkey import shadowing_fields
from ..patching.adapters import BASE_CONFIG
from .contents import leaves


# files that another library follows by their name alone
FOLLOWED_FILES = {
    "adapter_config.json": "makes Auto classes and pipelines load another model, with its code, where peft is installed",
    "model_index.json": "names the classes of a diffusers pipeline",
    "modules.json": "names the classes of a sentence-transformers model",
    "chat_template.json": "is a template, a program that runs where the model is used to chat",
    "config_sentence_transformers.json": "is followed by sentence-transformers",
}
# fields that some loader follows, wherever they stand; no model of this package has them
FOLLOWED_FIELDS = {
    "custom_generate": "is code for generation",
    "quantization_config": "names a quantiser and its settings",
    "compression_config": "names a quantiser and its settings",
    "configuration_files": "makes the loader read another configuration",
    "fast_tokenizer_files": "makes the loader read another tokenizer",
    "transformers_weights": "makes the loader read other weights",
    "extra_files": "makes the loader read more weights",
    "extra_config_files": "makes the loader read more configurations",
    "chat_template": "is a template, a program that runs where the model is used to chat",
    "default_chat_template": "is a template, a program that runs where the model is used to chat",
    "response_schema": "is a program that reads answers",
    "response_template": "is a program that reads answers",
    "base_model_name_or_path": "makes loaders read another model",
    "_adapter_model_path": "makes loaders read another model",
    "auto_mapping": "names a class of another library",
    "parent_library": "names another library to import",
    "kernel_config": "names kernels to download",
    "kernel_mapping": "names kernels to download",
    "use_kernels": "makes the loader download kernels",
    "distributed_config": "is a plan of how to run the model on several machines",
    "speculators_config": "names another model",
}
# attention and experts that Transformers has within itself, and ours
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
OWN_IMPLEMENTATION = re.compile(r"dropkey_[a-z_]+")
# files of a run and vocabularies, which no loader takes classes, places or names of repositories from
RECORDS = ("trainer_state.json", "run_facts.json")
RECORD = re.compile(r"[a-z0-9_]*results\.json")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
INDEX = re.compile(r"[\w.-]+\.index\.json")
# a word or a few, a number as text, a version; no "/", "\\", ":", "--", "@" and no ending of a file
PLAIN = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+ .,()%-]{0,199}|")
# a module or a file, which a version is not
DOTTED = re.compile(r"\.[A-Za-z_]")
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*([.-]?(dev|rc|a|b|post)[0-9]*)*(\+\w+)?")
DTYPE = re.compile(r"(torch\.)?(float|bfloat|int|uint|complex)[0-9][0-9a-z_]*|bool|auto")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# text that only people read
LABELS = ("id2label", "label2id")
TOKENS = re.compile(r"[a-z_]*_tokens?|content|added_tokens_decoder|additional_special_tokens|extra_special_tokens")
# which modules of a patched model drop keys: patterns that `apply_dropkey` compares with its own names
MODULE_PATTERNS = ("dropkey_include", "dropkey_exclude")
MODULE_PATTERN = re.compile(r"[\w.*?\[\]!-]{1,200}")
# names that a loader looks up among its own classes
CLASS_NAMES = re.compile(r"[a-z_]*_(class|type)|architectures")
PRIVATE = ("_attn_implementation", "_experts_implementation", "_name_or_path", "_commit_hash", "_num_labels")


@lru_cache(maxsize=256)
def defined_classes(source: bytes) -> frozenset[str]:
    """Names of the classes that a Python file defines at its top level; none if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    return frozenset(node.name for node in tree.body if isinstance(node, ast.ClassDef))


def json_problems(name: str, found: Any, classes: Mapping[str, Collection[str]], *, code: bool) -> Iterator[str]:
    """Values of a JSON file that a loader could follow, one sentence each.

    Args:
        name: Path of the file in the checkpoint.
        found: What it holds.
        classes: Names of the classes in each checked Python file at the top, by module.
        code: Whether the checkpoint carries any code.
    """
    # some file systems take Config.JSON for config.json
    base = PurePosixPath(name).name.lower()
    if base in FOLLOWED_FILES:
        yield f"{name} {FOLLOWED_FILES[base]}"
        return
    if not isinstance(found, dict):
        if base != "vocab.json" or not isinstance(found, list):
            yield f"{name} holds a {type(found).__name__}, where every loader expects an object"
        return
    for path, value in leaves(found):
        for reason in _leaf_problems(base, path, value, classes, code):
            yield f"{name}: {'.'.join(path)} {reason}"
    if base in ("config.json", BASE_CONFIG):
        yield from (f"{name}: {reason}" for reason in _config_problems(found))


def _leaf_problems(
    base: str, path: tuple[str, ...], value: Any, classes: Mapping[str, Collection[str]], code: bool
) -> Iterator[str]:
    keys = [key for key in path if not key.isdigit()]
    vocabulary, empty = base in VOCABULARIES, value in (None, "", False) or value == [] or value == {}
    if empty or (vocabulary and isinstance(value, int)):
        return
    if "auto_map" in keys or ("custom_pipelines" in keys and "impl" in keys):
        yield from _reference_problems(value, classes)
        return
    followed = next((key for key in keys if key in FOLLOWED_FIELDS), None)
    if followed is not None:
        yield f"{FOLLOWED_FIELDS[followed]}, and no model of hf_dropkey has it"
        return
    if any("implementation" in key and key != "cache_implementation" for key in keys):
        if not isinstance(value, str) or not (value in IMPLEMENTATIONS or OWN_IMPLEMENTATION.fullmatch(value)):
            yield f"is {_shown(value)}, which may be a kernel to download; allowed are {', '.join(IMPLEMENTATIONS)}"
        return
    if base in RECORDS or RECORD.fullmatch(base) or vocabulary or (INDEX.fullmatch(base) and keys[0] == "weight_map"):
        return
    yield from _text_problems(path, value, code)


def _text_problems(path: tuple[str, ...], value: Any, code: bool) -> Iterator[str]:
    """Problems of a value where a loader may look for a name or a place."""
    top, key = path[0], next((key for key in reversed(path) if not key.isdigit()), "")
    if any(one in LABELS for one in path):
        return
    if top in MODULE_PATTERNS and isinstance(value, str) and MODULE_PATTERN.fullmatch(value):
        return
    strange = [one for one in path if not PLAIN.fullmatch(one) or "--" in one]
    if strange:
        yield f"has the key {_shown(strange[0])}, which is not the name of a field"
    if not isinstance(value, str) or any(TOKENS.fullmatch(one) for one in path):
        return
    if key in ("_name_or_path", "name_or_path") and path in ((top,), (key,)):
        if code:
            yield f"is {_shown(value)}, where `from_config` would look for the code; delete the field"
        return
    if key in ("dtype", "torch_dtype") or "dtype" in path:
        if not DTYPE.fullmatch(value):
            yield f"is {_shown(value)}, which is not a type of numbers"
    elif CLASS_NAMES.fullmatch(key):
        if not IDENTIFIER.fullmatch(value) and not PLAIN.fullmatch(value):
            yield f"is {_shown(value)}, which is not the name of a class"
        elif DOTTED.search(value) or "--" in value:
            yield f"is {_shown(value)}, which may name a class elsewhere"
    elif not PLAIN.fullmatch(value) or "--" in value or ".." in value:
        yield f"is {_shown(value)}, which may name a file, a place or another repository"
    elif DOTTED.search(value) and not VERSION.fullmatch(value) and key != "backbone":
        yield f"is {_shown(value)}, which may name a class or a file"


def _reference_problems(value: Any, classes: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Problems of a class reference: it must be `module.Class` of a checked file."""
    if isinstance(value, str) and "--" in value:
        yield f"is code of another repository, {_shown(value)}"
        return
    module, dot, name = value.partition(".") if isinstance(value, str) else ("", "", "")
    if not (dot and IDENTIFIER.fullmatch(module) and IDENTIFIER.fullmatch(name)):
        yield f"is {_shown(value)}, not 'module.Class'"
    elif module not in classes:
        yield f"is {_shown(value)}, but there is no {module}.py of hf_dropkey beside the configuration"
    elif name not in classes[module]:
        yield f"is {_shown(value)}, but {module}.py defines no class {name}"


def _config_problems(config: dict[str, Any]) -> Iterator[str]:
    """Fields that would replace methods and class attributes, here and in nested configurations."""
    waiting: list[tuple[str, dict[str, Any]]] = [("", config)]
    while waiting:
        place, fields = waiting.pop()
        where = f" in {place}" if place else ""
        cls = configuration_class(fields.get("model_type"))
        hidden = shadowing_fields(cls, fields)
        private = [key for key in fields if key.startswith("_") and key not in (*PRIVATE, *hidden)]
        hidden += [key for key in private if key not in _own_private(cls)]
        if hidden:
            yield (
                f"the fields {', '.join(map(_shown, hidden))}{where} would replace the attributes of {cls.__name__} with "
                "these names, and could plant code in what is saved from it"
            )
        waiting += [
            (key, value)
            for key, value in fields.items()
            if isinstance(value, dict) and key not in (*LABELS, "auto_map")
        ]


def configuration_class(model_type: Any) -> type[PreTrainedConfig]:
    """The configuration class of a model type, of this package or of Transformers; their base if neither has it."""
    for name in models.__all__:
        cls = getattr(models, name)
        if issubclass(cls, PreTrainedConfig) and cls.model_type == model_type:
            return cls
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        return found
    return PreTrainedConfig


def _own_private(cls: type[PreTrainedConfig]) -> set[str]:
    """Names with an underscore that a class itself writes into its config.json."""
    try:
        return set(vars(cls())) - set(vars(PreTrainedConfig()))
    except (TypeError, ValueError, StrictDataclassError):
        # some have fields without a default
        return set()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
