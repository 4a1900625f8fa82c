"""The compression language: `mask:128x128 | sjlt:4096` to a compressor for any component.

    spec   = stage { "|" stage }
    stage  = name [ ":" size { "," option "=" value } ]
    size   = K       the whole (flattened) gradient to K numbers
           | AxB     the output side to A and the input side to B numbers

`logra:K` divides K between the sides of each gradient. A stage that would not make its input smaller is the
identity, with scale one: a layer narrower than K keeps everything. Only in a sketch that all components share is
the last stage never skipped.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from vestige.compress._mask import Coordinates
from vestige.compress._registry import (
    COMPRESSORS,
    EXAMPLE,
    Compressor,
    Identity,
    Kind,
    LinearMap,
    Product,
    Stream,
    chain,
    find_compressor,
)
from vestige.errors import SpecError
from vestige.gradients import Side

_LEGACY = re.compile(r"([a-z_]+?)(?:_([0-9]+))?-([1-9][0-9]*)(?:[*x×]([1-9][0-9]*))?", re.IGNORECASE)
_NAMES = {
    "random": "mask",
    "randommask": "mask",
    "random_mask": "mask",
    "selective_mask": "selective",
    "selectivemask": "selective",
    "gaussian": "gauss",
    "normal": "gauss",
    "identity": "none",
}
_GRASS_BLOWUP = 4  # published default: the mask keeps four times as many numbers as the sketch


def modern_spelling(stage: str) -> list[str]:
    """Return the stage in the language; itself when it is not one of the old spellings.

    A dense projection with a size for each side is `logra`; GraSS and FactGraSS are two stages each. Options belong to
    the sketch, except those of `selective_grass`, which name the file of its mask.
    """
    if stage.lower() == "identity":
        return ["none"]
    head, comma, options = stage.partition(",")
    match = _LEGACY.fullmatch(head.strip())
    if match is None:
        return [_dense_sides(stage)]
    name, blowup, first, second = match[1].lower(), match[2], int(match[3]), match[4]
    if name in ("grass", "selective_grass") and not second:
        kept = int(blowup or _GRASS_BLOWUP) * first
        if name == "grass":
            return [f"mask:{kept}", f"sjlt:{first}{comma}{options}"]
        return [f"selective:{kept}{comma}{options}", f"sjlt:{first}"]
    if name == "factgrass" and not second and not blowup:
        return [_factgrass_mask(first, stage), f"sjlt:{first}{comma}{options}"]
    if blowup:
        return [stage]
    size = f"{first}x{second}" if second else f"{first}"
    return [_dense_sides(f"{_NAMES.get(name, name)}:{size}{comma}{options}")]


def _factgrass_mask(size: int, given: str) -> str:
    side = math.isqrt(size)
    if side * side != size:
        near = max(1, round(math.sqrt(size))) ** 2
        raise SpecError(
            f"'{given}': FactGraSS keeps 2*sqrt(K) entries of each side, so K must be a square. "
            f"Write factgrass-{near}, or give the sides yourself: 'mask:{2 * side}x{2 * side} | sjlt:{size}'."
        )
    return f"mask:{2 * side}x{2 * side}"


def _dense_sides(stage: str) -> str:
    """Rewrite `gauss:64x64` and `rademacher:64x64`: they are Kronecker projections, whose name is `logra`."""
    match = re.fullmatch(r"(gauss|rademacher)\s*:\s*([0-9]+[x*×][0-9]+)", stage.strip(), re.IGNORECASE)
    if match is None:
        return stage
    return f"logra:{match[2]}" + (",init=rademacher" if match[1].lower() == "rademacher" else "")


_SIZE = re.compile(r"([1-9][0-9]*)(?:[xX*×]([1-9][0-9]*))?")


@dataclass(frozen=True)
class Stage:
    """One stage: a compressor's name, K or (A, B), and the options that differ from their defaults, sorted."""

    name: str
    size: tuple[int, ...]
    options: tuple[tuple[str, str | int | float], ...] = ()
    folder: Path | None = field(default=None, compare=False)
    """Where a file that is written @FILE lies: in the folder of the index that it was trained for."""

    @property
    def text(self) -> str:
        """The stage in the language."""
        options = "".join(f",{key}={value}" for key, value in self.options)
        return f"{self.name}:{'x'.join(map(str, self.size))}{options}"

    @property
    def kind(self) -> Kind:
        """The registered compressor."""
        return find_compressor(self.name, self.text)

    @property
    def training(self) -> Any:
        """Return how it is trained: an instance of what its kind names."""
        assert self.kind.training is not None, "a stage of a kind that is trained"
        names = {one.name for one in fields(self.kind.training)}
        return self.kind.training(**{key: value for key, value in self.options if key in names})

    @property
    def is_untrained(self) -> bool:
        """Return whether it has to be trained, and is not."""
        return self.kind.train is not None and not dict(self.options).get("file")

    @property
    def on_sides(self) -> bool:
        """Return whether it acts on each side of the matrix."""
        return len(self.size) == 2 or self.kind.allocate is not None

    def keep_sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return what it keeps of each side of `shape`, if it acts on the sides."""
        rows, columns = shape
        if len(self.size) == 1:
            assert self.kind.allocate is not None, "a stage on the whole gradient keeps no sides"
            return self.kind.allocate(shape, self.size[0], self.kind.with_defaults(dict(self.options)))
        return min(rows, self.size[0]), min(columns, self.size[1])

    def shrinks(self, shape: tuple[int, int]) -> bool:
        """Return whether it keeps less than all of a gradient `[out, in]`."""
        return self.keep_sides(shape) != shape if self.on_sides else self.size[0] < math.prod(shape)

    def build(
        self, in_size: int, out_size: int, stream: Stream, component: str, side: Side | None, shared: bool = False
    ) -> LinearMap:
        """Build its map from `in_size` to at most `out_size` numbers; to exactly `out_size` if `shared`."""
        if out_size >= in_size and not shared:
            return Identity(in_size)
        if self.is_untrained:
            raise SpecError(
                f"'{self.text}' is trained by vestige index, which keeps the result with the index. Elsewhere name a "
                f"file: '{self.text},file=masks.safetensors'. Random coordinates need none: write 'mask'."
            )
        where = (component, side) if self.kind.located else ()
        own = stream if side is None else stream.child(side)
        return self.kind.build(in_size, out_size, own, *where, **self._for_build())

    def _for_build(self) -> dict[str, Any]:
        """Return the options without those of the training, and the file at its path."""
        left_out = {one.name for one in fields(self.kind.training)} if self.kind.training else set()
        given = in_folder(dict(self.options), self.folder)
        return {key: value for key, value in given.items() if key not in left_out}


@dataclass(frozen=True)
class CompressionSpec:
    """A parsed spec. Equal specs build equal compressors."""

    stages: tuple[Stage, ...]

    @property
    def canonical(self) -> str:
        """The one spelling that is written to disk."""
        return " | ".join(stage.text for stage in self.stages) or "none"

    def __str__(self) -> str:
        return self.canonical

    def forget_trained(self) -> "CompressionSpec":
        """Return the spec as it was requested, before anything was trained for it."""

        def forget(stage: Stage) -> Stage:
            if not str(dict(stage.options).get("file", "")).startswith("@"):
                return stage
            kept = tuple((key, value) for key, value in stage.options if key not in ("file", "digest"))
            return replace(stage, options=kept)

        return CompressionSpec(tuple(map(forget, self.stages)))

    def size_for(self, shape: tuple[int, int], *, shared: bool = False) -> int:
        """Return how many numbers a gradient `[out, in]` keeps; a vector of n is `(n, 1)`, `shared` as in `build`."""
        if shared:
            return self._size_of_shared()
        size = math.prod(shape)
        for stage in self.stages:
            if stage.on_sides:
                shape = stage.keep_sides(shape)
                size = math.prod(shape)
            else:
                size = min(size, stage.size[0])
        return size

    def _size_of_shared(self) -> int:
        """Return the size of a sketch that all components share."""
        last = self.stages[-1] if self.stages else None
        if last is not None and last.kind.shareable and len(last.size) == 1:
            return last.size[0]
        able = [kind.name for kind in COMPRESSORS if kind.shareable]
        raise SpecError(
            f"'{self.canonical}' cannot be summed over the whole model: the sketches of all components are added "
            "up there, so the last stage has to spread every component, however small, over the same K numbers "
            f"with random signs of its own. End the spec with {' or '.join(f'{name}:K' for name in able)}, "
            f"for example '{EXAMPLE}'."
        )

    def build(
        self,
        name: str,
        shape: tuple[int, int],
        seed: int,
        device: torch.device | str = "cpu",
        *,
        shared: bool = False,
    ) -> Compressor:
        """Build the compressor of the component `name` with gradients `[out, in]`.

        Its randomness depends on seed, name, and the number and side of each stage, on nothing else: every worker
        builds the same map, and two components, stages or sides share no random number.

        With `shared`, every component has the same size K, also those with fewer than K numbers, and compressed
        gradients of different components may be added up: the sum is an unbiased sketch of the whole gradient,
        because the inner product of two components' sketches is zero on average.

        Raises:
            SpecError: With `shared`, when the last stage is not one number of sjlt, gauss or rademacher.
        """
        last = len(self.stages) - 1
        if shared:
            self._size_of_shared()
        lefts: list[LinearMap] = []
        rights: list[LinearMap] = []
        tails: list[LinearMap] = []
        rows, columns = shape
        size = rows * columns
        product: Product = "outer"
        for number, stage in enumerate(self.stages):
            stream = Stream(seed, name, number, stage.name)
            if stage.on_sides:
                kept = stage.keep_sides((rows, columns))
                lefts.append(stage.build(rows, kept[0], stream, name, "left", shared and number == last))
                rights.append(stage.build(columns, kept[1], stream, name, "right", shared and number == last))
                rows, columns = lefts[-1].out_size, rights[-1].out_size
                size = rows * columns
            elif stage.kind.product != "circular":
                tails.append(stage.build(size, stage.size[0], stream, name, None, shared and number == last))
                size = tails[-1].out_size
            elif stage.size[0] < size:
                left, right = stage.kind.build((rows, columns), stage.size[0], stream, **dict(stage.options))
                lefts.append(left)
                rights.append(right)
                size, product = stage.size[0], "circular"
        maps = chain(shape[0], lefts), chain(shape[1], rights)
        return _assemble(shape, maps, tails, product, torch.device(device))


def _assemble(
    shape: tuple[int, int],
    sides: tuple[LinearMap, LinearMap],
    tails: Sequence[LinearMap],
    product: Product,
    device: torch.device,
) -> Compressor:
    left, right = sides
    tails = [one for one in tails if not isinstance(one, Identity)]
    untouched = isinstance(left, Identity) and isinstance(right, Identity)
    if untouched and tails and isinstance(mask := tails[0], Coordinates):
        tails = tails[1:]
        left = Coordinates(shape[0], mask.index // shape[1], mask.scale)
        right = Coordinates(shape[1], mask.index % shape[1], 1.0)
        product = "entrywise"
    size = left.out_size * right.out_size if product == "outer" else left.out_size
    return Compressor(left.to(device), right.to(device), chain(size, tails).to(device), product)


def parse_spec(text: str, folder: Path | None = None) -> CompressionSpec:
    """Parse `text`, a spec in the language above or in one of the published spellings.

    Args:
        text: The spec.
        folder: Of the index whose spec it is, in which files written @FILE lie.

    Raises:
        SpecError: With what was given, what was expected and an example.
    """
    stages: list[Stage] = []
    for part in text.split("|"):
        given = part.strip()
        if not given:
            raise SpecError(
                f"The compression spec {text!r} has an empty stage. Write stages joined by '|', "
                f"for example '{EXAMPLE}', or 'none'."
            )
        for modern in modern_spelling(given):
            stages.extend(_parse_stage(modern, given, folder))
    _check_order(stages)
    return CompressionSpec(tuple(stages))


def _parse_stage(text: str, given: str, folder: Path | None) -> list[Stage]:
    head, *pairs = (piece.strip() for piece in text.split(","))
    name, colon, size_text = (piece.strip() for piece in head.partition(":"))
    if name.lower() == "none":
        if colon or pairs:
            raise SpecError(f"'none' takes no size and no options, given '{given}'. Write --compress none.")
        return []
    kind = find_compressor(name.lower(), given)
    size = _parse_size(kind, size_text, given)
    options = _parse_options(kind, pairs, given)
    if kind.check:
        kind.check(size, kind.with_defaults(options))
    if kind.complete:
        options = {**kind.complete(size, in_folder(options, folder)), **options}
    changed = {key: value for key, value in options.items() if value != kind.options[key].default}
    return [Stage(kind.name, size, tuple(sorted(changed.items())), folder)]


def in_folder(options: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the options with a file that is written @FILE at its path in the folder."""
    file = str(options.get("file", ""))
    return {**options, "file": str(folder / file[1:])} if folder is not None and file.startswith("@") else dict(options)


