"""The files of a cell beside its result: `cell.json` before the work, `log.txt` during it, `done.json` after it."""

import contextlib
import hashlib
import json
import math
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import FiniteFloat

from vestige.errors import IndexMismatch
from vestige.parsing import as_record, parse_json, parse_object
from vestige.storage import is_temporary, make_folder, sha256_once, write_durably
from vestige_recipes.sweep.cells import Cell

MOST_FIGURES = 200
_LARGEST_FILE = 16 * 2**20
_NAMES = ("name", "method", "measure", "domain", "query")
"""What names a row of a table."""
_TABLES = ("rows", "gates", "checks", "measures")
_NOT_FIGURES = ("format", "seed", "config", "settings", "identity", "manifest")


def figures_of(out: Path) -> dict[str, Any]:
    """Return numbers by name, such as `seconds`, `trust.coverage` or `rows.influence.LDS`, from the files in `out`.

    A single number keeps its name; the rows of a table, and the checks and gates of a record, are named after what they
    are about. What is nested deeper, and lists of numbers, are left to the files themselves.
    """
    found = _alarm(out / "at_risk.parquet")
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            content = parse_json(path.read_bytes()) if path.stat().st_size <= _LARGEST_FILE else None
            for name, value in _figures(content):
                found.setdefault(name, value)
    return dict(list(found.items())[:MOST_FIGURES])


def _alarm(path: Path) -> dict[str, Any]:
    """Return when an alarm rang, and how many examples it flagged; nothing where there is no alarm."""
    if not path.exists():
        return {}
    import pyarrow.parquet as parquet

    listed = parquet.read_table(path, columns=["flagged", "step"], memory_map=False)
    return {"alarm.step": listed["step"][0].as_py(), "alarm.flagged": sum(listed["flagged"].to_pylist())}


def _figures(content: Any) -> Iterator[tuple[str, Any]]:
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if name in _NOT_FIGURES:
            continue
        if _is_figure(value):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", each) for key, each in value.items() if _is_figure(each))
            for table in _TABLES:
                yield from _rows(name, value.get(table))
        elif name in _TABLES:
            yield from _rows(name, value)


def _rows(prefix: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for row in rows if isinstance(rows, list) else ():
        named = next((str(row[key]) for key in _NAMES if key in row), None) if isinstance(row, Mapping) else None
        if named is None:
            continue
        for key, value in row.items():
            # An estimate with its interval, as evaluations write it.
            number = value.get("value") if isinstance(value, Mapping) else value
            if _is_figure(number):
                yield f"{prefix}.{named}.{key}", number


def _is_figure(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


CELL_FILE, LOG_FILE, DONE_FILE = "cell.json", "log.txt", "done.json"
_SHOWN = 5
_READ_BYTES = 64 * 2**20
"""Files up to this size are compared by their content, larger ones by size and time of change."""
_PRODUCTS = (".html",)
"""What reading a folder may leave in it."""


class Done(NamedTuple):
    """The marker of a finished cell; `seconds` are those of the attempt that finished it."""

    cell: str
    seconds: FiniteFloat
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


def write_done(cell: Cell, seconds: float, inputs: dict[str, str], figures: dict[str, Any]) -> None:
    """Mark the cell as done, after an attempt of this many seconds, made from these inputs."""
    done = Done(cell.id, seconds, version("vestige"), inputs, figures)
    write_json(cell.folder / DONE_FILE, done._asdict())


def write_cell(cell: Cell) -> None:
    """Write what belongs into the cell's folder, and the command that runs the cell alone."""
    make_folder(cell.folder)
    verb = cell.command.name
    content = {"verb": verb, "settings": cell.matters(), "command": cell.settings.command_line(verb)}
    write_json(cell.folder / CELL_FILE, content)


def write_json(path: Path, content: Any) -> None:
    """Write the content as JSON that a person can read."""
    write_durably(path, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])


def require_unchanged(cells: tuple[Cell, ...]) -> None:
    """Raise unless every finished cell was made from the present files, with the present settings."""
    changed = [f"  {cell.shown}: {what}" for cell in cells if (what := _change(cell))]
    if changed:
        more = f"\n  ... and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise IndexMismatch(
            f"{len(changed)} finished cells were made from something else than is there now:\n"
            + "\n".join(changed[:_SHOWN])
            + f"{more}\nGive another --out to keep both, or delete the folders of these cells to run them again."
        )


@contextmanager
def log_output(cell: Cell) -> Iterator[None]:
    """Append to the cell's log what the block prints, and the traceback of an error."""
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


def fingerprints(settings: dict[str, Any]) -> dict[str, str]:
    """Return a digest of every file and folder that a setting names, by its path; of a folder, of the files in it."""
    paths = {path for value in settings.values() for path in _paths(value)}
    return {path: found for path in sorted(paths) if (found := _fingerprint(Path(path))) is not None}


def _change(cell: Cell) -> str | None:
    done = read_done(cell.folder, cell.id)
    if done is None:
        return None
    values = cell.matters()
    now = fingerprints(values)
    for path, before in done.inputs.items():
        if path in now and now[path] != before:
            return f"{path} has changed"
    try:
        then = parse_object((cell.folder / CELL_FILE).read_bytes()).get("settings")
    except (OSError, ValueError):
        return None
    then = then if isinstance(then, dict) else {}
    name = next((name for name, value in values.items() if name in then and then[name] != value), None)
    return None if name is None else f"{name} was {then[name]!r} by default, now {values[name]!r}"


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [path for each in inner for path in _paths(each)]
    # A question is no path, though it may be as long as one must not be.
    return [value] if isinstance(value, str) and value and "\n" not in value and len(value) < 1024 else []


def _fingerprint(path: Path) -> str | None:
    try:
        if path.is_file():
            return _file_fingerprint(path)
        if not path.is_dir():
            return None
        names = sorted(each.name for each in os.scandir(path) if each.is_file())
    except OSError:
        return None
    kept = [name for name in names if not name.startswith(".") and not name.endswith(_PRODUCTS)]
    lines = [f"{name} {_file_fingerprint(path / name)}" for name in kept if not is_temporary(path / name)]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _file_fingerprint(path: Path) -> str:
    state = path.stat()
    return f"{state.st_size} bytes of {state.st_mtime_ns}" if state.st_size > _READ_BYTES else sha256_once(path)
