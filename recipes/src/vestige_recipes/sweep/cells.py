"""The cells of a grid: complete settings, checked before anything runs, in a folder named after them.

A cell's id is a digest of the command and of every setting that could change its result. So the same cell of a larger
grid is the same folder, and two cells that differ in anything, the number of epochs included, never share one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.registry import COMMANDS, Command
from vestige.settings import LaunchSettings, Settings
from vestige_recipes.sweep.grid import ID_DIGITS, Grid

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
    for number, point in enumerate(grid.points()):
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
    values = _filled(grid.base, point) | {name: value for name, value in point.items() if name not in spare}
    settings = command.settings(**_nested({**values, "out": out}))
    named = cell_id(command.name, settings)
    folder = out / "cells" / named
    return Cell(command, named, number, dict(point), settings.model_copy(update={"out": folder / "out"}), folder)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
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


def _filled(value: Any, point: Mapping[str, Any]) -> Any:
    """Return `splits/{seed}.jsonl` with the value of the axis `seed`; braces around anything else stay."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda match: str(point.get(match[1], match[0])), value)
    if isinstance(value, Mapping):
        return {name: _filled(each, point) for name, each in value.items()}
    return [_filled(each, point) for each in value] if isinstance(value, list | tuple) else value
