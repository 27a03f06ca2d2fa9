"""Sharing: cards, pushes, a Trainer that pushes, and the check of what others have pushed."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What version 0.1 had here, with a DeprecationWarning."""
    from ..moved import forward

    return forward("hub", name)
