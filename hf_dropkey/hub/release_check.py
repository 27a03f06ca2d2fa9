"""Whether a checkpoint can be trusted before `trust_remote_code=True`: `check_release` of a folder or a repository.

Nothing of the checkpoint is run and no pickle is opened: code is compared as bytes with this package's releases, every
JSON file is walked to its leaves, weights are read as safetensors and loaded by our own classes, and every other file
must be of a kind that cannot run. docs/limits.md says what this promises and what it does not.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..patching.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..version import __version__
from .cards import README
from .contents import (
    TEXT_LIMIT,
    Entry,
    UnreadableFile,
    digest_of,
    entries,
    folder_digest,
    has_holes,
    parsed,
    read_bytes,
    visible,
)
from .kernel_folder import is_kernel_folder, kernel_problems
from .push import api, clear_errors
from .push_plan import PUSHED, PUSHED_NAMES
from .references import defined_classes, json_problems
from .released_code import code_difference, compare_code
from .space_folder import APP, MODEL, REQUIREMENTS, is_space_folder, space_problems
from .static_folder import GRAPH, PAGE_FILES, is_static_folder, static_problems
from .web_runtime import PACKAGE, SHA256, VERSION
from .weights_check import header, loading_problems, weights_problems


HARMLESS_NAMES = (*PUSHED_NAMES, ".gitignore")
# first bytes of programs, archives and pickles; files of the harmless kinds start otherwise
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
IMAGES = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff"}
TEMPLATES = (".jinja", ".j2")
SCRIPTED = re.compile(r"<script|javascript:|\son[a-z]+\s*=|<foreignobject|<!entity", re.IGNORECASE)
# files that a Trainer leaves in its folder beside the model; only resuming reads them, and `push` does not send them
RUN_FILES = re.compile(
    r"(.*/)?(training_args\.bin|(optimizer|scheduler|scaler|rng_state)[\w.-]*\.(pt|pth|bin))"
    r"|report\.html|report_data\.json|predictions\.csv|mistakes/.*|\.run/.*"
    r"|(.*/)?(runs|wandb|mlruns|trackio)/.*|(.*/)?events\.out\.tfevents\.[^/]*|(.*/)?[^/]*\.log"
)
DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")


@dataclass(frozen=True)
class ReleaseReport:
    """The result of a check.

    Attributes:
        target: The folder or the repository.
        commit: The commit of a repository, to pin; None for a folder.
        version: Versions of this package whose code the checkpoint carries, the installed one if it carries none.
        identical: Python files that are those of this package, to the byte.
        problems: What is wrong, one sentence each; empty if the checkpoint can be trusted.
        diffs: Unified diff of each Python file that differs, by path.
        digest: One hash of all names and contents of a folder, "sha256:..."; None for a repository.
        is_kernel: Whether it is a kernel (`scripts/build_kernel.py`), which has code but no weights.
        is_space: Whether it is the folder of a Space (`hf-dropkey demo --space_folder`), with a model inside.
        is_static: Whether it is a page that computes in the browser (`hf-dropkey demo --static_page`).
    """

    target: str
    commit: str | None
    version: str
    identical: tuple[str, ...]
    problems: tuple[str, ...]
    diffs: dict[str, str]
    digest: str | None = None
    is_kernel: bool = False
    is_space: bool = False
    is_static: bool = False

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
            rest = (
                "it is a kernel, without weights"
                if self.is_kernel
                else "the weights are safetensors that fill the model"
            )
            if self.is_space:
                rest = "app.py starts the demo of the package that requirements.txt pins; the weights fill the model"
            if self.is_static:
                code = f"the page is that of hf_dropkey {self.version}, and what runs its graph is {PACKAGE} {VERSION}"
                rest = "which model the graph was made of was not checked"
            yield f"trusted: {code}; {rest}; nothing else can run"
            if self.commit:
                trust = ", trust_remote_code=True" if self.identical else ""
                yield f'load it with revision="{self.commit}"{trust}'
            if self.digest:
                yield f"digest: {self.digest} (compare later with --digest)"
            return
        yield from (f"problem: {problem}" for problem in self.problems)
        if self.is_static:
            yield f"{len(self.problems)} problems, so do not open it"
            return
        permission = "allow_all_kernels" if self.is_kernel else "trust_remote_code"
        yield f"{code}; {len(self.problems)} problems, so do not load it with {permission}=True"
        for difference in self.diffs.values():
            yield from difference.splitlines()


def check_release(
    target: Path | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    digest: str | None = None,
) -> ReleaseReport:
    """Checks a checkpoint folder, or a repository of the Hub; only files that cannot run are downloaded.

    Args:
        target: Folder, or "owner/name" of a repository.
        revision: Branch, tag or commit of a repository; default: the newest commit of "main".
        token: For a private repository; default: the token of `hf auth login` or HF_TOKEN.
        digest: The digest that an earlier check of the folder printed; the folder must not have changed since.

    Raises:
        NotADirectoryError: The target is a file.
        FileNotFoundError, ValueError, PermissionError, ConnectionError: The folder, repository or revision does not
            exist, or cannot be read: a pipe, a device, a link in a circle, JSON too deep, a file sparse or too large.
    """
    if digest is not None and not DIGEST.fullmatch(digest):
        raise ValueError(
            f"--digest {digest} is not a digest; give what an earlier check printed, sha256: and 64 digits"
        )
    folder, commit, names = _located(target, revision, token)
    if commit is not None and digest is not None:
        raise ValueError("--digest is for folders; a repository is pinned by its commit, with --revision")
    if commit is None and not is_space_folder(names) and (inside := _models_inside(names)):
        shown = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
        raise FileNotFoundError(
            f"{target} holds no model but folders with one: {shown}; check one of these, such as {folder / inside[0]}"
        )
    files = {entry.name: entry for entry in entries(folder) if commit is None or entry.name in names}
    kept = {name: entry for name, entry in files.items() if not entry.leaves}
    if commit is None and is_kernel_folder(names):
        return _checked_kernel(target, files, digest)
    if commit is None and is_space_folder(names):
        return _checked_space(Path(target), files, digest)
    if commit is None and is_static_folder(names):
        return _checked_static(target, files, digest)
    python = {name: entry for name, entry in kept.items() if name.endswith(".py")}
    code = compare_code({name: digest_of(entry) for name, entry in python.items()})
    classes = {
        PurePosixPath(name).stem: defined_classes(read_bytes(kept[name])) for name in code.identical if "/" not in name
    }
    run = [name for name in names if RUN_FILES.fullmatch(name)] if commit is None and _is_run(names) else []
    problems = [f"{name} {reason}" for name, reason in code.problems.items()]
    for name in sorted(set(names) - set(python) - set(run)):
        problems += _file_problems(name, files.get(name))
    contents, unread = _parsed(kept)
    problems += unread
    for name, found in contents.items():
        # no loader reads what a run keeps for itself
        if name not in run:
            problems += json_problems(name, found, classes, code=bool(python))
    if run:
        problems.append(_run_problem(run))
    problems += _model_problems(folder, kept, contents, classes, complete=not problems)
    made = None
    if commit is None:
        made = folder_digest(list(kept.values()))
        problems += _digest_problems(made, digest)
    diffs = {name: code_difference(name, read_bytes(python[name])) for name in python if name not in code.identical}
    version = " and ".join(code.versions) or __version__
    return ReleaseReport(str(target), commit, version, code.identical, tuple(problems), diffs, made)


def _checked_kernel(target: Path | str, files: Mapping[str, Entry], digest: str | None) -> ReleaseReport:
    """The result for a folder of `scripts/build_kernel.py`: the code is that of this package, the rest cannot run."""
    kept = {name: entry for name, entry in files.items() if not entry.leaves}
    built = {name: read_bytes(entry) for name, entry in kept.items() if name.startswith("build/")}
    problems = list(kernel_problems(built))
    wrong = {name for name in built if any(problem.startswith(f"{name} ") for problem in problems)}
    for name, entry in files.items():
        if name not in built:
            problems += _file_problems(name, entry)
    made = folder_digest(list(kept.values()))
    problems += _digest_problems(made, digest)
    identical = tuple(name for name in built if name.endswith(".py") and name not in wrong)
    return ReleaseReport(str(target), None, __version__, identical, tuple(problems), {}, made, is_kernel=True)


def _checked_space(folder: Path, files: Mapping[str, Entry], digest: str | None) -> ReleaseReport:
    """The result for the folder of a Space: its own three files, the model inside, and examples that cannot run."""
    kept = {name: entry for name, entry in files.items() if not entry.leaves}
    own = {name: read_bytes(kept[name]) for name in (APP, REQUIREMENTS, README) if name in kept}
    problems = list(space_problems(own))
    model = check_release(folder / MODEL)
    problems += [f"{MODEL}: {problem}" for problem in model.problems]
    for name, entry in files.items():
        if name == APP or name.startswith(f"{MODEL}/"):
            continue
        problems += _file_problems(name, entry)
    made = folder_digest(list(kept.values()))
    problems += _digest_problems(made, digest)
    identical = tuple(f"{MODEL}/{name}" for name in model.identical)
    diffs = {f"{MODEL}/{name}": text for name, text in model.diffs.items()}
    return ReleaseReport(str(folder), None, model.version, identical, tuple(problems), diffs, made, is_space=True)


def _checked_static(target: Path | str, files: Mapping[str, Entry], digest: str | None) -> ReleaseReport:
    """The result for a page that computes in the browser: its code and its runtime to the byte, data that cannot run."""
    kept = {name: entry for name, entry in files.items() if not entry.leaves}
    problems = list(static_problems(kept))
    for name, entry in files.items():
        if name not in (*PAGE_FILES, *SHA256, GRAPH) or entry.leaves:
            problems += _file_problems(name, entry)
    made = folder_digest(list(kept.values()))
    problems += _digest_problems(made, digest)
    return ReleaseReport(str(target), None, __version__, (), tuple(problems), {}, made, is_static=True)


def _digest_problems(made: str, wanted: str | None) -> Iterator[str]:
    """What is wrong if a folder must have the digest of an earlier check, and now has another."""
    if wanted is not None and made.removeprefix("sha256:") != wanted.removeprefix("sha256:"):
        yield f"the digest is {made}, not {wanted}: the folder has changed since"


def _located(target: Path | str, revision: str | None, token: str | bool | None) -> tuple[Path, str | None, list[str]]:
    """The folder to check, the commit of a repository, and the names of all files."""
    folder = Path(target)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{target} is a folder, which has no revisions; leave out --revision")
        return folder, None, [entry.name for entry in entries(folder)]
    if folder.exists() or folder.is_symlink():
        raise NotADirectoryError(f"{folder} is a file; give the folder it lies in")
    # pathlib drops a leading "./", which no repository's name has
    if len(PurePosixPath(str(target)).parts) > 2 or str(target).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{target} is neither a folder nor the name of a repository, 'owner/name'; check it")
    return _download(str(target), revision, token)


def _models_inside(names: Collection[str]) -> list[str]:
    """The sub-folders with a model of a folder that has none itself; those outermost, without checkpoints of them."""
    if "config.json" in names or "adapter_config.json" in names:
        return []
    homes = sorted(str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "config.json")
    return [home for home in homes if not any(str(above) in homes for above in PurePosixPath(home).parents)]


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, str, list[str]]:
    """The files of a repository that may be read, the commit they are of, and the names of all its files."""
    with clear_errors(repo_id, f"{repo_id} was not checked"):
        about = api.model_info(repo_id, revision=revision, token=token, files_metadata=True)
        siblings = about.siblings or []
        too_large = [
            one.rfilename
            for one in siblings
            if (one.size or 0) > TEXT_LIMIT and not one.rfilename.endswith(".safetensors")
        ]
        if too_large:
            raise UnreadableFile(
                visible(
                    f"{repo_id} was not checked: {too_large[0]} has more than {TEXT_LIMIT} bytes and is not weights"
                )
            )
        names = sorted(one.rfilename for one in siblings)
        readable = [
            _escaped(name)
            for name in names
            if PurePosixPath(name).suffix in (*PUSHED, ".py") or Path(name).name in HARMLESS_NAMES
        ]
        folder = api.snapshot_download(repo_id, revision=about.sha, token=token, allow_patterns=readable)
    return Path(folder), str(about.sha), names


def _escaped(name: str) -> str:
    """A pattern that only this name fits."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _parsed(kept: Mapping[str, Entry]) -> tuple[dict[str, Any], list[str]]:
    """The contents of the JSON files, and a problem for each file that is not JSON."""
    found, problems = {}, []
    for name, entry in kept.items():
        if entry.kind.lower() != ".json":
            continue
        try:
            found[name] = parsed(read_bytes(entry), name)
        except UnreadableFile:
            raise
        except ValueError as error:
            problems.append(f"{name} is not JSON ({error})")
    return found, problems


