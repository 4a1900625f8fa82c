"""The grid: one command, the settings that all cells share, and the axes along which they differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.parsing import parse_yaml
from vestige.settings import nearest
from vestige_recipes.sweep.axes import MOST_CELLS, axis_values, count_points, plain, points
from vestige_recipes.sweep.published import read_published

ID_DIGITS = 16
_KEYS = ("verb", "base", "mode", "axes")


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
        return count_points(self.mode, self.axes)

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that no other grid has; the order of the cells counts."""
        return hashlib.sha256(json.dumps(self.to_dict(), ensure_ascii=False).encode()).hexdigest()[:ID_DIGITS]

    def points(self) -> Iterator[dict[str, Any]]:
        """Return the values along the axes, cell by cell."""
        return points(self.mode, self.axes)

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as a file would hold it, in JSON terms, with ranges written out."""
        axes = {name: list(values) for name, values in self.axes.items()}
        return {"verb": self.verb, "base": self.base, "mode": self.mode, "axes": axes}


def read_grid(source: Any) -> Grid:
    """Return the grid in a YAML or JSON file, in a published configuration (.cfg, .ini), or in a mapping.

    Raises:
        SpecError: It cannot be read, a key is unknown, a range or a list has no values, the lists of a zip differ in
            length, or there are more than 10,000 cells.
    """
    if isinstance(source, Grid):
        return source
    if isinstance(source, Mapping):
        return _grid(source, "The grid")
    path = Path(source)
    content = read_published(path).grid() if path.suffix in (".cfg", ".ini") else _parse(path)
    return _grid(content, str(path))


def _grid(content: Any, source: str) -> Grid:
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


def _parse(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"The grid {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SpecError(f"The grid {path} is neither YAML nor JSON that can be used: {error}.") from None
