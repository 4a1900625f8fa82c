"""What a cell leaves beside its result: `cell.json` before the work, `log.txt` during it, `done.json` after it."""

import contextlib
import json
import os
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import FiniteFloat

from vestige.errors import IndexMismatch
from vestige.files import make_folder, write_durably
from vestige.parsing import as_record, parse_object
from vestige.sweep._cells import Cell
from vestige.sweep._inputs import fingerprints

CELL_FILE, LOG_FILE, DONE_FILE = "cell.json", "log.txt", "done.json"
_SHOWN = 5


class Done(NamedTuple):
    """The marker of a finished cell."""

    cell: str
    seconds: FiniteFloat
    """Of the attempt that finished it."""
    vestige: str
    inputs: dict[str, str]
    figures: dict[str, bool | int | float | str | None]


def read_done(folder: Path, cell: str) -> Done | None:
    """Return the marker in the folder of a cell of this id, None if it is not done."""
    try:
        done = as_record(Done, parse_object((folder / DONE_FILE).read_bytes()))
    except (OSError, ValueError):
        return None
    return done if done.cell == cell else None


def write_done(cell: Cell, done: Done) -> None:
    """The cell counts as done."""
    write_json(cell.folder / DONE_FILE, done._asdict())


def write_cell(cell: Cell, verb: str) -> None:
    """The cell's folder says what belongs into it."""
    make_folder(cell.folder)
    write_json(cell.folder / CELL_FILE, {"verb": verb, "settings": cell.matters(), "command": _command(cell, verb)})


def require_unchanged(cells: tuple[Cell, ...]) -> None:
    """Nothing happens if every finished cell was made from these files, with these settings.

    Raises:
        IndexMismatch: Data or a model changed since, or a default did with the version; nothing was changed.
    """
    changed = [f"  {cell.shown}: {what}" for cell in cells if (what := _change(cell))]
    if changed:
        more = f"\n  ... and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise IndexMismatch(
            f"{len(changed)} finished cells were made from something else than is there now:\n"
            + "\n".join(changed[:_SHOWN])
            + f"{more}\nGive another --out to keep both, or delete the folders of these cells to have them done anew."
        )


@contextmanager
def logged(cell: Cell) -> Iterator[None]:
    """What the block prints goes to the cell's log, behind what earlier attempts left there, with its traceback."""
    make_folder(cell.folder)
    quiet = os.environ.pop("VESTIGE_QUIET", None)
    try:
        with (cell.folder / LOG_FILE).open("a", buffering=1, encoding="utf-8") as log:
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    yield
            except BaseException:
                log.write(traceback.format_exc())
                raise
    finally:
        if quiet is not None:
            os.environ["VESTIGE_QUIET"] = quiet


def write_json(path: Path, content: Any) -> None:
    """The file holds the content, legibly."""
    write_durably(path, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])


def _command(cell: Cell, verb: str) -> str:
    """What a person types to do the cell alone."""
    words = shlex.split(cell.settings.command_line(verb))
    return shlex.join([words[0], *verb.split(), *words[2:]])


def _change(cell: Cell) -> str | None:
    done = read_done(cell.folder, cell.id)
    if done is None:
        return None
    now = fingerprints(cell.matters())
    for path, before in done.inputs.items():
        if path in now and now[path] != before:
            return f"{path} has changed"
    try:
        then = parse_object((cell.folder / CELL_FILE).read_bytes())["settings"]
    except (OSError, ValueError, KeyError):
        return None
    values = cell.matters()
    name = next((name for name, value in values.items() if name in then and then[name] != value), None)
    return None if name is None else f"{name} was {then[name]!r} by default, now {values[name]!r}"
