"""The files of a folder from an untrusted source: found without following links, read without trusting sizes.

A checkpoint can hold pipes that never end, links to devices or in circles, sparse files whose size is larger than any
disk, and JSON so deep that a parser gives up. Everything that reads one uses these functions.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


# what git and huggingface_hub keep beside a checkpoint; no loader reads it
SKIPPED = (".git", ".cache")
# a configuration, a card or a vocabulary; the largest tokenizer.json in use is below 40 MiB
TEXT_LIMIT = 64 * 2**20
FILES_LIMIT = 100_000
DEPTH_LIMIT = 100
# sparse files below this size are read like others
HOLES_FROM = 64 * 2**20
SPECIAL = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


class UnreadableFile(ValueError):
    """A file that cannot be read, so that its folder cannot be checked."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder, or a link to one.

    Attributes:
        name: Its path in the folder, with "/".
        path: Where its content lies, links resolved.
        size: In bytes.
        leaves: Target of a link that leaves the folder or leads to a folder; None for all others.
        executable: Whether it is marked as a program.
    """

    name: str
    path: Path
    size: int
    leaves: str | None = None
    executable: bool = False

    @property
    def kind(self) -> str:
        """The ending of its name, as it is written."""
        return PurePosixPath(self.name).suffix


def visible(line: str) -> str:
    """A line with control characters escaped, so that they cannot hide or colour text."""
    return "".join(char if char.isprintable() or char == "\t" else ascii(char)[1:-1] for char in line)


def entries(folder: Path, *, lenient: bool = False) -> list[Entry]:
    """Every file in a folder, by name; `.git` and `.cache` at its top are left out.

    Links are followed to a file in the folder, and from the cache of huggingface_hub to a blob of the same repository.
    With `lenient`, what is not a file is listed like a link that leaves the folder.

    Raises:
        UnreadableFile: There is a pipe, a socket, a device, a link in a circle or to nothing, or too many files.
        OSError: A folder cannot be listed.
    """
    found: list[Entry] = []
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as listed:
            for one in listed:
                path = Path(one.path)
                if one.is_dir(follow_symlinks=False):
                    if path.parent != folder or one.name not in SKIPPED:
                        waiting.append(path)
                    continue
                try:
                    found.append(_entry(folder, path))
                except UnreadableFile:
                    if not lenient:
                        raise
                    found.append(Entry(path.relative_to(folder).as_posix(), path, 0, "no file"))
                if len(found) > FILES_LIMIT:
                    raise UnreadableFile(f"{folder} holds more than {FILES_LIMIT} files; give the folder of one model")
    return sorted(found, key=lambda entry: entry.name)


def _entry(folder: Path, path: Path) -> Entry:
    name = path.relative_to(folder).as_posix()
    try:
        state = path.stat()
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, RuntimeError) as error:
        reason = "its links lead in a circle or to nothing" if path.is_symlink() else str(error)
        raise UnreadableFile(visible(f"{folder / name} cannot be read: {reason}; delete it")) from error
    for is_special, what in SPECIAL.items():
        if is_special(state.st_mode):
            raise UnreadableFile(visible(f"{folder / name} is {what}, not a file; delete it"))
    leaves = None
    if path.is_symlink():
        home = Path(os.path.realpath(folder))
        inside = real.is_relative_to(home) and not set(real.relative_to(home).parts[:1]) & set(SKIPPED)
        if stat.S_ISDIR(state.st_mode) or not (inside or _is_blob(folder, real)):
            leaves = str(real)
    linked = path.is_symlink() and not leaves
    # blobs of a cache carry whatever mode the file system gives
    executable = bool(state.st_mode & 0o111) and not linked
    return Entry(name, real, state.st_size, leaves, executable)


def _is_blob(folder: Path, real: Path) -> bool:
    """Whether a file lies where `snapshot_download` puts the contents of the repository whose snapshot `folder` is."""
    home = Path(os.path.realpath(folder))
    repository = home.parent.parent
    snapshot = home.parent.name == "snapshots" and repository.name.startswith(("models--", "spaces--", "datasets--"))
    return snapshot and real.parent == repository / "blobs"


def has_holes(entry: Entry) -> bool:
    """Whether a file is sparse: far larger than the space that it takes on the disk."""
    blocks = getattr(entry.path.stat(), "st_blocks", None)
    # compressed file systems save a factor on weights too, but not this one
    return blocks is not None and entry.size > HOLES_FROM and blocks * 512 * 16 < entry.size


def read_bytes(entry: Entry, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a file that has to be small.

    Raises:
        UnreadableFile: It is larger than `limit` bytes.
    """
    with _opened(entry) as opened:
        content: bytes = opened.read(limit + 1)
    if len(content) > limit:
        raise UnreadableFile(
            visible(f"{entry.name} has {entry.size} bytes; such a file may have at most {limit}; delete it")
        )
    return content


def digest_of(entry: Entry) -> str:
    """SHA-256 of a file.

    Raises:
        UnreadableFile: It is sparse.
    """
    if has_holes(entry):
        raise UnreadableFile(
            visible(f"{entry.name} is a sparse file: {entry.size} bytes, of which the disk holds few; delete it")
        )
    hashed = hashlib.sha256()
    with _opened(entry) as opened:
        while block := opened.read(2**20):
            hashed.update(block)
    return hashed.hexdigest()


def folder_digest(found: list[Entry]) -> str:
    """One hash of names and contents of all files, "sha256:..."; a copy of the folder has the same."""
    lines = sorted(f"{digest_of(entry)}  {json.dumps(entry.name)}\n" for entry in found)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _opened(entry: Entry) -> Any:
    # a pipe that took the file's place since it was listed must not be waited for
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(entry.path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UnreadableFile(visible(f"{entry.name} is not a file any more; check again"))
    return os.fdopen(number, "rb")


class RepeatedKey(ValueError):
    """A JSON object with one key twice, of which some parsers take the first and others the last."""


def parsed(content: bytes, name: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is not JSON, or has a key twice.
        UnreadableFile: It is nested too deeply for the parser.
    """
    too_deep = UnreadableFile(visible(f"{name} is nested too deeply for a configuration; delete it"))
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise too_deep from error
    if any(len(path) > DEPTH_LIMIT for path, _ in leaves(found)):
        raise too_deep
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else ["a key"]
        raise RepeatedKey(f"it has {', '.join(twice)} twice in one object")
    return found


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a JSON value that holds no others, and every empty object, with its path of keys and numbers."""
    waiting: list[tuple[tuple[str, ...], Any]] = [(path, value)]
    while waiting:
        at, one = waiting.pop()
        # whatever lies deeper than in any configuration is a leaf, because the paths alone would fill the memory
        if len(at) > DEPTH_LIMIT:
            yield at, one
        elif isinstance(one, dict) and one:
            waiting += [((*at, key), inner) for key, inner in one.items()]
        elif isinstance(one, list) and one:
            waiting += [((*at, str(number)), inner) for number, inner in enumerate(one)]
        else:
            yield at, one