def _model_problems(
    folder: Path,
    kept: Mapping[str, Entry],
    contents: Mapping[str, Any],
    classes: Mapping[str, Collection[str]],
    *,
    complete: bool,
) -> Iterator[str]:
    """Missing files, and weights that the loader would not take as they are, in the folder and its sub-folders."""
    homes = sorted({str(PurePosixPath(name).parent) for name in contents if PurePosixPath(name).name == "config.json"})
    if "config.json" not in contents and ADAPTER_CONFIG in contents:
        yield from _adapter_problems(kept, contents[ADAPTER_CONFIG])
    elif "config.json" not in contents:
        yield "there is no config.json at the top, so this is not a saved model"
    for home in homes:
        inside = "" if home == "." else home
        problems = list(weights_problems(inside, kept, contents))
        yield from problems
        config = contents[PurePosixPath(inside, "config.json").as_posix()]
        if isinstance(config, dict) and complete and not problems:
            found = {name: entry for name, entry in kept.items() if str(PurePosixPath(name).parent) == home}
            where = f"{inside}: " if inside else ""
            yield from (f"{where}{problem}" for problem in loading_problems(folder / inside, config, found))
    yield from _missing_code(kept, classes)


def _adapter_problems(kept: Mapping[str, Entry], settings: Any) -> Iterator[str]:
    """What an adapter lacks, and the model that is loaded with it, which this check has not seen."""
    if ADAPTER_WEIGHTS not in kept:
        yield f"there are no weights in safetensors: {ADAPTER_WEIGHTS} is not there"
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    yield visible(
        f"this is an adapter of {base or 'a model that it does not name'}, which is loaded with it and was not checked: "
        "check that too, and load the adapter with load_classifier or peft, which run no code of it"
    )


