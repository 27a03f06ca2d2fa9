"""Pages that compute in the browser: the runtime that they need, and a server for a folder."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hf_dropkey.hub.web_runtime import PACKAGE, VERSION, fetch


def web_runtime() -> Path:
    """The archive of onnxruntime-web, which npm fetches once on this machine; skips the test where it cannot."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey"
    archive = cache / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            fetch(cache)
        except OSError as error:
            pytest.skip(f"needs {PACKAGE} {VERSION}: {error}")
    return archive


class Folder(SimpleHTTPRequestHandler):
    """Sends the files of a folder and notes what was asked for."""

    asked: list[str]

    def log_message(self, *arguments: Any) -> None:
        self.asked.append(self.path)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of a folder on this machine, and the paths that it was asked for."""
    asked: list[str] = []
    handler = partial(type("Noted", (Folder,), {"asked": asked}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
