"""What a compressor is (linear maps, drawn from named streams of random numbers), and the registered ones.

A compressor is one function `(in_size, out_size, stream, *, option=default) -> LinearMap` under
`@compressor(...)`; with `product="circular"` it takes the sizes of both sides and returns a map for each. Its
keyword-only arguments are its options in the spec language: `int`, a `Literal` of strings, or `str` for free text
without commas and bars. With `located=True` it also takes the component's name and the side. Packages add
compressors through the entry point group `vestige.compressors`: the name, and the function or its module.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, get_type_hints, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import SpecError
from vestige.registry import Registry

WORD = 0xFFFFFFFF


class Stream:
    """A named source of random numbers: the same seed and path give the same numbers everywhere."""

    def __init__(self, seed: int, *path: str | int) -> None:
        self.seed = seed
        self.path = path

    def child(self, *path: str | int) -> "Stream":
        """Return an independent stream for a part of this one's purpose."""
        return Stream(self.seed, *self.path, *path)

    @cached_property
    def keys(self) -> tuple[int, int]:
        """Two 32-bit words; JSON keeps ("a", "b") and ("ab",) apart."""
        purpose = json.dumps([self.seed, *self.path]).encode()
        digest = hashlib.blake2b(purpose, digest_size=8, person=b"vestige").digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def __repr__(self) -> str:
        return f"Stream{(self.seed, *self.path)!r}"