def _parse_size(kind: Kind, text: str, given: str) -> tuple[int, ...]:
    match = _SIZE.fullmatch(re.sub(r"\s", "", text))
    form = ("AxB" if match[2] else "K") if match else None
    if match is None or form not in kind.forms:
        forms = " or ".join(f"{kind.name}:{form}" for form in kind.forms)
        raise SpecError(f"'{given}': expected {forms} with whole numbers of at least 1, for example '{kind.example}'.")
    return tuple(int(number) for number in match.groups() if number)


def _parse_options(kind: Kind, pairs: Sequence[str], given: str) -> dict[str, str | int | float]:
    options: dict[str, str | int | float] = {}
    for pair in pairs:
        key, _, value = (piece.strip() for piece in pair.partition("="))
        key = key.lower()
        if key not in kind.options:
            allowed = ", ".join(kind.options) or "none"
            raise SpecError(f"'{given}': {kind.name} has no option '{key}' (its options: {allowed}).")
        words, _, of_type = kind.options[key]
        if of_type in (str, float):
            options[key] = value if of_type is str else _parse_number(key, value, given)
            continue
        value = value.lower()
        if words and value not in words:
            raise SpecError(f"'{given}': {key} must be {' or '.join(words)}, given '{value}'.")
        if not words and not re.fullmatch("[1-9][0-9]*", value):
            raise SpecError(f"'{given}': {key} must be a whole number of at least 1, given '{value}'.")
        options[key] = value if words else int(value)
    return options


def _parse_number(key: str, value: str, given: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(f"'{given}': {key} must be a number such as 0.01, given '{value}'.")
    return number


def _check_order(stages: Sequence[Stage]) -> None:
    whole = None
    for stage in stages:
        needs_sides = stage.on_sides or stage.kind.product == "circular"
        if needs_sides and whole is not None:
            raise SpecError(
                f"'{whole.text} | {stage.text}': {whole.text} keeps numbers of the flattened gradient, which has no "
                f"output and input side left for {stage.text}. Put that stage first: '{stage.text} | {whole.text}'."
            )
        if not stage.on_sides:
            whole = stage
