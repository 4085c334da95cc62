"""A page in a headless browser, driven over the pipe of Chromium's DevTools protocol."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

COMMAND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_READ, _WRITE = 3, 4  # descriptors that Chromium takes for the pipe


class Page:
    """Inside its `with`, one page of a new browser. folder: for what the browser writes."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        self._events: list[dict[str, Any]] = []
        self._count, self._buffer = 0, b""
        self._session: str | None = None
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The shell hands descriptors on under other numbers, which are free in it alone.
        pipes = f"exec {_READ}<&{theirs} {_WRITE}>&{answers};"
        options = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir='{folder}'"
        self._process = subprocess.Popen(
            ["bash", "-c", f"{pipes} exec '{COMMAND}' {options}"], pass_fds=(theirs, answers), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                received = os.read(self._read, 2**20)
                assert received, "the browser ended"
                self._buffer += received
            first, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(first)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def value(self, script: str) -> Any:
        """Of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href == '{url}' && document.readyState == 'complete'")

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def problems(self) -> list[dict[str, Any]]:
        """What the browser logged: errors of scripts, what its policy blocked, requests that failed."""
        return [one["params"] for one in self._events if one["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