def _missing_code(kept: Mapping[str, Entry], classes: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Files that the code at the top imports and that are not there."""
    needed = set()
    for module in classes:
        source = read_bytes(kept[f"{module}.py"]).decode("utf-8", "replace")
        if module != "__init__":
            needed |= set(re.findall(r"^\s*from\s+\.(\w+)\s+import", source, re.MULTILINE))
    gone = sorted(module for module in needed if f"{module}.py" not in kept)
    yield from (f"{module}.py is not there, though other code imports it" for module in gone)


def _is_run(names: list[str]) -> bool:
    """Whether a `Trainer` wrote into the folder: a state beside the model, or checkpoints."""
    return any(name == "trainer_state.json" or re.match(r"checkpoint-[0-9]+/", name) for name in names)


def _run_problem(names: list[str]) -> str:
    """One sentence about all files that a training run left."""
    shown = f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    belongs = "belongs" if len(names) == 1 else "belong"
    return (
        f"{shown} {belongs} to a training run, so this is a run's folder and not a release: they are pickles and logs "
        "that only resuming that run reads, and `hf-dropkey push` does not send them. If the run is yours, nothing is "
        "wrong; check what was pushed, or a folder that save_pretrained wrote"
    )


def _file_problems(name: str, entry: Entry | None) -> Iterator[str]:
    """Problems of a file that is not Python: its kind, or content of another kind."""
    kind = PurePosixPath(name).suffix
    if entry is not None and entry.leaves:
        yield f"{name} is a link to {entry.leaves}, outside the folder"
        return
    if kind in TEMPLATES:
        yield f"{name} is a template, a program that runs where the model is used to chat; no model of hf_dropkey has one"
        return
    if kind not in PUSHED and PurePosixPath(name).name not in HARMLESS_NAMES:
        yield f"{name} is of a kind that no model needs and that can run code when it is read; delete it"
        return
    if entry is None:
        yield f"{name} was not downloaded, so nothing is known about it"
        return
    if entry.executable:
        yield f"{name} is marked as executable"
    if kind == ".safetensors":
        if has_holes(entry):
            raise UnreadableFile(visible(f"{name} is a sparse file: {entry.size} bytes, of which the disk holds few"))
        try:
            header(entry)
        except ValueError as error:
            yield f"{name} {error}"
        return
    content = read_bytes(entry)
    disguised = next((what for magic, what in MAGIC.items() if content.startswith(magic)), None)
    if disguised:
        yield f"{name} is {disguised}, whatever its name says"
    elif kind in IMAGES:
        if not content.startswith(IMAGES[kind]):
            yield f"{name} is not an image, whatever its name says"
    elif kind != ".model":
        yield from _disguised_text(name, kind, content)


def _disguised_text(name: str, kind: str, content: bytes) -> Iterator[str]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        yield f"{name} is not text, whatever its name says"
        return
    if kind == ".svg" and SCRIPTED.search(text):
        yield f"{name} is a drawing with a script, which browsers run"
