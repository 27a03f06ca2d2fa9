"""Checkpoints that run foreign code, hide it, plant it or cannot be read: each entry changes one saved folder.

`JSON_ATTACKS` merges an object into a JSON file (made if it is not there), `FOLDER_ATTACKS` does anything else,
`UNREADABLE` leaves a folder about which nothing can be said. `HARMLESS` must stay trusted.
"""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedConfig


EVIL = "evil/x--m.P"
FIRST = "configuration_dropkey_vit.DropKeyViTConfig"
CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
TOKENIZER, GENERATION, VIDEO = "tokenizer_config.json", "generation_config.json", "video_preprocessor_config.json"


def _references() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class references in every form that some loader follows, in every file that has them."""
    forms: dict[str, Any] = {
        "text": EVIL,
        "backends": {"pil": EVIL},
        "second backend": {"torchvision": FIRST, "pil": EVIL},
        "list": [EVIL, None],
        "second of a list": [None, EVIL],
        "list of backends": [{"pil": EVIL}],
        "absolute": "/elsewhere/x.Config",
        "relative": "../x.Config",
        "inside": "custom_generate/generate.P",
        "windows": "C:\\x.Config",
        "three parts": "a.b.C",
        "no class": "configuration_dropkey_vit",
        "module only": "configuration_dropkey_vit.",
        "not there": "gone.Model",
        "not defined": "configuration_dropkey_vit.shutil",
        "imported": "configuration_dropkey.Path",
        "not ascii": "configuration_dropkey_vit.DropKeyViTC\u043enfig",
        "wide letters": "\uff43onfiguration_dropkey_vit.DropKeyViTConfig",
        "trailing": "evil/x--configuration_dropkey_vit.DropKeyViTConfig",
        "number": 3,
        "space": " configuration_dropkey_vit.DropKeyViTConfig",
        "line end": "configuration_dropkey_vit.DropKeyViTConfig\n",
        "null byte": "configuration_dropkey_vit.DropKeyViTConfig\0",
    }
    made = {f"auto_map {form}": (CONFIG, {"auto_map": {"AutoModel": value}}) for form, value in forms.items()}
    places = {
        PREPROCESSOR: "AutoImageProcessor",
        PROCESSOR: "AutoProcessor",
        TOKENIZER: "AutoTokenizer",
        VIDEO: "AutoVideoProcessor",
        GENERATION: "AutoModel",
        "config.4.0.0.json": "AutoConfig",
        "other.json": "AutoModel",
        "trainer_state.json": "AutoModel",
    }
    for form in ("text", "backends", "second of a list", "list of backends", "absolute"):
        for file, auto in places.items():
            made[f"{file} {form}"] = (file, {"auto_map": {auto: forms[form]}})
        for part in ("image_processor", "feature_extractor", "video_processor", "tokenizer", "a"):
            made[f"nested {part} {form}"] = (PROCESSOR, {part: {"auto_map": {"AutoImageProcessor": forms[form]}}})
        made[f"deep {form}"] = (PROCESSOR, {"a": {"b": [{"c": {"auto_map": {"AutoModel": forms[form]}}}]}})
        made[f"backbone {form}"] = (CONFIG, {"backbone_config": {"auto_map": {"AutoConfig": forms[form]}}})
    whole: dict[str, Any] = {"list": [EVIL, None], "text": EVIL}
    made["auto_map as a list"] = (TOKENIZER, {"auto_map": whole["list"]})
    made["auto_map as text"] = (PREPROCESSOR, {"auto_map": whole["text"]})
    return made


JSON_ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    **_references(),
    # other models, other files
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "evil/base", "peft_type": "LORA"}),
    "adapter inside": ("sub/adapter_config.json", {"base_model_name_or_path": "evil/base"}),
    "adapter library": ("adapter_config.json", {"auto_mapping": {"parent_library": "os", "base_model_class": "x"}}),
    "base in config": (CONFIG, {"base_model_name_or_path": "evil/base"}),
    "name": (CONFIG, {"_name_or_path": "evil/base"}),
    "public name": (CONFIG, {"name_or_path": "evil/base"}),
    "weights": (CONFIG, {"transformers_weights": "sub/evil.safetensors"}),
    "other configuration": (CONFIG, {"configuration_files": ["config.4.0.0.json"]}),
    "other tokenizer": (TOKENIZER, {"fast_tokenizer_files": ["tokenizer.4.0.json"]}),
    "vocabulary elsewhere": (TOKENIZER, {"vocab_file": "/etc/passwd"}),
    "tokenizer elsewhere": (TOKENIZER, {"tokenizer_file": "../x.json"}),
    "draft model": (GENERATION, {"assistant_model": "evil/draft"}),
    "backbone repository": (CONFIG, {"backbone": "evil/backbone", "use_pretrained_backbone": True}),
    "backbone address": (CONFIG, {"backbone": "hf-hub:evil/backbone"}),
    "address": (CONFIG, {"something": "https://evil.example/x"}),
    "file": (CONFIG, {"something": "evil.bin"}),
    "class elsewhere": (PREPROCESSOR, {"image_processor_type": "evil.Processor"}),
    "class in a repository": (TOKENIZER, {"tokenizer_class": EVIL}),
    "diffusers": ("model_index.json", {"_class_name": "Pipe", "unet": ["evil", "Unet"]}),
    "sentence transformers": ("modules.json", {"0": {"type": "evil.Module", "path": ""}}),
    # code
    "pipeline elsewhere": (CONFIG, {"custom_pipelines": {"x": {"impl": EVIL, "pt": ["AutoModel"]}}}),
    "pipeline": (CONFIG, {"custom_pipelines": {"image-classification": {"impl": "pipe.Evil"}}}),
    "pipeline default": (CONFIG, {"custom_pipelines": {"x": {"impl": FIRST, "default": {"model": "evil/x"}}}}),
    "generate": (GENERATION, {"custom_generate": "evil/generate"}),
    "generate in config": (CONFIG, {"custom_generate": "evil/generate"}),
    "template": (TOKENIZER, {"chat_template": "{{ x }}"}),
    "templates": (TOKENIZER, {"chat_template": [{"name": "default", "template": "{{ x }}"}]}),
    "template in processor": (PROCESSOR, {"chat_template": "{{ x }}"}),
    "template inside": (PROCESSOR, {"tokenizer": {"chat_template": {"default": "{{ x }}"}}}),
    "template file": ("chat_template.json", {"chat_template": "{{ x }}"}),
    "quantiser": (CONFIG, {"quantization_config": {"quant_method": "evil"}}),
    # kernels
    "kernel": (CONFIG, {"attn_implementation": "evil/kernel"}),
    "kernel with layer": (CONFIG, {"_attn_implementation": "evil/kernel@main:layer"}),
    "paged kernel": (CONFIG, {"attn_implementation": "paged|evil/kernel"}),
    "kernel by part": (CONFIG, {"attn_implementation": {"": "eager", "vision_config": "evil/kernel"}}),
    "kernel inside": (CONFIG, {"vision_config": {"attn_implementation": "evil/kernel"}}),
    "kernel deep": (CONFIG, {"a": {"b": {"_attn_implementation_internal": "evil/kernel"}}}),
    "flash kernel": (CONFIG, {"attn_implementation": "flash_attention_3"}),
    "experts": (CONFIG, {"experts_implementation": "evil/kernel"}),
    "experts inside": (CONFIG, {"text_config": {"_experts_implementation": {"": "evil/kernel"}}}),
    "kernel mapping": (CONFIG, {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel:RMSNorm"}}}),
    "kernels": (CONFIG, {"use_kernels": True}),
    "kernel otherwise": (CONFIG, {"attention_backend": "evil/kernel"}),
    # what shadows
    **{
        f"shadow {name}": (CONFIG, {name: value})
        for name, value in {
            "family_auto_map": {"AutoModel": FIRST},
            "modeling_file": "x",
            "validate_dropkey": "x",
            "validate": "x",
            "to_dict": "x",
            "to_diff_dict": "x",
            "save_pretrained": "x",
            "_auto_class": "AutoModel",
            "attribute_map": {"hidden_size": "num_labels"},
            # Transformers 5.13 has no such attribute to shadow
            **({"sub_configs_defaults": {"a": "b"}} if hasattr(PreTrainedConfig, "sub_configs_defaults") else {}),
            "extra_files": ["x"],
            "patch_grid": 3,
            "grid_of": 3,
            "__class__": "x",
            "__init__": "x",
            "_post_init_done": True,
            "_anything": 1,
        }.items()
    },
    "shadow inside": (CONFIG, {"backbone_config": {"model_type": "resnet", "_auto_class": "AutoConfig"}}),
    # sizes
    "labels": (CONFIG, {"num_labels": 10**9}),
    "layers": (CONFIG, {"num_hidden_layers": 10**9}),
    "layers of floats": (CONFIG, {"num_hidden_layers": 1e9}),
    "width": (CONFIG, {"hidden_size": 10**7}),
    "image": (CONFIG, {"image_size": 10**9}),
    "another width": (CONFIG, {"hidden_size": 32}),
    "more layers": (CONFIG, {"num_hidden_layers": 2}),
    "architecture": (CONFIG, {"architectures": ["ResNetForImageClassification"]}),
    "no architecture": (CONFIG, {"architectures": None}),
    "unheard architecture": (CONFIG, {"architectures": ["Unheard"]}),
    "architecture as a path": (CONFIG, {"architectures": ["../x"]}),
    "function as architecture": (CONFIG, {"architectures": ["pipeline"]}),
    "model type": (CONFIG, {"model_type": "resnet"}),
}


class Evil:
    """Would make a file if its pickle were opened."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path("opened").touch, ()


