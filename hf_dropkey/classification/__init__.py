"""Image classification: arguments, data, transform, model, metrics, job."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What version 0.1 had here, with a DeprecationWarning."""
    from ..moved import forward

    return forward("classification", name)
