"""onnxruntime-web, which runs a graph in a browser: one pinned release, its files known to the byte.

The wheel does not carry its 14 MB. npm fetches them where it is installed, else they come from an archive or a folder.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path


PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# file of the npm package: its name in the folder of a page (some servers do not know .mjs), and its SHA-256
FILES = {
    "dist/ort.wasm.bundle.min.mjs": (
        "ort/ort.wasm.bundle.min.js",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "dist/ort-wasm-simd-threaded.wasm": (
        "ort/ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
SHA256 = dict(FILES.values())
# the package refers to its licence and does not bring it
LICENSE_FILE = "ort/LICENSE"
LICENSE = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
SECONDS = 600
NEXT = (
    f"On a machine with npm run `npm pack {PACKAGE}@{VERSION}`, and pass the file that it writes: "
    f"--onnxruntime_web {PACKAGE}-{VERSION}.tgz"
)


def runtime_files(given: Path | None = None) -> dict[str, bytes]:
    """The files that a page needs, by their names in its folder, compared with the pinned release.

    Args:
        given: The archive that `npm pack` writes, or the folder of the package; default: npm fetches the archive.

    Raises:
        FileNotFoundError: There is no npm, or the archive or folder is not there or lacks a file.
        OSError: npm cannot fetch it.
        ValueError: It is another release, or was changed.
    """
    if given is None:
        with tempfile.TemporaryDirectory(prefix="hf_dropkey_npm_") as folder:
            return _compared(_from_archive(fetch(Path(folder))))
    if not given.exists():
        raise FileNotFoundError(f"--onnxruntime_web {given} is not there. {NEXT}")
    return _compared(_from_folder(given) if given.is_dir() else _from_archive(given))


def fetch(folder: Path) -> Path:
    """Has npm write the archive of the pinned release into a folder; it comes from npm's own cache where it has it.

    Raises:
        FileNotFoundError: npm is not installed.
        OSError: npm fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"the page needs {PACKAGE} {VERSION}, and npm, which fetches it, is not installed. {NEXT}"
        )
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--prefer-offline", "--loglevel=error"]
    try:
        done = subprocess.run(
            [*command, "--pack-destination", str(folder)], cwd=folder, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"npm did not fetch {PACKAGE} {VERSION} in {SECONDS} s. {NEXT}") from error
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        said = " ".join(done.stderr.split())[:400] or f"exit code {done.returncode}"
        raise OSError(f"npm did not fetch {PACKAGE} {VERSION} ({said}). {NEXT}")
    return archive


def _from_folder(folder: Path) -> dict[str, bytes]:
    gone = [name for name in FILES if not (folder / name).is_file()]
    if gone:
        raise FileNotFoundError(f"--onnxruntime_web {folder} has no {gone[0]}, so it is not {PACKAGE}. {NEXT}")
    return {name: (folder / name).read_bytes() for name in FILES}


def _from_archive(archive: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for name in FILES:
                # read, not unpacked: no path of the archive is written to
                member = opened.extractfile(f"package/{name}")
                if member is None:
                    raise KeyError(name)
                found[name] = member.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is not the archive of {PACKAGE} that npm writes ({error}). {NEXT}") from error
    return found


def _compared(found: dict[str, bytes]) -> dict[str, bytes]:
    for name, content in found.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != FILES[name][1]:
            raise ValueError(
                f"{name} is not that of {PACKAGE} {VERSION}: its SHA-256 is {digest}, not {FILES[name][1]}. {NEXT}"
            )
    return {FILES[name][0]: content for name, content in found.items()}
