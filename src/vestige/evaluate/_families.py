"""A compressor at every size: a spec with K for the size and R for the side of a square of that size."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from vestige.compress import CompressionSpec, parse_spec

PUBLISHED = (
    "tensorsketch:K",
    "sjlt:K",
    "fjlt:K",
    "gauss:K",
    "rademacher:K",
    "logra:RxR",
    "mask:2Rx2R | sjlt:K",
    "mask:4K | sjlt:K",
    "mask:RxR",
    "mask:K",
)
"""Tensor sketch, SJLT, FJLT, dense projections, LoGra, FactGraSS and GraSS with their published intermediate size 4 K,
and the masks, each with about K numbers per component."""

_SYMBOL = re.compile(r"(\d*)([KR])")


@dataclass(frozen=True)
class Family:
    """Specs that differ in their size only; one without K and R is a family of one."""

    template: str

    @property
    def sized(self) -> bool:
        """True if the size enters."""
        return self._with("1") != self._with("2")

    def at(self, size: int) -> CompressionSpec:
        """Return the spec with `size` for K and the nearest whole number to its square root for R.

        Raises:
            SpecError: It does not parse.
        """
        values = {"K": size, "R": max(1, round(math.sqrt(size)))}
        return parse_spec(self._with(lambda found: str(int(found[1] or 1) * values[found[2]])))

    def _with(self, replacement: str | Callable[[re.Match[str]], str]) -> str:
        """Return the template with K and R replaced where sizes stand: behind the colon, before any option."""
        stages = []
        for stage in self.template.split("|"):
            head, comma, options = stage.partition(",")
            name, colon, size = head.partition(":")
            stages.append(name + colon + _SYMBOL.sub(replacement, size) + comma + options)
        return "|".join(stages)


def rank(spec: CompressionSpec, shapes: list[tuple[int, int]]) -> int:
    """Return the numbers that a spec keeps of the component of which it keeps most: its size, where no K is in it."""
    return max(spec.size_for(shape) for shape in shapes)
