"""Optional packages: an error for a missing one names the extra that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """A context for imports from the packages of an extra.

    Raises:
        ImportError: A package is missing; the message has the command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with the extra {extra!r}: run pip install 'hf_dropkey[{extra}]'",
            name=error.name,
        ) from error
