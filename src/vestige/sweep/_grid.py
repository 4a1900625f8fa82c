"""The grid: one verb, the settings that all cells share, and the axes along which they differ."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.parsing import parse_yaml
from vestige.settings import nearest

MOST_CELLS = 10_000
DIGITS = 12
"""Decimals of a range's values: 0.1 + 0.2 is 0.3."""

_KEYS = ("verb", "base", "mode", "axes")
_RANGE = ("start", "stop", "step")
_STEPS_SLACK = 1e-9
"""How far short of a whole number of steps `stop` may be and still count."""


@dataclass(frozen=True)
class Grid:
    """What to run: checked as far as it can be without knowing the verb."""

    verb: str
    base: dict[str, Any]
    mode: str
    """product: every combination, the last axis fastest; zip: the first values, the second ones, and so on."""
    axes: dict[str, tuple[Any, ...]]
    source: str
    """What errors call it."""

    def __len__(self) -> int:
        return _size(self.mode, self.axes)

    def points(self) -> Iterator[dict[str, Any]]:
        """The values along the axes, cell by cell."""
        rows = zip(*self.axes.values(), strict=True) if self.mode == "zip" else itertools.product(*self.axes.values())
        return (dict(zip(self.axes, row, strict=True)) for row in rows) if self.axes else iter([{}])

    def to_dict(self) -> dict[str, Any]:
        """The grid as a file would hold it, in JSON terms, ranges written out."""
        axes = {name: list(values) for name, values in self.axes.items()}
        return {"verb": self.verb, "base": self.base, "mode": self.mode, "axes": axes}


def read_grid(source: Any) -> Grid:
    """The grid in a YAML or JSON file, in a published configuration (.cfg, .ini), or in a mapping.

    Raises:
        SpecError: It cannot be read, a key is unknown, a range or a list has no values, the lists of a zip differ in
            length, or there are more than 10,000 cells.
    """
    if isinstance(source, Grid):
        return source
    if isinstance(source, Mapping):
        return _grid(source, "The grid")
    path = Path(source)
    if path.suffix in (".cfg", ".ini"):
        from vestige.sweep._published import read_published

        return _grid(read_published(path).grid(), str(path))
    return _grid(_parse(path), str(path))


def axis_values(given: Any, name: str, source: str) -> tuple[Any, ...]:
    """The values of an axis: of a list, or of a range whose `stop` is part of it.

    Raises:
        SpecError: It is neither, or has no values.
    """
    if isinstance(given, Mapping):
        return _range(given, name, source)
    if not isinstance(given, list | tuple):
        raise SpecError(
            f"{source}: axis `{name}` is {given!r}. Expected a list such as [1, 2], or a range such as "
            "{start: 0, stop: 1, step: 0.1}. A value that all cells share belongs under `base`."
        )
    if not given:
        raise SpecError(f"{source}: axis `{name}` has no values, so there would be no cell.")
    return tuple(given)


def _grid(content: Any, source: str) -> Grid:
    if not isinstance(content, Mapping):
        raise SpecError(f"{source} holds a {type(content).__name__}. Expected verb, base, mode and axes.")
    for name in content:
        if name not in _KEYS:
            hint = nearest(str(name), list(_KEYS)).replace("Known settings", "A grid has")
            raise SpecError(
                f"{source}: unknown key `{name}`. {hint} Settings of the verb belong under `base` or `axes`."
            )
    verb, mode = content.get("verb"), content.get("mode", "product")
    if not isinstance(verb, str):
        raise SpecError(f"{source}: `verb` is {verb!r}. Expected the verb to run in every cell, such as `verb: index`.")
    if mode not in ("product", "zip"):
        raise SpecError(f"{source}: `mode` is {mode!r}. Expected product (every combination) or zip (side by side).")
    base, given = _mapping(content, "base", source), _mapping(content, "axes", source)
    for name in given:
        if name in base:
            raise SpecError(f"{source}: `{name}` stands under `base` and under `axes`. Drop one of them.")
    axes = {name: axis_values(values, name, source) for name, values in given.items()}
    _require_fit(mode, axes, source)
    return Grid(verb, {name: _plain(value, name, source) for name, value in base.items()}, mode, axes, source)


def _mapping(content: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise SpecError(f"{source}: `{key}` is {value!r}. Expected settings by name.")
    return {str(name): each for name, each in (value or {}).items()}


def _require_fit(mode: str, axes: Mapping[str, tuple[Any, ...]], source: str) -> None:
    lengths = {name: len(values) for name, values in axes.items()}
    shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
    if mode == "zip" and len(set(lengths.values())) > 1:
        raise SpecError(f"{source}: in mode zip all axes have as many values, and these have: {shown}.")
    if (cells := _size(mode, axes)) > MOST_CELLS:
        raise SpecError(f"{source}: {cells:,} cells ({shown}), and at most {MOST_CELLS:,} are run. Make several grids.")
    for name, values in axes.items():
        for value in values:
            _plain(value, name, source)


def _size(mode: str, axes: Mapping[str, tuple[Any, ...]]) -> int:
    lengths = [len(values) for values in axes.values()]
    return max(lengths, default=1) if mode == "zip" else math.prod(lengths)


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


def _plain(value: Any, name: str, source: str) -> Any:
    """The value in JSON terms: a cell's id is that of its settings, which a live object has none of."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(each, name, source) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each, name, source) for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SpecError(f"{source}: `{name}` is a live {type(value).__name__}. Save it and give the path: cells are files.")


def _parse(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"The grid {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SpecError(f"The grid {path} is neither YAML nor JSON that can be used: {error}.") from None
