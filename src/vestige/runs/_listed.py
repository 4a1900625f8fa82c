"""Rows of a ranking, and how they print as a table."""

import html
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from vestige.runs._words import SYSTEM_ROLES, Shown
from vestige.terminal import shorten

PLAIN_WIDTH = 120
"""Columns used where the width of the terminal is not known."""
NARROWEST_TEXT = 16
_NARROWEST_TURN = 10
_HTML_WIDTH = 200
_BETWEEN = " | "


class ScoreRow(NamedTuple):
    """One ranked training example."""

    rank: int
    """1-based, counted from the requested end of the ranking."""
    example_id: str
    score: float
    percentile: float | None
    """Share of all training examples with a smaller score, in percent; None where it is not known."""
    text: str
    """The whole text; it is shortened only where the table is printed."""
    source: str | None
    row: int
    """Position in the training data."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn of a conversation."""
    strength: float | None = None
    """The score in percent of the query's highest (see `relative_strength`)."""


class ComponentScore(NamedTuple):
    """Contribution of one component to the score of one pair."""

    component: str
    score: float


class TokenScore(NamedTuple):
    """Contribution to a pair's score of learning to predict one token of the training example."""

    position: int
    token: str
    score: float


class SelfInfluence(NamedTuple):
    """The score of a training example for itself."""

    example_id: str
    row: int
    score: float


def relative_strength(score: float, highest: float) -> float | None:
    """Return a score in percent of the query's highest: 100 for the first row, negative for opponents.

    An opponent that is stronger than the first proponent is below -100. None where the highest is not positive.
    """
    return 100.0 * score / highest if highest > 0 else None


Row = TypeVar("Row")


class ScoreTable(Sequence[Row]):
    """Rows of a ranking: a sequence that prints as a table."""

    def __init__(
        self,
        rows: Sequence[Row],
        headings: Sequence[str],
        cells: Callable[[Row], tuple[Any, ...]],
        title: str,
        note: str = "",
    ) -> None:
        self._rows, self._headings, self._cells = tuple(rows), headings, cells
        self.title = title
        self.note = note
        """What the table leaves out; empty when nothing."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "ScoreTable[Row]": ...
    def __getitem__(self, index: int | slice) -> "Row | ScoreTable[Row]":
        if isinstance(index, slice):
            return ScoreTable(self._rows[index], self._headings, self._cells, self.title, self.note)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        cells = [self._cells(row) for row in self._rows]
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
        return "\n".join(line for line in (self.title, *_align(self._headings, cells, width), self.note) if line)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        caption = " ".join(part for part in (self.title, self.note) if part)
        return render_html(caption, self._headings, map(self._cells, self._rows))


def render_html(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as HTML; the last cell of each row is a text or the turns of a conversation."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + f'<td style="text-align:left">{html.escape(excerpt(words, _HTML_WIDTH))}</td></tr>'
        for *cells, words in rows
    )
    caption = f"<caption>{html.escape(caption)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


HEADINGS = ("rank", "example", "strength", "score", "percentile", "text")


def cells_of(row: ScoreRow) -> tuple[Any, ...]:
    """Return what a table shows of a row, under `HEADINGS`."""
    percentile = "" if row.percentile is None else f"{row.percentile:.1f}"
    strength = "" if row.strength is None else f"{row.strength:.0f}"
    shown = row.turns or row.text
    score = "not scored" if math.isnan(row.score) else f"{row.score:+.4g}"
    return str(row.rank), shorten(row.example_id), strength, score, percentile, shown


def _align(headings: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> list[str]:
    """Align lines with numbers to the right, and cut the last column to what is left of `width`."""
    leading = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    left = max(NARROWEST_TEXT, width - sum(leading) - 2 * len(leading))
    return [
        "  ".join([*(cell.rjust(size) for cell, size in zip(row, leading, strict=False)), excerpt(row[-1], left)])
        for row in (headings, *rows)
    ]


def excerpt(words: Shown, width: int) -> str:
    """Return a text, or the turns of a conversation, on one line of about `width` characters.

    Each turn has its role before it and an equal share of the line, what one leaves going to those after it. A leading
    system turn, which many conversations share, and what stands between the first two turns and the last are left out.
    """
    if isinstance(words, str):
        lines = (" ".join(line.split()) for line in words.splitlines())
        return shorten(_BETWEEN.join(line for line in lines if line), width)
    turns = words[1:] if words[0][0] in SYSTEM_ROLES and len(words) > 1 else words
    parts = [f"{role}: {' '.join(content.split())}" for role, content in turns]
    parts = parts if len(parts) < 4 else [*parts[:2], "…", parts[-1]]
    left = max(width - len(_BETWEEN) * (len(parts) - 1), _NARROWEST_TURN * len(parts))
    shown: list[str] = []
    for place, part in enumerate(parts):
        share = left // (len(parts) - place)
        after = sum(min(len(each), share) for each in parts[place + 1 :])
        shown.append(shorten(part, left - after))
        left -= len(shown[-1])
    return _BETWEEN.join(shown)