def _write(name: str, content: bytes | str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return attack


def _shards(change: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Two shards and their index instead of one file, then a change."""

    def attack(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for file, keys in parts.items():
            save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {key: file for file, keys in parts.items() for key in keys},
        }
        change(folder, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return attack


def _point(value: Any, make: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """An index that sends the first weight elsewhere."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        if make is not None:
            make(folder)
        index["weight_map"][next(iter(index["weight_map"]))] = value

    return _shards(change)


def _weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return attack


def _link(name: str, target: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def _linked_out(name: str) -> Callable[[Path], None]:
    """A file of the folder moved out of it and linked to."""

    def attack(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return attack


def _move(old: str, new: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)

    return attack


def _pickled(name: str) -> Callable[[Path], None]:
    return _write(name, pickle.dumps(Evil()))


def _program(name: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).write_text("hello")
        (folder / name).chmod(0o755)

    return attack


FOLDER_ATTACKS: dict[str, Callable[[Path], None]] = {
    # code
    "new code": _write("evil.py", "print('hello')"),
    "code in a folder": _write("custom_generate/generate.py", "print('hello')"),
    "changed code": _write("dropkey.py", "print('hello')"),
    "empty code": _write("dropkey.py", ""),
    "capital ending": _write("evil.PY", "print('hello')"),
    "byte code": _write("__pycache__/dropkey.cpython-311.pyc", b"\0"),
    "package": _write("dropkey/__init__.py", "print('hello')"),
    "library": _write("dropkey.so", b"\x7fELF"),
    "missing code": lambda folder: (folder / "dropkey.py").unlink(),
    "template": _write("chat_template.jinja", "{{ x }}"),
    "more templates": _write("additional_chat_templates/x.jinja", "{{ x }}"),
    "drawing": _write("x.svg", "<svg><script>alert(1)</script></svg>"),
    "drawing that asks": _write("x.svg", '<svg onload = "alert(1)"/>'),
    # pickles
    **{
        f"pickle {name}": _pickled(name)
        for name in (
            "pytorch_model.bin",
            "pytorch_model-00001-of-00001.bin",
            "training_args.bin",
            "optimizer.pt",
            "x.pkl",
            "x.ckpt",
            "x.npz",
            "x.npy",
            "x.joblib",
            "x.h5",
            "x.keras",
            "x.gguf",
            "x.msgpack",
            "x.onnx",
            "x.tar.gz",
            "x.zip",
            "x",
            "w.SAFETENSORS",
            "w.safetensors",
            "w.Json",
            "sub/model.safetensors",
            "notes.txt",
            "card.md",
            "x.csv",
            "x.png",
            "x.jpeg",
            "vocab.model",
            "LICENSE",
        )
    },
    "pickle only": _move("model.safetensors", "pytorch_model.bin"),
    "program": _program("notes.txt"),
    "elf": _write("x.png", b"\x7fELF\x02"),
    "script": _write("LICENSE", "#!/bin/sh\n"),
    "no image": _write("x.png", "hello"),
    "no text": _write("README.md", b"\xff\xfe\x00"),
    "no JSON": _write("more.json", "{"),
    "JSON with a mark": _write("more.json", b"\xef\xbb\xbf{}"),
    "JSON list": _write("more.json", "[1]"),
    "key twice": _write(
        "preprocessor_config.json", '{"auto_map": {"AutoImageProcessor": "' + EVIL + '"}, "auto_map": {}}'
    ),
    "escaped key": _write("preprocessor_config.json", '{"auto\\u005fmap": {"AutoImageProcessor": "' + EVIL + '"}}'),
    "escaped value": _write("preprocessor_config.json", '{"auto_map": {"AutoImageProcessor": "evil/x\\u002d-m.P"}}'),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    # links
    "link out": _linked_out("dropkey.py"),
    "configuration linked out": _linked_out("config.json"),
    "weights linked out": _linked_out("model.safetensors"),
    "link to a folder": _link("custom_generate", ".."),
    "link to a password": _link("notes.txt", "/etc/passwd"),
    "link into git": lambda folder: (_write(".git/x.json", "{}")(folder), _link("more.json", ".git/x.json")(folder))[
        0
    ],
    "cache as a link": _link(".cache", ".."),
    "git as a file": _write(".git", "gitdir: elsewhere"),
    # weights
    "index to the cache": _point(".cache/w.safetensors", _pickled(".cache/w.safetensors")),
    "index to git": _point(".git/w.safetensors", _pickled(".git/w.safetensors")),
    "index up": _point("../w.safetensors"),
    "index absolute": _point("/tmp/w.safetensors"),
    "index to a pickle": _point("w.SAFETENSORS", _pickled("w.SAFETENSORS")),
    "index to a bin": _point("w.bin", _pickled("w.bin")),
    "index to a hidden file": _point(".w.safetensors", _pickled(".w.safetensors")),
    "index to a folder": _point("sub/w.safetensors"),
    "index to windows": _point("sub\\w.safetensors"),
    "index to nothing": _point("gone.safetensors"),
    "index to a number": _point(3),
    "index to the other shard": _point("model-00002-of-00002.safetensors"),
    "index with more": _shards(
        lambda folder, index: index["weight_map"].update({"x": "model-00001-of-00002.safetensors"})
    ),
    "index with less": _shards(lambda folder, index: index["weight_map"].popitem()),
    "index of nothing": _shards(lambda folder, index: index.pop("weight_map")),
    "index is a list": _shards(lambda folder, index: index.update({"weight_map": ["x"]})),
    "unrelated weights": lambda folder: save_file({"x": np.zeros(3)}, folder / "model.safetensors"),
    "other name": _move("model.safetensors", "other.safetensors"),
    "capital name": _move("model.safetensors", "model.SAFETENSORS"),
    "a key is missing": _weights(lambda tensors: tensors.pop(min(tensors))),
    "a key has another name": _weights(lambda tensors: tensors.update({"x": tensors.pop(min(tensors))})),
    "another shape": _weights(lambda tensors: tensors.update({"classifier.bias": np.zeros(7, np.float32)})),
    "no keys": _weights(lambda tensors: tensors.clear()),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


def _fifo(name: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        # the path of a socket must be short
        here = Path.cwd()
        os.chdir(folder)
        try:
            made.bind("s.json")
        finally:
            os.chdir(here)


def _sparse(name: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(2**40)

    return attack


def _sparse_weights(folder: Path) -> None:
    """A safetensors file that is whole by its header."""
    side = 2**38
    start = json.dumps({"x": {"dtype": "U8", "shape": [side], "data_offsets": [0, side]}}).encode()
    start += b" " * (-len(start) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(start).to_bytes(8, "little") + start)
        file.truncate(8 + len(start) + side)


UNREADABLE: dict[str, Callable[[Path], None]] = {
    **{
        f"pipe {name}": _fifo(name)
        for name in (CONFIG, "more.json", "README.md", "model.safetensors", "x.py", "x.bin")
    },
    "socket": _socket,
    **{
        f"device {name}": _link(name, "/dev/zero")
        for name in (CONFIG, "more.json", "notes.txt", "x.py", "x.safetensors")
    },
    "terminal": _link("more.json", "/dev/tty"),
    "loop": _link("more.json", "more.json"),
    "two links": lambda folder: (_link("a.json", "b.json")(folder), _link("b.json", "a.json")(folder))[0],
    "loop of folders": _link("sub/loop", "loop"),
    "dangling": _link("more.json", "gone.json"),
    "dangling code": _link("dropkey.py", "gone.py"),
    "deep list": _write("more.json", "[" * 200_000),
    "deep list, closed": _write("more.json", "[" * 200_000 + "]" * 200_000),
    "deep object": _write(CONFIG, '{"a":' * 200_000 + "1" + "}" * 200_000),
    "deep enough": _write(CONFIG, '{"a":' * 300 + "1" + "}" * 300),
    "sparse configuration": _sparse(CONFIG),
    "sparse index": _sparse("model.safetensors.index.json"),
    "sparse text": _sparse("notes.txt"),
    "sparse code": _sparse("dropkey.py"),
    "sparse image": _sparse("x.png"),
    "sparse weights": _sparse_weights,
    "sparse pickle": _sparse("x.bin"),
}

HARMLESS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "shards": _shards(lambda folder, index: None),
    "a card": _write("README.md", "# Model\n\nevil/x--m.P is only text here, /etc/passwd too.\n"),
    "results": _write("eval_results.json", '{"eval_accuracy": 0.5, "note": "a/b"}'),
    "facts": _write("run_facts.json", '{"command": "python train.py --model google/vit-base-patch16-224"}'),
    "processor": _write(
        PREPROCESSOR,
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.5, 0.5]}',
    ),
    "git": _write(".git/hooks/x.sample", "#!/bin/sh\n"),
    "cache": _write(".cache/huggingface/download/x.metadata", "x"),
    "link inside": lambda folder: (_write("a.md", "x")(folder), _link("b.md", "a.md")(folder))[0],
    "more weights": lambda folder: save_file({"x": np.zeros(3)}, folder / "other.safetensors"),
    "vocabulary": _write("vocab.json", '{"auto_map": 3, "</s>": 4, "a/b--c.D": 5}'),
    "licence": _write("LICENSE", "Apache"),
    "ignore": _write(".gitignore", "*.bin\n"),
}


def apply_json(folder: Path, file: str, change: dict[str, Any]) -> None:
    """Merges `change` into a JSON file of the folder."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    there = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(there.get(key), dict)
        there[key] = there[key] | value if both else value
    path.write_text(json.dumps(there))
