"""Optional packages: which extra of this package brings them, said where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """Stands around imports from the packages of an extra.

    Raises:
        ImportError: A package is missing; with the command that installs the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with the extra {extra!r}: run pip install 'hf_dropkey[{extra}]'",
            name=error.name,
        ) from error
