"""Recognises our Python files by SHA-256: the code of every released version, so that old checkpoints stay trusted.

`released_code.json` is made from git by scripts/write_released_code.py; the present version's code is hashed as
installed.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from .. import models
from ..version import __version__


CODE_FOLDER = Path(str(models.__file__)).parent
RELEASES = Path(__file__).with_suffix(".json")
INSTALLED = f"{__version__} as installed"


@cache
def known_code() -> dict[str, dict[str, str]]:
    """SHA-256 of each file that travels with checkpoints, by version and name; first the installed version."""
    installed = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in CODE_FOLDER.glob("*.py")}
    released = json.loads(RELEASES.read_text(encoding="utf-8"))
    versions = {version: dict(release["files"]) for version, release in released.items()}
    same = [version for version, files in versions.items() if files == installed]
    # a release that is installed goes by its own name
    return {same[0]: installed, **versions} if same else {INSTALLED: installed, **versions}


@dataclass(frozen=True)
class CodeReport:
    """The origin of the code in a checkpoint.

    Attributes:
        versions: Versions of this package that have all its files; empty without such a version, or without files.
        identical: Files of one of these versions, or of any version if `versions` is empty.
        problems: What is wrong, one sentence each.
    """

    versions: tuple[str, ...]
    identical: tuple[str, ...]
    problems: dict[str, str]


def compare_code(digests: Mapping[str, str]) -> CodeReport:
    """Finds the version that all Python files of a checkpoint are of, by the SHA-256 of each path.

    Files of several versions side by side were never tried together, so they are a problem even if each is ours.
    """
    known = known_code()
    of = {
        name: {version for version, files in known.items() if files.get(PurePosixPath(name).name) == digest}
        for name, digest in digests.items()
    }
    identical = tuple(name for name, versions in of.items() if versions)
    common = [version for version in known if all(version in versions for versions in of.values())]
    problems = {
        name: f"differs from hf_dropkey {', '.join(known)}, see the diff"
        if any(PurePosixPath(name).name in files for files in known.values())
        else "is not code of hf_dropkey"
        for name, versions in of.items()
        if not versions
    }
    if digests and not common and not problems:
        mixed = sorted({min(versions, key=list(known).index) for versions in of.values()})
        first = next(iter(of))
        problems[first] = (
            f"and the other Python files are of several versions of hf_dropkey ({', '.join(mixed)}), never tried "
            "together; save the model again with one version"
        )
    return CodeReport(tuple(common) if digests else (), identical, problems)


def code_difference(name: str, content: bytes) -> str:
    """The unified diff of a Python file to the installed file of its name."""
    own = CODE_FOLDER / PurePosixPath(name).name
    expected = own.read_bytes() if own.is_file() else b""
    before, after = (part.decode("utf-8", "backslashreplace").splitlines() for part in (expected, content))
    title = f"hf_dropkey/models/{own.name}" if own.is_file() else "(not in hf_dropkey)"
    lines = list(difflib.unified_diff(before, after, title, own.name, lineterm=""))
    return "\n".join(lines or [f"{own.name}: only line ends differ"])
