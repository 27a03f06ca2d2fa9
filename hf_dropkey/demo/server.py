"""Serves the page: `hf-dropkey demo`, and the app of a Space."""

import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import needed
from ..hub.download import model_files
from .drawing import STYLE
from .opening import open_page
from .uploads import MOST_MEGABYTES


PORT = 7860
LARGEST_PORT = 65535
# visitors whose picture is remembered while they change settings
VISITORS = 100


def demo(targets: Sequence[str], *, port: int = PORT, host: str = "127.0.0.1", images: Path | None = None) -> None:
    """Opens the models and serves the page until it is interrupted.

    Args:
        targets: One or two saved models: folders, or ids of the Hub.
        port: 0 takes any free one.
        host: Address to listen on; 0.0.0.0 for all of this machine.
        images: Folder of example images.

    Raises:
        ImportError: gradio is not installed.
        OSError: The port is in use, or the host is not of this machine.
        FileNotFoundError, ValueError: A model or an image cannot be used.
    """
    prepare()
    port = free_port(host, port)
    page = open_page([model_files(target) for target in targets], images)
    _, url, _ = launch(page, host=host, port=port, waits=False)
    print(f"{url} shows {' and '.join(map(str, targets))}; press Ctrl+C to end")
    page.block_thread()


def prepare() -> None:
    """Settings that gradio reads while it is imported: no analytics, pictures that are sent in a folder of this process.

    Raises:
        ImportError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        # deleted with the process
        global _sent
        _sent = tempfile.TemporaryDirectory(prefix="hf_dropkey_demo_")
        os.environ["GRADIO_TEMP_DIR"] = _sent.name
    with needed("demo"):
        import gradio  # noqa: F401  # to fail before a model is loaded


_sent: tempfile.TemporaryDirectory[str] | None = None


def free_port(host: str, port: int) -> int:
    """The port, if it is free; for 0 any free one.

    Raises:
        OSError: It is in use, or the host is not of this machine.
        ValueError: There is no such port.
    """
    if not 0 <= port <= LARGEST_PORT:
        raise ValueError(f"--port {port} is not a port; choose one from 1 to {LARGEST_PORT}, or 0 for any free one")
    try:
        return _bound(host, port)
    except socket.gaierror as error:
        raise OSError(
            f"--host {host} is not an address ({error}); give one of this machine, such as 127.0.0.1"
        ) from error
    except OSError as error:
        try:
            other = _bound(host, 0)
        except OSError:
            raise OSError(
                f"--host {host} cannot be listened on ({error}); give an address of this machine, such as 127.0.0.1"
            ) from error
        raise OSError(
            f"--port {port} cannot be used ({error.strerror}); choose another one, such as --port {other}"
        ) from error


def _bound(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        # as servers do: a port whose last connections are still closing is free
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
        return int(one.getsockname()[1])


def launch(page: Any, *, host: str, port: int | None, waits: bool) -> tuple[Any, str, Any]:
    """Starts the server of a page; returns gradio's app and the page's address."""
    with needed("demo"):
        import gradio
    fonts = ["system-ui", "sans-serif"]
    # names without a loader: gradio's own themes fetch fonts from another host
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    found: tuple[Any, str, Any] = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=not waits,
        theme=theme,
        css=STYLE,
        footer_links=["api"],
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=f"{2 * MOST_MEGABYTES}mb",
        state_session_capacity=VISITORS,
    )
    return found


def run_space(folder: str | Path = "model", images: str | Path = "examples") -> None:
    """The app of a Space: the model and the examples beside it."""
    prepare()
    page = open_page([Path(folder)], Path(images) if Path(images).is_dir() else None)
    # a Space listens on 7860, gradio's own choice, or where GRADIO_SERVER_PORT says
    launch(page, host="0.0.0.0", port=None, waits=True)
