"""DropKey on any Transformers model: `apply_dropkey`, `remove_dropkey`, and temporary changes."""

from typing import Any

from .apply import apply_dropkey, dropkey, dropkey_active, dropkey_disabled, remove_dropkey
from .drop_path import DropPathReport, apply_drop_path, remove_drop_path
from .patch_dropout import PatchDropoutReport, apply_patch_dropout, remove_patch_dropout
from .report import DropKeyReport


__all__ = [
    "DropKeyReport",
    "DropPathReport",
    "PatchDropoutReport",
    "apply_drop_path",
    "apply_dropkey",
    "apply_patch_dropout",
    "dropkey",
    "dropkey_active",
    "dropkey_disabled",
    "remove_drop_path",
    "remove_dropkey",
    "remove_patch_dropout",
]


def __getattr__(name: str) -> Any:
    """What version 0.1 had here, with a DeprecationWarning."""
    from ..moved import forward

    return forward("patching", name)
