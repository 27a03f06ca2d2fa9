"""A folder for `attn_implementation="owner/kernel"`: our attention as a kernel of the Hub, for stock models.

What the `kernels` library of Hugging Face reads: `build/<variant>/`, with `__init__.py`, `metadata.json` (a name, an id, a
digest of each file) and flat files, here those of `hf_dropkey/models/` that the entry needs, to the byte. There is
nothing to compile, so the two variants differ in the metadata alone.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .. import models
from ..version import __version__


NAME = "dropkey-attention"
ENTRY = "hub_kernel"
INIT = f'''"""DropKey for any model of Transformers: see `{ENTRY}`."""

from .{ENTRY} import flash_attn_forward, supports_flash_attn


__all__ = ["flash_attn_forward", "supports_flash_attn"]
'''
# of the code, which Transformers requests where it is not told another one
KERNEL_VERSION = 1
BACKENDS = ("cpu", "cuda")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- attention
- dropkey
---

# DropKey attention

[DropKey](https://arxiv.org/abs/2208.02646) drops attention scores before the softmax. This kernel brings it to any model
of Transformers that takes `attn_implementation`, without another package and without a change to the model:

```python
import torch
from transformers import AutoConfig, AutoModelForImageClassification

config = AutoConfig.from_pretrained("google/vit-base-patch16-224", attention_probs_dropout_prob=0.1)
model = AutoModelForImageClassification.from_pretrained(
    "google/vit-base-patch16-224", config=config, attn_implementation="{repo_id}", allow_all_kernels=True
)
```

**The model's own ratio of attention dropout now means DropKey.** `attention_probs_dropout_prob` (in some models
`attention_dropout`) is the drop ratio of DropKey, the same in all layers, and dropout is no longer applied to the attention
weights. A model that is trained with attention dropout therefore trains differently with this kernel. At 0, and in eval
mode, the kernel is `sdpa`, to the bit.

It runs on CPUs and on NVIDIA GPUs. It has not run on a GPU. Kernels from outside `kernels-community` are code that you
trust: `allow_all_kernels=True` says so.

Code of hf_dropkey {version}, file by file. `hf-dropkey check FOLDER` compares it with the installed package.
Schedules over depth, other patterns and the report of what was reached are in that package.
"""


def needed_modules(entry: str = ENTRY) -> list[str]:
    """The modules of `hf_dropkey/models` that a module imports, at any depth, itself among them, by name."""
    found: set[str] = set()
    left = [entry]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += re.findall(r"^from \.(\w+) import", _source(module).decode(), re.MULTILINE)
    return sorted(found)


def _source(module: str) -> bytes:
    return (Path(models.__file__).parent / f"{module}.py").read_bytes()


def metadata(backend: str, files: dict[str, bytes]) -> bytes:
    """The `metadata.json` of a variant with these files."""
    digests = {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in sorted(files.items())
    }
    whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    content = {
        # the name that Python imports the code by: other code has another one
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole[:12]}",
        "name": NAME,
        "version": KERNEL_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def build_files() -> dict[str, bytes]:
    """All files under `build/`, by their path in the kernel's folder."""
    files = {"__init__.py": INIT.encode(), **{f"{module}.py": _source(module) for module in needed_modules()}}
    found = {}
    for backend in BACKENDS:
        home = PurePosixPath("build", f"torch-{backend}")
        for name, content in (files | {"metadata.json": metadata(backend, files)}).items():
            found[str(home / name)] = content
    return found


def build_kernel(folder: Path, repo_id: str) -> list[Path]:
    """Writes the folder of a kernel, ready to upload as a repository of the type "kernel".

    Args:
        folder: New or empty.
        repo_id: "owner/name" that the card names.

    Returns:
        The files, in order.

    Raises:
        ValueError: `repo_id` has another form, or names that Transformers would take for its own flash attention.
        FileExistsError: The folder has files.
    """
    if not REPOSITORY.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not the name of a repository; choose for example 'owner/{NAME}'")
    if "flash" in repo_id.lower():
        raise ValueError(
            f"{repo_id!r} has 'flash' in it, by which Transformers recognises kernels without masks; choose for example "
            f"'owner/{NAME}'"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    card = CARD.format(repo_id=repo_id, version=__version__)
    written = []
    for name, content in {"README.md": card.encode(), **build_files()}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        written.append(file)
    return written


def is_kernel_folder(names: list[str]) -> bool:
    """Whether these are the files of a kernel, not of a model."""
    return "config.json" not in names and any(re.fullmatch(r"build/[^/]+/metadata\.json", name) for name in names)


def kernel_problems(contents: dict[str, bytes]) -> Iterator[str]:
    """What differs from the kernel that the installed package builds, one sentence for each file under `build/`."""
    expected = build_files()
    for name in sorted(expected.keys() - contents.keys()):
        yield f"{name} is not there, though the kernel needs it"
    for name, content in sorted(contents.items()):
        if name not in expected:
            yield f"{name} is not a file of the kernel of hf_dropkey {__version__}"
        elif content != expected[name]:
            yield f"{name} differs from the kernel of hf_dropkey {__version__}"
