"""Output of commands: text of others made safe, so that nothing in it moves the cursor or reorders a line."""

import contextlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any, final

from vestige.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

WIDE = 160
"""Columns of a wide table that is printed into a file."""
LONGEST_NAME = 64
"""Characters of an id or a name in a table; a digest has as many."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, formats (bidirectional marks, for example), halves of surrogate pairs,
and line ends."""
_JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d]")
"""Joiners inside words of Persian or Hindi and inside emoji."""


def printable(text: str) -> str:
    """Return `text` with everything that a terminal would obey as an escape, but for line feeds and tabs."""
    if text.isprintable():
        return text
    kept = {match.start() for match in _JOINER.finditer(text)}
    return "".join(letter if place in kept else _escape(letter) for place, letter in enumerate(text))


def shorten(text: str, width: int = LONGEST_NAME) -> str:
    """Return `text` on one line of at most `width` characters, safe to print, its end cut off."""
    line = printable(" ".join(text.split())[: width + 1])
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def lines_of_facts(facts: Mapping[str, str | None]) -> list[str]:
    """Return a line for each fact, names in one column; a fact that is None has none."""
    width = max(map(len, facts))
    return [f"  {name:<{width}}  {text}" for name, text in facts.items() if text is not None]


def say(text: object, *, file: Any = None) -> None:
    """Print `text` safely; a reader that closed the other end of a pipe does not end the work."""
    with _reader_may_be_gone():
        print(printable(str(text)), file=file, flush=True)


def show(table: object, file_width: int = 120) -> None:
    """Print what rich makes of `table`; a file or a pipe has no width, and gets `file_width` columns."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    console = Console()
    width = console.width if console.is_terminal else file_width
    with _reader_may_be_gone():
        Terminal(width=width, soft_wrap=True, markup=False).print(_Safe(table))


def as_text(table: object, width: int, *, soft_wrap: bool = False) -> str:
    """Return what rich makes of `table`, without colours."""
    from rich.console import Console

    text = StringIO()
    Console(file=text, width=width, soft_wrap=soft_wrap, markup=False, force_terminal=False).print(_Safe(table))
    return text.getvalue().rstrip()


@final
class _Safe:
    """Something that rich renders, its text printable, its styles as they are."""

    def __init__(self, table: object) -> None:
        self._table = table

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterable[Segment]":
        from rich.segment import Segment

        for text, style, control in console.render(self._table, options):  # pyright: ignore[reportArgumentType]
            yield Segment(text if control else printable(text), style, control)


@contextlib.contextmanager
def _reader_may_be_gone() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        pass  # the command's work is more than what it prints; its exit status counts
    except OSError as error:
        raise UserError(
            f"What was to be printed could not be written ({error.strerror}). What the command wrote to files is whole."
        ) from error


def _escape(letter: str) -> str:
    if letter in "\n\t" or unicodedata.category(letter) not in _INVISIBLE:
        return letter
    return letter.encode("unicode_escape").decode()
