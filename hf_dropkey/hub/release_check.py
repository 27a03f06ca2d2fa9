"""Whether a checkpoint can be trusted before `trust_remote_code=True`: `check_release` of a folder or a repository.

Nothing of the checkpoint is run and no pickle is opened: code is compared as bytes with the files of this installed
package, weights are read as safetensors, and every other file must be of a kind that cannot run. May import
huggingface_hub, safetensors and its neighbours; no model.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from .. import models
from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from ..saved import check_model_folder
from ..version import __version__
from .push import PUSHED, PUSHED_NAMES, api, clear_errors


CODE_FOLDER = Path(str(models.__file__)).parent
# what git and huggingface_hub keep beside a checkpoint; no loader reads it
SKIPPED = (".git", ".cache")
HARMLESS_NAMES = (*PUSHED_NAMES, ".gitignore")
# first bytes of programs, archives and pickles, which no file of a harmless kind has
MAGIC = {
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"#!": "a script",
    b"PK\x03\x04": "an archive, as torch's pickles are",
    b"\x1f\x8b": "an archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
IMAGES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class ReleaseReport:
    """What was found.

    Attributes:
        target: The folder or the repository.
        commit: The commit of a repository, to pin; None for a folder.
        version: Version of this package, whose code was compared with.
        identical: Python files that are those of this package, to the byte.
        problems: What is wrong, one sentence each; empty if the checkpoint can be trusted.
        diffs: Unified diff of each Python file that is not, by path.
    """

    target: str
    commit: str | None
    version: str
    identical: tuple[str, ...]
    problems: tuple[str, ...]
    diffs: dict[str, str]

    @property
    def trusted(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(map(visible, self._lines()))

    def _lines(self) -> Iterator[str]:
        yield f"{self.target}" + (f" at commit {self.commit}" if self.commit else "")
        code = f"{len(self.identical)} Python files are those of hf_dropkey {self.version}"
        if self.trusted:
            code = code if self.identical else "no code"
            yield f"trusted: {code}; weights are readable safetensors; nothing else can run"
            if self.commit:
                trust = ", trust_remote_code=True" if self.identical else ""
                yield f'load it with revision="{self.commit}"{trust}'
            return
        yield from (f"problem: {problem}" for problem in self.problems)
        yield f"{code}; {len(self.problems)} problems, so do not load it with trust_remote_code=True"
        for difference in self.diffs.values():
            yield from difference.splitlines()


def visible(line: str) -> str:
    """A line in which no control character can hide or colour what stands there."""
    return "".join(char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in line)


def check_release(
    target: Path | str, *, revision: str | None = None, token: str | bool | None = None
) -> ReleaseReport:
    """Checks a checkpoint folder, or a repository of the Hub, of which only files that cannot run are downloaded.

    Args:
        target: Folder, or "owner/name" if there is no such folder.
        revision: Branch, tag or commit of a repository; default: the newest commit of "main".
        token: For a private repository; default: what `hf auth login` or HF_TOKEN left.

    Raises:
        NotADirectoryError: The target is a file.
        FileNotFoundError, ValueError, PermissionError, ConnectionError: There is no such folder, repository or revision, or
            it cannot be read.
    """

    folder, commit = Path(target), None
    names = None
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give the folder it lies in")
    if not folder.is_dir():
        if len(PurePosixPath(str(target)).parts) > 2:
            raise FileNotFoundError(f"{target} is no folder, and no name of a repository, 'owner/name'")
        folder, commit, names = _download(str(target), revision, token)
    if names is None:
        files = (
            path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()
        )
        names = [file.as_posix() for file in files if file.parts[0] not in SKIPPED]
    problems = [*_model_problems(folder), *_configured_code(folder, names)]
    identical, diffs = [], {}
    for name in names:
        if not name.endswith(".py"):
            problems += _file_problems(folder, name, linked=commit is None)
            continue
        difference = code_difference(folder / name)
        if difference is None:
            identical.append(name)
        else:
            diffs[name] = difference
            known = (CODE_FOLDER / Path(name).name).is_file()
            problems.append(
                f"{name} differs from hf_dropkey {__version__}, see the diff"
                if known
                else f"{name} is no code of hf_dropkey"
            )
    return ReleaseReport(str(target), commit, __version__, tuple(identical), tuple(problems), diffs)


def code_difference(file: Path) -> str | None:
    """None if a Python file is that of this package, to the byte; else the unified diff to it."""
    own = CODE_FOLDER / file.name
    content, expected = file.read_bytes(), own.read_bytes() if own.is_file() else b""
    if own.is_file() and hashlib.sha256(content).digest() == hashlib.sha256(expected).digest():
        return None
    before, after = (part.decode("utf-8", "backslashreplace").splitlines() for part in (expected, content))
    name = f"hf_dropkey/models/{file.name}" if own.is_file() else "(not in hf_dropkey)"
    lines = list(difflib.unified_diff(before, after, name, str(file.name), lineterm=""))
    return "\n".join(lines or [f"{file.name}: only line ends differ"])


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, str, list[str]]:
    """The files of a repository that may be looked at, the commit they are of, and the names of all its files."""
    with clear_errors(repo_id, f"{repo_id} was not checked"):
        about = api.model_info(repo_id, revision=revision, token=token)
        names = sorted(sibling.rfilename for sibling in about.siblings or [])
        looked_at = [
            name for name in names if name.lower().endswith((*PUSHED, ".py")) or Path(name).name in HARMLESS_NAMES
        ]
        folder = api.snapshot_download(repo_id, revision=about.sha, token=token, allow_patterns=looked_at)
    return Path(folder), str(about.sha), names


def _model_problems(folder: Path) -> Iterator[str]:
    """What is missing or damaged, and weights that are pickles."""
    try:
        check_model_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        yield str(error)
        return
    except (AttributeError, KeyError, TypeError) as error:
        yield f"config.json or the index of the weights has a form that no model has ({error!r})"
        return
    for file in sorted(folder.glob("**/*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                opened.keys()
        except SafetensorError as error:
            yield f"{file.relative_to(folder)} is damaged ({error})"
    if not list(folder.glob("*.safetensors")):
        yield "there are no weights in safetensors"


def _configured_code(folder: Path, names: list[str]) -> Iterator[str]:
    """Settings that make a loader fetch code from another place."""
    for name in names:
        if not name.endswith(".json") or not (folder / name).is_file():
            continue
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            yield f"{name} is no JSON ({error})"
            continue
        if isinstance(found, dict):
            yield from (f"{name}: {reason}" for reason in _foreign_code(found))


def _foreign_code(config: dict[str, Any]) -> Iterator[str]:
    auto_map = config.get("auto_map") or {}
    for auto, value in auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]:
        for reference in value if isinstance(value, list | tuple) else [value]:
            if isinstance(reference, str) and "--" in reference:
                yield f"{auto} is code of another repository, {reference}"
    pipelines = config.get("custom_pipelines") or {}
    # the files of this package's own are compared like all others
    if pipelines and not (
        isinstance(pipelines, dict) and all(map(_is_own_pipeline, *zip(*pipelines.items(), strict=True)))
    ):
        yield f"it brings pipelines with code of their own, {pipelines}"
    for field in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(field) or ""):
            yield f"{field} is a kernel to download, {config[field]}"


def _is_own_pipeline(task: str, about: Any) -> bool:
    """Whether an entry of `custom_pipelines` names a class of this package's files, and no other model class."""
    own = DropKeyHoiConfig.family_pipelines.get(task)
    return (
        own is not None
        and isinstance(about, dict)
        and about.get("impl") == own["impl"]
        and about.get("pt") == own["pt"]
    )


def _file_problems(folder: Path, name: str, *, linked: bool) -> Iterator[str]:
    """What is wrong with a file that is no Python: its kind, or a content that is of another kind."""
    path, kind = folder / name, PurePosixPath(name).suffix.lower()
    if kind not in PUSHED and PurePosixPath(name).name not in HARMLESS_NAMES:
        yield f"{name} is of a kind that no model needs and that can run code when it is read; delete it"
        return
    # the cache of huggingface_hub is made of links
    if linked and path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        yield f"{name} is a link to {path.resolve()}, outside the folder"
        return
    with path.open("rb") as opened:
        start = opened.read(8)
    if linked and path.stat().st_mode & 0o111:
        yield f"{name} is marked as executable"
    # safetensors begin with the length of their header, any eight bytes
    disguised = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    if kind != ".safetensors" and disguised:
        yield f"{name} is {disguised}, whatever its name says"
    elif kind not in (".safetensors", ".model", *IMAGES):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield f"{name} is no text, whatever its name says"
