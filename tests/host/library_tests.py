"""Gets Transformers' own common tests: the sdist that matches the installed version, unpacked as a Python package.

The tests are neither in the wheel nor copied into this repository. pip downloads the source archive once and checks it
against the index; the hash is kept beside the archive and checked on every later use, so a second run needs no network.
Imports the standard library only.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath


PACKAGE = "transformers_tests"

# what the archive leaves out but its test modules import. none of it is reached by an image model.
STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False, 'output_hidden_states': True, 'output_attentions': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5, 'architectures': ['AModel'], 'problem_type': 'regression',\n"
        "    'id2label': {0: 'a'}, 'label2id': {'a': 0},\n"
        "}\n"
    ),
    "distributed_testing_utils.py": "",
}


class LibraryTestsError(RuntimeError):
    """The library's tests cannot be obtained, or are not what pip verified."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_sdist(version: str, cache_dir: Path) -> Path:
    """The source archive of this Transformers version, from the cache or else through pip.

    Raises:
        LibraryTestsError: the cached archive changed since pip verified it, or pip cannot get it.
    """
    archive = cache_dir / f"transformers-{version}.tar.gz"
    recorded = cache_dir / f"{archive.name}.sha256"
    if archive.exists() and recorded.exists():
        found, expected = sha256(archive), recorded.read_text().strip()
        if found != expected:
            raise LibraryTestsError(
                f"{archive} has SHA-256 {found}, but pip verified {expected}. Delete the file and run again."
            )
        return archive

    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as download_dir:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
        command += [f"transformers=={version}", "--dest", download_dir]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        downloaded = Path(download_dir) / archive.name
        if done.returncode != 0 or not downloaded.exists():
            raise LibraryTestsError(
                f"The source archive of transformers {version} is not in {cache_dir} and pip cannot download it.\n"
                f"Connect to the network once, or put {archive.name} with its hash in {recorded.name} there.\n"
                f"pip said:\n{done.stderr.strip() or done.stdout.strip()}"
            )
        # the hash goes first: an archive without one is downloaded again, never trusted
        recorded.write_text(sha256(downloaded) + "\n")
        downloaded.replace(archive)
    return archive


def unpack_tests(archive: Path, directory: Path) -> Path:
    """Writes the archive's `tests/*.py` and the stand-ins as a package below `directory`; returns the package's path.

    Only regular files directly in the archive's own `tests` folder are read and only their last name is used, so no
    member can be written anywhere else.

    Raises:
        LibraryTestsError: the archive holds no common tests.
    """
    tests = PurePosixPath(archive.name.removesuffix(".tar.gz"), "tests")
    package = directory / PACKAGE
    package.mkdir()
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.parent != tests or path.suffix != ".py":
                continue
            content = members.extractfile(member)
            if content is not None:
                (package / path.name).write_bytes(content.read())
    if not (package / "test_modeling_common.py").exists():
        raise LibraryTestsError(f"{archive} holds no tests/test_modeling_common.py. Delete the file and run again.")
    for name, text in STAND_INS.items():
        target = package / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
    return package
