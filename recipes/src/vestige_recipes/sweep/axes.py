"""The axes of a grid: lists and ranges of values, and the points that they span."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vestige.errors import SpecError

MOST_CELLS = 10_000
DIGITS = 12
"""Decimals of a range's values: 0.1 + 0.2 is 0.3."""

Axes = Mapping[str, tuple[Any, ...]]

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


def points(mode: str, axes: Axes) -> Iterator[dict[str, Any]]:
    """Return the values along the axes, cell by cell; without axes there is one cell."""
    if not axes:
        return iter([{}])
    rows = zip(*axes.values(), strict=True) if mode == "zip" else itertools.product(*axes.values())
    return (dict(zip(axes, row, strict=True)) for row in rows)


def count_points(mode: str, axes: Axes) -> int:
    """Return the number of cells."""
    lengths = [len(values) for values in axes.values()]
    return max(lengths, default=1) if mode == "zip" else math.prod(lengths)


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
