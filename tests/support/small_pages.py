"""A demo's page that is served in this process, and asked as gradio's client asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def served(folders: list[Path], images: Path | None = None) -> Iterator[str]:
    """The address of a page while it is served; skips the test where gradio is not installed."""
    pytest.importorskip("gradio", reason="needs gradio, which the extra 'demo' installs")
    from hf_dropkey.demo.opening import open_page
    from hf_dropkey.demo.server import free_port, launch, prepare

    prepare()
    page = open_page(folders, images)
    _, url, _ = launch(page, host="127.0.0.1", port=free_port("127.0.0.1", 0), waits=False)
    try:
        yield url
    finally:
        page.close(verbose=False)


def client_of(url: str) -> Any:
    """A visitor with a session of its own."""
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False)
