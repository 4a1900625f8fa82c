"""The page as a browser leaves it: its elements after the script ran, and what was written to the console."""

import subprocess
import tempfile
from html.parser import HTMLParser
from typing import NamedTuple

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
