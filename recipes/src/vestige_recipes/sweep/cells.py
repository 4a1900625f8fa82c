"""The cells of a grid: complete settings, checked before anything runs, in a folder named after them.

A cell's id is a digest of the command and of every setting that could change its result. So the same cell of a larger
grid is the same folder, and two cells that differ in anything, the number of epochs included, never share one.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.registry import COMMANDS, Command
from vestige.settings import LaunchSettings, Settings, nearest

ID_DIGITS = 16
_KEYS = ("verb", "base", "mode", "axes")
MOST_CELLS = 10_000
DIGITS = 12
"""Decimals of a range's values: 0.1 + 0.2 is 0.3."""

_RANGE = ("start", "stop", "step")
_STEPS_SLACK = 1e-9
"""How far short of a whole number of steps `stop` may be and still count."""


def axis_values(given: Any, name: str, source: str) -> tuple[Any, ...]:
    """Return the values of an axis: of a list, or of a range whose `stop` is part of it."""
    if isinstance(given, Mapping):
        return _range(given, name, source)
    if not isinstance(given, list | tuple):
        raise SpecError(
            f"{source}: axis `{name}` is {given!r}. Expected a list such as [1, 2], or a range such as "
            "{start: 0, stop: 1, step: 0.1}. A value that all cells share belongs under `base`."
        )
    if not given:
        raise SpecError(f"{source}: axis `{name}` has no values, so there would be no cell.")
    return tuple(plain(value, name, source) for value in given)


