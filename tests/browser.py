"""A headless Chromium, spoken to over a pipe: nothing but the browser itself is needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")
#: Chromium reads commands from file descriptor 3 and answers on 4.
_LAUNCH = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 60.0


class Browser:
    """A window of a width and a colour scheme; to be closed.

    Args:
        width: of the window, in CSS pixels; a phone's below 700.
        scheme: "light" or "dark": what the page is told that the reader prefers.
    """

    def __init__(self, width: int, scheme: str) -> None:
        assert CHROMIUM is not None
        self.width, self.scheme = width, scheme
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._write = _pipe()
        self._read, answers = _pipe()
        arguments = [CHROMIUM, *_ARGUMENTS, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(commands), str(answers), *arguments, "about:blank"],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._watch = threading.Timer(_PATIENCE, self._process.kill)  # then reading ends
        self._watch.daemon = True
        self._watch.start()
        self._received = b""
        self._calls = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        pages = [target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._resize(900)

    def get(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns, given ``arguments``."""
        expression = f"(function() {{ {script} }})(...{json.dumps(arguments)})"
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page has written to the console, and what it has failed at."""
        methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self._events if event.get("method") in methods]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        self._resize(int(self.run("return document.documentElement.scrollHeight")))
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        self._resize(900)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._events.append(answer)

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(AssertionError, ConnectionError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._watch.cancel()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def _resize(self, height: int) -> None:
        phone = self.width < 700
        self.call(
            "Emulation.setDeviceMetricsOverride", width=self.width, height=height, deviceScaleFactor=1, mobile=phone
        )

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise ConnectionError("Chromium has ended, or did not answer in time.")
            self._received += piece
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are none of the descriptors that the browser is given."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
