"""The registered compressors: name, form of the size, options, and the function that builds the map.

A compressor is one function `(in_size, out_size, stream, *, option=default) -> LinearMap` under
`@compressor(...)`; with `product="circular"` it takes the sizes of both sides and returns a map for each. Its
keyword-only arguments are its options in the spec language: `int`, a `Literal` of strings, or `str` for free text
without commas and bars. With `located=True` it also takes the component's name and the side. Packages add
compressors through the entry point group `vestige.compressors`; loading the entry point has to run the decorator.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from vestige.compress._types import Product
from vestige.errors import SpecError

Form = Literal["K", "AxB"]
EXAMPLE = "mask:128x128 | sjlt:4096"


class Option(NamedTuple):
    """One option of a compressor: the allowed words (empty: a positive whole number, or free text) and the default."""

    words: tuple[str, ...]
    default: Any
    free: bool = False


@dataclass(frozen=True)
class Kind:
    """One registered compressor.

    Attributes:
        name: The word in the spec language.
        forms: `K` when it maps the whole gradient to K numbers, `AxB` when it maps each side of the matrix.
        example: A stage that parses.
        options: Option names with their allowed values.
        build: Makes the map or the two maps; called only when the output is smaller than the input.
        product: How the two sides are multiplied.
        check: Raises SpecError for a combination of size and options that cannot work.
        allocate: For a `K` that is divided between the sides: from the gradient's shape, K and all options to (A, B).
        complete: From size and options to the options that are written to disk, such as a file's digest.
        located: Whether `build` takes the component's name and the side (None: the whole gradient) as well.
    """

    name: str
    forms: tuple[Form, ...]
    example: str
    options: Mapping[str, Option]
    build: Callable[..., Any]
    product: Product = "outer"
    check: Callable[[tuple[int, ...], Mapping[str, Any]], None] | None = None
    allocate: Callable[[tuple[int, int], int, Mapping[str, Any]], tuple[int, int]] | None = None
    complete: Callable[[tuple[int, ...], Mapping[str, Any]], Mapping[str, Any]] | None = None
    located: bool = False

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option of the compressor, given or not."""
        return {key: options.get(key, option.default) for key, option in self.options.items()}


_kinds: dict[str, Kind] = {}


def compressor(
    name: str,
    *,
    forms: tuple[Form, ...],
    example: str,
    product: Product = "outer",
    check: Callable[[tuple[int, ...], Mapping[str, Any]], None] | None = None,
    allocate: Callable[[tuple[int, int], int, Mapping[str, Any]], tuple[int, int]] | None = None,
    complete: Callable[[tuple[int, ...], Mapping[str, Any]], Mapping[str, Any]] | None = None,
    located: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a compressor to the spec language under `name`."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        _kinds[name] = Kind(name, forms, example, _options(build), build, product, check, allocate, complete, located)
        return build

    return register


def _options(build: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(build)
    return {
        parameter.name: Option(get_args(hints[parameter.name]), parameter.default, free=hints[parameter.name] is str)
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def known_compressors() -> list[str]:
    """Return every name of the spec language, `none` first."""
    _load_entry_points()
    return ["none", *sorted(_kinds)]


def find_compressor(name: str, given: str) -> Kind:
    """Return the compressor called `name`; `given` is the stage as typed, for the message.

    Raises:
        SpecError: No compressor has this name.
    """
    if name not in _kinds:
        _load_entry_points()
    if name in _kinds:
        return _kinds[name]
    names = known_compressors()
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise SpecError(
        f"Unknown compressor '{name}' in '{given}'.{hint} Known: {', '.join(names)}. Example: --compress '{EXAMPLE}'."
    )


_loaded: set[str] = set()


def _load_entry_points() -> None:
    for point in entry_points(group="vestige.compressors"):
        if point.value not in _loaded:
            _loaded.add(point.value)
            point.load()
