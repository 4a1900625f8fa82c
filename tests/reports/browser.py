"""The page as a browser leaves it: its elements after the script ran, and what was written to the console.

`open_page` reads the page once; a `Visit` presses keys and clicks, over the pipe that Chromium offers to debuggers.
"""

import json
import os
import subprocess
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--window-size=1300,1600",
    "--virtual-time-budget=2000",
)


class Element(NamedTuple):
    tag: str
    attributes: dict[str, str | None]
    text: str

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())


class Page(NamedTuple):
    elements: list[Element]
    console: list[str]

    def all(self, tag: str | None = None, name: str | None = None) -> list[Element]:
        """Elements by tag and by class name."""
        return [
            found
            for found in self.elements
            if (tag is None or found.tag == tag) and (name is None or name in found.classes)
        ]

    def by_id(self, name: str) -> Element:
        return next(found for found in self.elements if found.attributes.get("id") == name)


def open_page(chromium: str, address: str) -> Page:
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    reader = _Reader()
    reader.feed(done.stdout)
    return Page(reader.found(), [line for line in done.stderr.splitlines() if "CONSOLE" in line])


class _Reader(HTMLParser):
    """Collects every element with all text inside it."""

    EMPTY = frozenset({"meta", "input", "br", "img", "link", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self._texts: list[list[str]] = []
        self._heads: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[int] = []

    def handle_starttag(self, tag, attrs):
        self._heads.append((tag, dict(attrs)))
        self._texts.append([])
        if tag not in self.EMPTY:
            self._open.append(len(self._heads) - 1)

    def handle_endtag(self, tag):
        while self._open and self._heads[self._open.pop()][0] != tag:
            pass

    def handle_data(self, data):
        for number in self._open:
            self._texts[number].append(data)

    def found(self) -> list[Element]:
        return [Element(*head, "".join(text)) for head, text in zip(self._heads, self._texts, strict=True)]


class Visit:
    """A page in a browser that stays open until the `with` block ends.

    Messages of the protocol are JSON, each with a NUL byte after it, on the descriptors 3 (in) and 4 (out).
    """

    def __init__(self, chromium: str, page: Path | str, width: int = 1400, height: int = 900) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        here, to_it = os.pipe()
        from_it, there = os.pipe()
        flags = [flag for flag in FLAGS if not flag.startswith(("--window", "--virtual"))]
        words = [*flags, f"--window-size={width},{height}", f"--user-data-dir={self._folder.name}", "about:blank"]
        # The shell gives the descriptors the numbers that Chromium reads and writes.
        script = f'exec "$0" "$@" 3<&{here} 4>&{there}'
        self._browser = subprocess.Popen(
            ["bash", "-c", script, chromium, "--remote-debugging-pipe", *words],
            pass_fds=(here, there),
            stderr=subprocess.DEVNULL,
        )
        os.close(here)
        os.close(there)
        self._out, self._in, self._number, self._session = to_it, os.fdopen(from_it, "rb"), 0, None
        self.errors: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._send("Runtime.enable")
        self._send("Page.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self.seconds = self.open(page if isinstance(page, str) else page.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.kill()
        self._browser.wait()
        os.close(self._out)
        self._in.close()
        self._folder.cleanup()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self._send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self._send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self._send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str, place: int = 0) -> None:
        """Click the middle of an element."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{place}]"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self._send("Input.dispatchMouseEvent", type="mousePressed", **where)
        self._send("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):  # an element itself arrives here as an empty dictionary
            assert time.monotonic() < deadline, f"{expression} in {self.evaluate('document.body.innerText')}"
            time.sleep(0.05)
        return self.evaluate(expression)

    def count(self, selector: str) -> int:
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def open(self, address: str) -> float:
        """Open an address; return the seconds until the page was drawn."""
        begun = time.monotonic()
        self._send("Page.navigate", url=address)
        while self.evaluate("location.href") == "about:blank" or self.evaluate("document.readyState") != "complete":
            time.sleep(0.02)
        return time.monotonic() - begun

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.errors.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser is gone"
            content += byte
        return json.loads(content)
