"""A headless Chromium, driven over the DevTools protocol on two pipes: nothing needs to be installed beside the browser.

Every request that a page makes is noted, and every console error.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


NAMES = ("chromium", "chromium-browser", "google-chrome")
# the browser reads the protocol from file 3 and writes it to file 4
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def screenshots_folder(home: Path) -> Path:
    """Where pictures of pages go: a folder that the variable SCREENSHOTS names, where they stay, else one in `home`."""
    folder = Path(os.environ.get("SCREENSHOTS") or home / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def chromium_program() -> str | None:
    """The browser's program, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab: what a test does in it and asks about it."""

    def __init__(self, reads: int, writes: int):
        self._reads, self._writes, self._left = reads, writes, b""
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.session: str | None = None
        self.workers: list[str] = []

    def open(self) -> None:
        """Makes the tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def watch_workers(self) -> None:
        """Notes what the page's workers ask for and their errors too; `workers` has their sessions."""
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        return number

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, to the page unless another session is named."""
        number = self._send(method, parameters, session or self.session)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = self._next(deadline)
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                result: dict[str, Any] = found["result"]
                return result
            self._note(found)
        raise TimeoutError(f"Chromium did not answer {method}")

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._reads], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium says nothing")
            read = os.read(self._reads, 2**20)
            if not read:
                raise ConnectionError("Chromium has ended")
            self._left += read
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        elif event.get("method") == "Network.webSocketCreated":
            self.requests.append(event["params"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["params"]["exceptionDetails"])[:500])
        elif event.get("method") == "Target.attachedToTarget" and self.session is not None:
            # a worker, which waits until it is watched; nobody waits for the answers
            worker = event["params"]["sessionId"]
            self.workers.append(worker)
            for method in ("Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger"):
                self._send(method, {}, worker)

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Sets the size of the view in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def go(self, url: str) -> None:
        """Opens an address."""
        self.call("Page.navigate", url=url)

    def run(self, expression: str, *, session: str | None = None) -> Any:
        """The value of an expression in JavaScript, in the page unless the session of a worker is named."""
        found = self.call(
            "Runtime.evaluate", session=session, expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # an element itself cannot be sent here
            if self.run(f"!!({expression})"):
                return
            time.sleep(0.1)
        raise TimeoutError(
            f"{expression} did not become true in {seconds} s; the page says {self.text('body')[:1500]!r}"
        )

    def text(self, selector: str) -> str:
        """The visible text of an element, "" without one."""
        return str(self.run(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element."""
        box = self.run(
            f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView({{block: 'center'}});"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """A key on the focused element."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def send_file(self, selector: str, file: Path) -> None:
        """Chooses a file in an `<input type="file">`."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def picture(self, file: Path) -> Path:
        """Saves the whole page as a PNG."""
        content = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": content["width"], "height": content["height"], "scale": 1}
        made = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(made["data"]))
        return file


@contextmanager
def chromium(program: str, home: Path, *more: str) -> Iterator[Page]:
    """A running browser with one tab; ends it, by its process, at the end of the block.

    Args:
        program: Of the browser.
        home: Folder for its files.
        more: Arguments of the program.
    """
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [
        program,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--no-proxy-server",
        f"--user-data-dir={home / 'profile'}",
        "--remote-debugging-pipe",
        *more,
    ]
    # above 4, so that none is written over
    given = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs_in, theirs_out)]
    environment = {**os.environ, "HOME": str(home)}
    start = [sys.executable, "-c", START, *map(str, given), *command]
    with (home / "chromium.log").open("wb") as log:
        process = subprocess.Popen(start, pass_fds=given, stdout=log, stderr=log, env=environment)
    for number in (theirs_in, theirs_out, *given):
        os.close(number)
    try:
        page = Page(ours_in, ours_out)
        page.open()
        yield page
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        os.close(ours_in)
        os.close(ours_out)
