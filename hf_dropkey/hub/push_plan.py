"""The files of a saved folder that go to the Hub: chosen by name, searched for secrets, listed before a push."""

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from ..patching.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG
from ..saved import PROCESSOR_FILES, check_model_folder, is_adapter
from .cards import README, read_readme
from .contents import Entry, entries, leaves, parsed, read_bytes, visible
from .secret_scan import secrets_in


# kinds of file that cannot run anything when they are read; Python files are chosen by name
PUSHED = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model", ".csv", ".png", ".jpg", ".jpeg", ".svg")
PUSHED_NAMES = ("LICENSE", "NOTICE", ".gitattributes")
# files of a model, an adapter or their card, at the top of a folder
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    ADAPTER_CONFIG,
    BASE_CONFIG,
    "adapter_model*.safetensors",
    "adapter_model*.safetensors.index.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    *PROCESSOR_FILES,
    README,
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
    "run_facts.json",
    "trainer_state.json",
    "*_results.json",
)
# large, and without a path in them
UNCHANGED = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")
# folders of a run that are not part of the model
RUN_FOLDERS = ("checkpoint-*", "runs", "wandb", "mlruns", "trackio", ".*", "_*")
# a whole value that is a path from the root, and a home or temporary folder inside a text
ABSOLUTE = re.compile(r"(file:/{2,3}|/(?=[^/\s]+/)|~/|[A-Za-z]:[\\/]|\\\\)[^\n]+")
LOCAL_PATH = re.compile(
    r"(?<![\w/.:-])(?:/(?:home|Users|root|tmp|var|mnt|media|data|scratch|work|workspace|content|kaggle|gpfs|lustre|nfs)"
    r"|[A-Za-z]:\\(?:[^\s\"'\\]+)|~)(?:[/\\][^\s\"'`,;:)\]<>]+)+"
)


@dataclass(frozen=True)
class PlannedFile:
    """A file of a folder in a plan.

    Attributes:
        name: Its path in the folder.
        size: In bytes.
        note: A remark for the list, "" for none.
        content: Content that is sent in place of the file's own; None for the file as it is.
    """

    name: str
    size: int
    note: str = ""
    content: bytes | None = None


@dataclass(frozen=True)
class PushPlan:
    """The files of a folder that a push would send, and those that would stay; `str` of it lists both with sizes."""

    folder: Path
    files: tuple[PlannedFile, ...]
    stays: tuple[PlannedFile, ...]

    def __str__(self) -> str:
        total = sum(file.size for file in self.files)
        lines = [f"{self.folder}: {_files(len(self.files))} to send, {_bytes(total)}"]
        lines += [_line(file) for file in self.files]
        if self.stays:
            lines.append(f"{_files(len(self.stays))} to stay, {_bytes(sum(file.size for file in self.stays))}")
            lines += [_line(file) for file in _by_folder(self.stays)]
        return "\n".join(map(visible, lines))


def plan_push(folder: Path | str, *, include: Sequence[str] = (), token: str | bool | None = None) -> PushPlan:
    """What `push_folder` would send, after all its checks of the folder; nothing is sent and no network is used.

    A model's own files go: weights, configurations, processors, code that `auto_map` names, the card, the results;
    images, tables and texts only if the card refers to them. Paths of this machine in JSON files are cut to their last
    part.

    Args:
        folder: As for `push_folder`.
        include: Patterns of more files to send, such as "figures/*.png"; pickles and programs never go.
        token: As for `push_folder`; the files must not contain it.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: As `push_folder`.
    """
    folder = Path(folder)
    check_pushable(folder)
    wanted, left = chosen(folder, include)
    out = [entry for entry in wanted if entry.leaves]
    if out:
        raise ValueError(
            visible(
                f"{folder / out[0].name} is a link to {out[0].leaves}, outside the folder, so it is not sent; copy the file "
                "into the folder, or delete the link. Nothing was sent"
            )
        )
    check_no_secrets(folder, wanted, token)
    stays = [PlannedFile(entry.name, entry.size, "a link" if entry.leaves else "") for entry in left]
    return PushPlan(folder, tuple(map(_planned, wanted)), tuple(stays))


def _planned(entry: Entry) -> PlannedFile:
    if entry.name == README:
        home = LOCAL_PATH.search(read_bytes(entry).decode("utf-8", "replace"))
        return PlannedFile(entry.name, entry.size, f"names a folder of this machine, {home[0]}" if home else "")
    if entry.kind != ".json" or entry.name in UNCHANGED:
        return PlannedFile(entry.name, entry.size)
    original = read_bytes(entry)
    try:
        found = parsed(original, entry.name)
    except ValueError as error:
        raise ValueError(f"{entry.name} is not JSON ({error}); repair or delete it. Nothing was sent") from error
    notes = [
        f"runs code of another repository, {value}"
        for path, value in leaves(found)
        if "auto_map" in path and isinstance(value, str) and "--" in value
    ]
    cleaned = without_local_paths(found)
    if cleaned == found:
        return PlannedFile(entry.name, entry.size, "; ".join(notes))
    content = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    return PlannedFile(entry.name, len(content), "; ".join(["paths of this machine cut", *notes]), content)


