"""A headless Chromium over the DevTools protocol, through a pipe: what a page says and asks for."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def path() -> str | None:
    """Where a Chromium is; None without one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a started browser."""

    def __init__(self, profile: Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads from 3 and writes to 4; places above both, so that neither is overwritten.
        high = [os.dup(one) for one in (to_read, to_write)]
        while min(high) < 5:
            high = [os.dup(one) for one in high]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-extensions",
            "--disable-component-update", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [path() or "chromium", *flags],
            preexec_fn=place,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in {to_read, to_write, *high}:
            os.close(one)
        self._number, self._left, self.events = 0, b"", []
        self._session: str | None = None
        targets = self("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and give its answer; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + 60
        while b"\0" not in self._left:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self._read, 1 << 16)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._left += piece
        one, self._left = self._left.split(b"\0", 1)
        return dict(json.loads(one))

    def open(self, page: Path, *, width: int = 1000, dark: bool = False) -> list[dict[str, Any]]:
        """Load a file and give the events that came with it."""
        return self.visit(page.absolute().as_uri(), width=width, dark=dark)

    def visit(self, url: str, *, width: int = 1000, dark: bool = False) -> list[dict[str, Any]]:
        """Load an address and give the events that came with it."""
        self.size(width, 900)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url="about:blank")  # also where only what is behind # differs
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._next())
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._next())
        self("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)
        return list(self.events)

    def size(self, width: int, height: int) -> None:
        """Give the window a size; a narrow one is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **size)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """What a JavaScript expression is, once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.value(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"{expression} does not become true")
            time.sleep(0.05)
        return found

    def tap(self, element: str) -> None:
        """Touch the middle of an element, which a JavaScript expression gives."""
        self("Emulation.setFocusEmulationEnabled", enabled=True)
        self("Emulation.setTouchEmulationEnabled", enabled=True)
        self.value(f"{element}.scrollIntoView()")
        box = self.value(
            "(b => [(b.left + b.right) / 2, (b.top + b.bottom) / 2])"
            f"({element}.getBoundingClientRect())"
        )
        at = dict(zip("xy", box, strict=True))
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)

    def picture(self, place: Path) -> None:
        """Keep what the whole page looks like, as a .png or a .webp."""
        kind = {"format": "webp", "quality": 60} if place.suffix == ".webp" else {}
        found = self("Page.captureScreenshot", captureBeyondViewport=True, **kind)
        place.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)