def _mix(word: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Map 32-bit words one to one: an input bit flips every output bit about half the time (in place)."""
    word ^= word >> 16
    word *= 0x21F0AAAD
    word &= WORD
    word ^= word >> 15
    word *= 0x735A2D97
    word &= WORD
    word ^= word >> 15
    return word


def bits(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Return 32 uniform bits for each non-negative 64-bit coordinate, as int64 in [0, 2^32)."""
    first, second = stream.keys
    word = _mix((coordinate & WORD) ^ first)
    word ^= coordinate >> 32
    word += second
    word &= WORD
    return _mix(word)


def signs(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return +1 or -1 with equal probability, float32."""
    return ((bits(stream, coordinate) >> 31) * 2 - 1).to(torch.float32)


def integers(stream: Stream, coordinate: Int[Tensor, "*batch"], limit: int) -> Int[Tensor, "*batch"]:
    """Return integers in [0, limit), uniform up to `limit / 2^32`; `limit` below 2^31."""
    return (bits(stream, coordinate) * limit) >> 32


def gaussians(stream: Stream, coordinate: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return standard normal float32 numbers: the inverse distribution function of 52 random bits.

    The inverse is evaluated in float64 on the CPU, whatever the device, because the special functions of two
    devices need not round alike.
    """
    high, low = bits(stream.child("high"), coordinate), bits(stream.child("low"), coordinate)
    whole = ((high << 20) | (low >> 12)).cpu()
    uniform = (whole.to(torch.float64) + 0.5) / 2.0**52
    return torch.special.ndtri(uniform).to(torch.float32).to(coordinate.device)


def permutation(stream: Stream, size: int) -> Int[Tensor, " size"]:
    """Return a random order of `size` coordinates."""
    return _rank(stream, torch.arange(size)).argsort()


def _rank(stream: Stream, coordinate: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return distinct 63-bit numbers in random order: the hash above, the coordinate (below 2^32) in the low half."""
    return ((bits(stream, coordinate) >> 1) << 32) | coordinate


def permutation_head(stream: Stream, count: int, size: int, block: int = 1 << 22) -> Int[Tensor, " count"]:
    """Return `count` distinct coordinates out of `size`, every subset equally likely, in ascending order.

    They are the coordinates with the smallest hashes, a tie going to the smaller coordinate; hash and
    coordinate share one 63-bit integer, so `size` may be up to 2^32. `block` coordinates are hashed at once.
    """
    best = torch.empty(0, dtype=torch.int64)
    for start in range(0, size, block):
        coordinate = torch.arange(start, min(size, start + block))
        best = torch.cat([best, _rank(stream, coordinate)])
        if len(best) > count:
            best = best.topk(count, largest=False).values
    return (best & WORD).sort().values


@runtime_checkable
class LinearMap(Protocol):
    """A fixed linear map from `in_size` to `out_size` numbers, acting on the last axis.

    The same (seed, name) gives the same map on every device, worker and batch order.
    """

    in_size: int
    out_size: int

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the image of each vector, in the vector's dtype (float32 accumulation for halves)."""
        ...

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return the image of the unit vectors `ids`: `apply(one_hot(ids))` without forming the one-hot."""
        ...

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Return the image under the transposed map: `apply(x) @ y` equals `x @ (this of y)` for all x and y."""
        ...

    def to(self, device: torch.device) -> "LinearMap":
        """Return the same map, with what it stores on `device`: unless overridden, its tensors."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved


Product = Literal["outer", "entrywise", "circular"]


@dataclass(frozen=True)
class Compressor:
    """Maps the gradient `[out, in]` of one component to `size` numbers, from its factors.

    The compressed gradient is `tail(sum_t left(l_t) * right(r_t))`, where `*` is

    - `outer`: the outer product, flattened with the left index major;
    - `entrywise`: the product of entries, for sides that list the rows and columns of the same K coordinates: a
      mask over the whole matrix, gathered without forming the matrix;
    - `circular`: the circular convolution of two vectors of K numbers (TensorSketch).
    """

    left: LinearMap
    right: LinearMap
    tail: LinearMap
    product: Product = "outer"

    @property
    def size(self) -> int:
        """Numbers per example."""
        return self.tail.out_size


class Identity(LinearMap):
    """Keeps every number."""

    def __init__(self, size: int) -> None:
        self.in_size = size
        self.out_size = size

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return the vectors themselves, not a copy."""
        return vectors

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return one-hot rows, float32."""
        return F.one_hot(ids, self.out_size).to(torch.float32)

    def adjoint(self, images: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return the images themselves."""
        return images

    def apply_sparse(
        self, ids: Int[Tensor, "batch entry"], values: Float[Tensor, "batch entry"]
    ) -> Float[Tensor, "batch out"]:
        """Return dense vectors from some coordinates and their values; a repeated coordinate adds up."""
        return values.new_zeros(len(values), self.out_size).scatter_add_(1, ids, values)


class Composed(LinearMap):
    """Several maps, the first one applied first."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps = tuple(maps)
        self.in_size = self.maps[0].in_size
        self.out_size = self.maps[-1].out_size

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the image under all maps."""
        for one in self.maps:
            vectors = one.apply(vectors)
        return vectors

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return the first map's columns, sent through the others."""
        images = self.maps[0].columns(ids)
        for one in self.maps[1:]:
            images = one.apply(images)
        return images

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Apply the adjoints in the opposite order."""
        for one in reversed(self.maps):
            images = one.adjoint(images)
        return images

    def to(self, device: torch.device) -> "Composed":
        """Return every map on `device`."""
        return Composed([one.to(device) for one in self.maps])


def chain(size: int, maps: Sequence[LinearMap]) -> LinearMap:
    """Return one map for a sequence of maps on vectors of `size` numbers; identities vanish."""
    active = [one for one in maps if not isinstance(one, Identity)]
    if not active:
        return Identity(size)
    return active[0] if len(active) == 1 else Composed(active)


Form = Literal["K", "AxB"]
EXAMPLE = "mask:128x128 | sjlt:4096"


class Option(NamedTuple):
    """One option of a compressor: the allowed words (empty: a value of the type) and the default."""

    words: tuple[str, ...]
    default: Any
    type: Any
    """`int` is a whole number of at least 1, `str` free text."""


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
        training: A dataclass of further options, with defaults, for a compressor that `vestige index` trains where no
            `file` is given; `build` does not get them. Its field `examples` is how many are drawn.
        train: From whole gradients `[example, out, in]` of a component, the size, a stream and the training to tensors.
        write: Writes the tensors of all components, named `COMPONENT/NAME`, to the file that `build` gets; returns a
            sentence about them.
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
    training: type | None = None
    train: Callable[[Tensor, tuple[int, ...], Stream, Any], dict[str, Tensor]] | None = None
    write: Callable[[Path, Mapping[str, Tensor]], str] | None = None

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
            one.name: Option(get_args(hints[one.name]), one.default, hints[one.name])
            for one in inspect.signature(build).parameters.values()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        }
        if training := facts.get("training"):
            types = get_type_hints(training)
            options |= {one.name: Option((), one.default, types[one.name]) for one in fields(training)}
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