def points(mode: str, axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Return the values along the axes, cell by cell; without axes there is one cell."""
    rows = zip(*axes.values(), strict=True) if mode == "zip" and axes else itertools.product(*axes.values())
    return (dict(zip(axes, row, strict=True)) for row in rows)


def plain(value: Any, name: str, source: str) -> Any:
    """Return the value in JSON terms."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(each, name, source) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each, name, source) for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SpecError(f"{source}: `{name}` is a live {type(value).__name__}. Save it and give the path: cells are files.")


def _range(given: Mapping[str, Any], name: str, source: str) -> tuple[Any, ...]:
    values = {"step": 1, **given}
    numbers: list[Any] = [values.get(key) for key in _RANGE]
    if set(values) != set(_RANGE) or not all(_is_number(number) for number in numbers):
        raise SpecError(
            f"{source}: the range `{name}` is {dict(given)!r}. Expected start, stop and step, three numbers."
        )
    start, stop, step = numbers
    steps = (stop - start) / step if step else -1.0
    if steps < 0:
        raise SpecError(f"{source}: the range `{name}` never comes from {start} to {stop} in steps of {step}.")
    if steps >= MOST_CELLS:
        raise SpecError(
            f"{source}: the range `{name}` has {steps + 1:,.0f} values, and at most {MOST_CELLS:,} cells run."
        )
    count = math.floor(steps + _STEPS_SLACK) + 1
    return tuple(round(start + number * step, DIGITS) for number in range(count))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Grid:
    """What to run: checked as far as is possible without the settings of the command."""

    verb: str
    """The command, without `vestige`."""
    base: dict[str, Any]
    mode: str
    """product: every combination, the last axis fastest; zip: the first values, then the second values, and so on."""
    axes: dict[str, tuple[Any, ...]]
    source: str
    """The name of the grid in errors."""

    def __len__(self) -> int:
        lengths = [len(values) for values in self.axes.values()]
        return max(lengths, default=1) if self.mode == "zip" else math.prod(lengths)

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that no other grid has; the order of the cells counts."""
        return hashlib.sha256(json.dumps(self.to_dict(), ensure_ascii=False).encode()).hexdigest()[:ID_DIGITS]

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as a file would hold it, in JSON terms, with ranges written out."""
        axes = {name: list(values) for name, values in self.axes.items()}
        return {"verb": self.verb, "base": self.base, "mode": self.mode, "axes": axes}


def check_grid(content: Any, source: str) -> Grid:
    """Return the grid that a mapping describes, checked as far as is possible without the command's settings."""
    if not isinstance(content, Mapping):
        raise SpecError(f"{source} holds a {type(content).__name__}. Expected verb, base, mode and axes.")
    for name in content:
        if name not in _KEYS:
            hint = nearest(str(name), list(_KEYS)).replace("Known settings", "A grid has")
            raise SpecError(
                f"{source}: unknown key `{name}`. {hint} Settings of the command belong under `base` or `axes`."
            )
    verb, mode = content.get("verb"), content.get("mode", "product")
    if not isinstance(verb, str):
        raise SpecError(
            f"{source}: `verb` is {verb!r}. Expected the command to run in every cell, such as `verb: index`."
        )
    if mode not in ("product", "zip"):
        raise SpecError(f"{source}: `mode` is {mode!r}. Expected product (every combination) or zip (side by side).")
    base, given = _mapping(content, "base", source), _mapping(content, "axes", source)
    for name in given:
        if name in base:
            raise SpecError(f"{source}: `{name}` stands under `base` and under `axes`. Drop one of them.")
    axes = {name: axis_values(values, name, source) for name, values in given.items()}
    grid = Grid(verb, {name: plain(value, name, source) for name, value in base.items()}, mode, axes, source)
    _require_fit(grid)
    return grid


def _mapping(content: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise SpecError(f"{source}: `{key}` is {value!r}. Expected settings by name.")
    return {str(name): each for name, each in (value or {}).items()}


def _require_fit(grid: Grid) -> None:
    lengths = {name: len(values) for name, values in grid.axes.items()}
    shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
    if grid.mode == "zip" and len(set(lengths.values())) > 1:
        raise SpecError(f"{grid.source}: in mode zip all axes have as many values, and these have: {shown}.")
    if len(grid) > MOST_CELLS:
        raise SpecError(
            f"{grid.source}: {len(grid):,} cells ({shown}), and at most {MOST_CELLS:,} run. Make several grids."
        )


NAMES = "cell"
"""The axis that gives cells their names, and is no setting."""
NEVER_MATTER = frozenset({"out", "overwrite", "profile", *LaunchSettings.model_fields})
"""Where the result goes, where the work runs, and what is measured during the work."""

_REFUSED = {
    "out": "the sweep gives every cell a folder of its own.",
    "overwrite": "a cell that was interrupted continues. Delete the cell's folder to run it again.",
    "shard": "give --shard to the sweep, which distributes the cells.",
    "wait": "a cell is done when its work is. Give --no-wait to the sweep.",
}
_SHOWN_FAULTS = 5
_LONGEST_NAME = 120
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")


@dataclass(frozen=True)
class Cell:
    """One run of the command."""

    command: Command
    id: str
    number: int
    """Its position in the grid."""
    point: dict[str, Any]
    """Its values along the axes."""
    settings: Settings
    folder: Path
    """Of the cell: its settings, its log, its marker, and `out`, which is the command's own."""

    @property
    def out(self) -> Path:
        """What the command gets as --out."""
        return self.folder / "out"

    @property
    def shown(self) -> str:
        """The cell in an error: its id, and what makes it different from the others."""
        return f"cell {self.id}" + (f" ({show_point(self.point)})" if self.point else "")

    def matters(self) -> dict[str, Any]:
        """Return every setting that could change the result, defaults included, in JSON terms."""
        return {name: value for name, value in self.settings.record().items() if name not in NEVER_MATTER}

    def given(self) -> dict[str, Any]:
        """Return the settings that are not the default, and those of the axes."""
        fields, axes = self.command.settings.model_fields, {name.partition(".")[0] for name in self.point}
        settings = self.matters().items()
        return {name: value for name, value in settings if name in axes or value != fields[name].default}


def cells_of(grid: Grid, out: Path) -> tuple[Cell, ...]:
    """Return the cells of a grid, every one of them checked, in its order."""
    command = COMMANDS.find(grid.verb)
    _require_sweepable(grid, command)
    cells: dict[str, Cell] = {}
    faults: list[str] = []
    for number, point in enumerate(points(grid.mode, grid.axes)):
        try:
            cell = _cell(grid, command, number, point, out)
        except SpecError as error:
            faults.append(f"  cell {number} ({show_point(point)}): {error}")
            continue
        if (twin := cells.setdefault(cell.id, cell)) is not cell:
            faults.append(
                f"  cells {twin.number} ({show_point(twin.point)}) and {number} ({show_point(point)}) are the same "
                "run: they differ in nothing that changes the result. Drop one of them."
            )
    if faults:
        more = f"\n  ... and {len(faults) - _SHOWN_FAULTS} more." if len(faults) > _SHOWN_FAULTS else ""
        raise SpecError(
            f"{grid.source}: {len(faults)} of {len(grid)} cells cannot run, so none was begun.\n"
            + "\n".join(faults[:_SHOWN_FAULTS])
            + more
        )
    return tuple(cells.values())


def cell_id(verb: str, settings: Settings) -> str:
    """Return 16 hexadecimal digits of the sha256 of the command and every setting that matters and is not the default.

    Defaults are left out so that a setting that a later version adds does not rename every cell; a default that a
    later version changes is found by comparing with the complete settings in `cell.json`.
    """
    defaults = type(settings).model_fields
    given = {
        name: value
        for name, value in settings.record().items()
        if name not in NEVER_MATTER and getattr(settings, name) != defaults[name].default
    }
    content = json.dumps({"verb": verb, "settings": given}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_DIGITS]


def name_of(point: Mapping[str, Any]) -> str:
    """Return the value of the axis `cell`, or `axis=value` for every axis, in letters that a path may hold."""
    text = str(point[NAMES]) if NAMES in point else ",".join(f"{name}={value}" for name, value in point.items())
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text).strip("-.")[:_LONGEST_NAME] or "cell"


def show_point(point: Mapping[str, Any]) -> str:
    """Return the values along the axes for a message."""
    return ", ".join(f"{name}={value}" for name, value in point.items()) or "the only one"


def _require_sweepable(grid: Grid, command: Command) -> None:
    if not command.sweepable:
        able = ", ".join(one.name for one in COMMANDS if one.sweepable)
        raise SpecError(
            f"{grid.source}: `vestige {command.name}` cannot be swept, for it leaves no folder (--out) of results. "
            f"Commands to sweep over: {able}."
        )
    names = {name.partition(".")[0] for name in (*grid.base, *grid.axes)}
    for name, why in _REFUSED.items():
        if name in names:
            raise SpecError(f"{grid.source}: `{name}` cannot be a setting of cells: {why}")


def _cell(grid: Grid, command: Command, number: int, point: Mapping[str, Any], out: Path) -> Cell:
    used = _PLACEHOLDER.findall(json.dumps(grid.base))
    # An axis may be there for the placeholders alone, and one for the names of cells.
    spare = {name for name in {NAMES, *used} if name.partition(".")[0] not in command.settings.model_fields}
    values = _fill(grid.base, point) | {name: value for name, value in point.items() if name not in spare}
    settings = command.settings(**_nest({**values, "out": out}))
    named = cell_id(command.name, settings)
    folder = out / "cells" / named
    return Cell(command, named, number, dict(point), settings.model_copy(update={"out": folder / "out"}), folder)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with `options.labels` as the entry `labels` of `options`."""
    nested = {name: value for name, value in values.items() if "." not in name}
    for name, value in values.items():
        whole, dot, entry = name.partition(".")
        if dot:
            held = nested.get(whole, {})
            if not isinstance(held, Mapping):
                raise SpecError(f"`{name}` is an entry of `{whole}`, which is {held!r}. Write `{whole}` as a mapping.")
            nested[whole] = {**held, entry: value}
    return nested


def _fill(value: Any, point: Mapping[str, Any]) -> Any:
    """Return `splits/{seed}.jsonl` with the value of the axis `seed`; braces around anything else stay."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: str(point.get(match[1], match[0])), value)
    if isinstance(value, Mapping):
        return {name: _fill(each, point) for name, each in value.items()}
    return [_fill(each, point) for each in value] if isinstance(value, list | tuple) else value
