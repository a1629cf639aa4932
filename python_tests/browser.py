"""A headless Chromium for tests and screenshots, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
TIMEOUT_SECONDS = 60


def find_browser() -> str | None:
    """Path of the first browser of NAMES on PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab. A context manager: the browser and its folder are gone afterwards.

    Args:
        executable: path of Chromium or Chrome.
        width: of the window, in CSS pixels.
        height: of the window, in CSS pixels.

    Raises:
        TimeoutError: the browser does not start.
    """

    def __init__(self, executable: str, width: int = 1280, height: int = 900) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [executable, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._ids = itertools.count(1)
        self._session: str | None = None
        try:
            port, path = self._address()
            self._socket = websocket.create_connection(
                f"ws://127.0.0.1:{port}{path}", timeout=TIMEOUT_SECONDS, suppress_origin=True, http_no_proxy=["127.0.0.1"]
            )
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.call("Page.enable")
            self.resize(width, height)
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._stop()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol.

        Raises:
            RuntimeError: the browser refuses it.
        """
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message if self._session is None else {**message, "sessionId": self._session}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        """Sets the size of the page, in CSS pixels, and how many pixels of a screenshot one of them is."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)

    def open(self, page: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.run("location.href !== 'about:blank' && document.readyState === 'complete'"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{page} is not loaded after {TIMEOUT_SECONDS} seconds")
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of what its promise brings, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses and releases a key: a letter, or a name such as "Enter" or "ArrowLeft"."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = codes.get(key, ord(key.upper()[0]))
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _address(self) -> tuple[str, str]:
        file = Path(self._folder.name) / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return lines[0], lines[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise TimeoutError(f"{self._process.args!r} does not open a port for the DevTools")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
