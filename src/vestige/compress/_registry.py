"""The registered compressors: name, form of the size, options, and the function that builds the map.

A compressor is one function `(in_size, out_size, stream, *, option=default) -> LinearMap` under
`@compressor(...)`; with `product="circular"` it takes the sizes of both sides and returns a map for each. Its
keyword-only arguments are its options in the spec language: `int`, a `Literal` of strings, or `str` for free text
without commas and bars. With `located=True` it also takes the component's name and the side. Packages add
compressors through the entry point group `vestige.compressors`: the name, and the function or its module.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from vestige.compress._maps import Product
from vestige.errors import SpecError
from vestige.registry import Registry

Form = Literal["K", "AxB"]
EXAMPLE = "mask:128x128 | sjlt:4096"


class Option(NamedTuple):
    """One option of a compressor: the allowed words (empty: a positive whole number, or free text) and the default."""

    words: tuple[str, ...]
    default: Any
    free: bool


class Work(NamedTuple):
    """Counts for one token; what is done once for an example is divided by its tokens."""

    products: float = 0
    """Multiply-adds of matrix products."""
    streamed: float = 0
    """Numbers read or written in order."""
    gathered: float = 0
    """Numbers read from computed positions."""
    transformed: float = 0
    """`n log2 n`, summed over Fourier transforms of n numbers."""

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """Add the other work, `times` over."""
        return Work(*(one + times * more for one, more in zip(self, other, strict=True)))


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
        work: Work of a map of a vector to fewer numbers, from both sizes, for `auto` and the doctor.
        picks: Whether it keeps coordinates, which of a whole gradient can be gathered without forming it.
        shareable: Whether its numbers have mean zero, so that components can share a sketch that is wider than one.
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
    work: Callable[[int, int], Work] = lambda size, kept: Work(products=size * kept, streamed=size)
    picks: bool = False
    located: bool = False
    shareable: bool = False

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option of the compressor, given or not."""
        return {key: options.get(key, option.default) for key, option in self.options.items()}


COMPRESSORS: Registry[Kind] = Registry("vestige.compressors", "compressor", Kind)


def compressor(
    name: str, *, forms: tuple[Form, ...], example: str, **facts: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a compressor to the spec language under `name`; `facts` are further attributes of `Kind`."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(build)
        options = {
            one.name: Option(get_args(hints[one.name]), one.default, hints[one.name] is str)
            for one in inspect.signature(build).parameters.values()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        }
        COMPRESSORS.add(name, Kind(name, forms, example, options, build, **facts))
        return build

    return register


def list_compressors() -> list[str]:
    """Return every name of the spec language, `none` first."""
    return ["none", *COMPRESSORS.names()]


def find_compressor(name: str, given: str) -> Kind:
    """Return the compressor called `name`; `given` is the stage as typed, for the message."""
    try:
        return COMPRESSORS.find(name)
    except SpecError as error:
        raise SpecError(f"{error} In '{given}'. Example: --compress '{EXAMPLE}'.") from None