def without_local_paths(value: Any) -> Any:
    """A JSON value whose paths of this machine are cut to their last part, alone or inside a text."""
    if isinstance(value, dict):
        return {without_local_paths(key): without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if ABSOLUTE.fullmatch(value):
        return _last_part(value)
    return LOCAL_PATH.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    return re.split(r"[/\\\\]", path.rstrip("/\\"))[-1]


def _line(file: PlannedFile) -> str:
    return f"  {file.name} ({_bytes(file.size)})" + (f": {file.note}" if file.note else "")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _bytes(size: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]  # shown only
    return f"{size} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _by_folder(files: Sequence[PlannedFile]) -> Iterator[PlannedFile]:
    """Files at the top, then each folder as one line."""
    folders: dict[str, list[PlannedFile]] = {}
    for file in files:
        if "/" in file.name:
            folders.setdefault(file.name.split("/")[0], []).append(file)
        else:
            yield file
    for name, inside in folders.items():
        yield PlannedFile(f"{name}/", sum(file.size for file in inside), _files(len(inside)))


def check_pushable(folder: Path) -> None:
    """Raises as `push_folder` does if a folder is not a complete model or adapter in safetensors."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give the folder it lies in")
    if is_adapter(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder} lacks {ADAPTER_WEIGHTS}; save the adapter again")
        try:
            with safe_open(folder / ADAPTER_WEIGHTS, framework="pt"):
                return
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}); save the adapter again") from error
    check_model_folder(folder)
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has its weights as a pickle, which runs code when it is read; load it and save it again with "
            "save_pretrained, which writes safetensors"
        )


def files_to_push(folder: Path, include: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Paths in a folder that belong on the Hub, and those that do not: pickles, optimizers, logs, other code, images.

    Python files belong if `auto_map` names them or such a file imports them; images, tables and texts if the card
    refers to them or `include` names them.
    """
    wanted, left = chosen(folder, include)
    return [entry.name for entry in wanted], [entry.name for entry in left]


def chosen(folder: Path, include: Sequence[str] = ()) -> tuple[list[Entry], list[Entry]]:
    """As `files_to_push`, with sizes and targets of links."""
    code, card = code_of(folder), _referred_to(folder)
    wanted: list[Entry] = []
    left: list[Entry] = []
    for entry in entries(folder, lenient=True):
        name = PurePosixPath(entry.name)
        part_of_run = any(fnmatchcase(part, pattern) for part in name.parts[:-1] for pattern in RUN_FOLDERS)
        own = any(fnmatchcase(entry.name, pattern) for pattern in MODEL_FILES) and "/" not in entry.name
        requested = entry.name in card or any(fnmatchcase(entry.name, pattern) for pattern in include)
        belongs = entry.name in code or own or (requested and entry.kind in PUSHED and not part_of_run)
        (wanted if belongs else left).append(entry)
    return wanted, left


def _referred_to(folder: Path) -> set[str]:
    """Paths in the folder that its card shows or links to."""
    card = read_readme(folder) or ""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)|(?:src|href)\s*=\s*[\"']([^\"']+)", card)
    return {posixpath.normpath(unquote(one or other).split("#")[0]) for one, other in targets}


def code_of(folder: Path) -> set[str]:
    """Names of the Python files that an `auto_map` in the folder names, and of those that these import."""
    waiting: set[str] = set()
    for name in ("config.json", *PROCESSOR_FILES):
        file = folder / name
        if file.suffix == ".json" and file.is_file():
            for path, value in leaves(json.loads(file.read_text(encoding="utf-8"))):
                refers = "auto_map" in path or ("custom_pipelines" in path and path[-1] == "impl")
                if refers and isinstance(value, str) and "--" not in value:
                    waiting.add(value.split(".")[0])
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        file = folder / f"{module}.py"
        if module.isidentifier() and file.name not in found and file.is_file():
            found.add(file.name)
            waiting |= set(get_relative_imports(file))
    return found


def check_no_secrets(folder: Path, files: Sequence[Entry], token: str | bool | None) -> None:
    """Raises ValueError naming the files that hold a token, a key or a password, or the token in use in any form."""
    own = token if isinstance(token, str) else None if token is False else get_token()
    found = [f"{folder / entry.name} ({', '.join(kinds)})" for entry in files if (kinds := secrets_in(entry, own))]
    if found:
        verb = "holds something that looks like a secret" if len(found) == 1 else "hold what looks like secrets"
        raise ValueError(
            visible(f"{'; '.join(found)} {verb}; remove it, and revoke it if it was ever published. Nothing was sent")
        )
