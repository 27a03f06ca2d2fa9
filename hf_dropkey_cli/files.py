"""Files of the package that can be used without importing it."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).resolve().parents[1] / "hf_dropkey"


def light(name: str) -> Any:
    """A module of the package that needs the standard library only, by its file: the package stays unloaded."""
    spec: Any = spec_from_file_location(f"hf_dropkey_cli.{Path(name).stem}", PACKAGE / name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version() -> str:
    """The version of the package."""
    return str(light("version.py").__version__)
