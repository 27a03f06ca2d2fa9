"""What a model's attention does: recorded weights, numbers, figures, and what a saved folder says."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What version 0.1 had here, with a DeprecationWarning."""
    from ..moved import forward

    return forward("inspection", name)
