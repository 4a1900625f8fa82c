"""What the documentation tells a reader to type: the fenced `console` and `python` blocks of a page."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for part in ("docs", "recipes") for page in (ROOT / part).rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>.*?)\s*-->\s*\n)?^```(?P<language>console|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block."""

    page: str
    line: int
    language: str
    body: str
    reason: str | None
    """Why it is not run; None if it is."""

    @property
    def commands(self) -> list[str]:
        """The lines after a `$`, with their continuations joined; the rest is output."""
        joined = re.sub(r"\\\n\s*", "", self.body)
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order; `<!-- not run: reason -->` on the line above sets one aside."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["body"],
            match["reason"],
        )
        for match in _BLOCK.finditer(text)
    ]
