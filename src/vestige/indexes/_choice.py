"""The compressor for `--compress auto`: the most precise one whose work stays small beside the model's own."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vestige.compress import CompressionSpec, cost_share, parse_spec
from vestige.indexes._inputs import Inputs
from vestige.models import Component

MOST_SHARE = 0.25
"""Most that compressing may take, as a share of the forward and backward passes of the same linear layers."""
FEWEST = 16
"""Least numbers per component: below, scores are noise."""


class Expected(NamedTuple):
    """One compressor, with what is expected of its scores."""

    spec: CompressionSpec
    error: float
    """Root mean square error of a cosine."""
    full: bool
    """Whether it keeps as many numbers as it may."""


class Candidate(NamedTuple):
    """The same with its cost."""

    spec: CompressionSpec
    error: float
    full: bool
    share: float
    """Of the linear layers' own forward and backward passes."""


class Choice(NamedTuple):
    """The chosen compressor, and the more precise one that was too expensive, if there was one."""

    taken: Candidate
    passed_over: Candidate | None
    device: str
    """Kind of device that the costs are of."""

    @property
    def reason(self) -> str:
        """Return one or two sentences for the user."""
        taken, other = self.taken, self.passed_over
        cost = (
            f"Compressing takes about {taken.share:.0%} of the forward and backward passes of the same layers "
            f"({self.device})"
        )
        if taken.share > MOST_SHARE:
            return f"{cost}: nothing stays under {MOST_SHARE:.0%}, and this is the cheapest of this size."
        if other is None:
            return f"{cost}; nothing more precise fits."
        return f"{cost}; {other.spec}, more precise, would take {other.share:.0%}, more than {MOST_SHARE:.0%}."


def choose_for(inputs: Inputs, width: int) -> Choice:
    """Choose for a model on its device and examples as long as these are on average."""
    device = next(inputs.loaded.model.parameters()).device.type
    components = inputs.selection.components
    linear = [component.shape for component in components if _is_linear(component)]
    return choose(candidates(inputs, width), linear, round(float(np.mean(inputs.data.lengths))), device)


def _is_linear(component: Component) -> bool:
    """Return whether the layer's own work is a matrix product: vectors and look-ups cost next to nothing."""
    used = any(use.kind not in ("embedding", "norm", "relative_bias") for use in component.uses)
    return used and min(component.shape) > 1


def candidates(inputs: Inputs, width: int) -> list[Expected]:
    """Return compressors that keep at most `width` numbers per component on average."""
    shapes = [component.shape for component in inputs.selection.components]
    return [one for one in _compressors(width) if sum(map(one.spec.size_for, shapes)) <= width * len(shapes)]


def choose(compressors: Sequence[Expected], linear: Sequence[tuple[int, int]], tokens: int, device: str) -> Choice:
    """Choose the smallest expected error with a cost under `MOST_SHARE`, else the cheapest at full width.

    Narrower ones take part too: with half of the numbers a tensor sketch is often more precise than a cheaper
    compressor with all of them.

    Args:
        compressors: To choose from.
        linear: Shapes `[out, in]` of the layers whose work the cost is compared with.
        tokens: Tokens of an example.
        device: Kind of device: `cpu`, `cuda`, ...
    """
    priced = [
        Candidate(*one, cost_share(one.spec, linear, max(1, tokens), device) if linear else 0.0) for one in compressors
    ]
    priced.sort(key=lambda one: (one.error, one.share))
    affordable = [one for one in priced if one.share <= MOST_SHARE]
    taken = affordable[0] if affordable else min((one for one in priced if one.full), key=lambda one: one.share)
    better = [one for one in priced if one.error < taken.error]
    return Choice(taken, better[0] if better else None, device)


def _compressors(width: int) -> Iterator[Expected]:
    """Yield compressors to `width` numbers, and to each smaller power of two.

    A sketch of the whole gradient is off by `1 / sqrt(K)`. Maps of the two sides multiply two errors, each of about the
    square root of that; their factors are what `benchmarks/sketch_quality.py` measured on a small trained GPT (0.58 to
    0.64 for LoGra, 0.42 to 0.60 for FactGraSS).
    """
    powers = [1 << place for place in range(width.bit_length(), 0, -1) if FEWEST <= 1 << place < width]
    for size in [width, *powers]:
        full, side = size == width, 2 * math.isqrt(size)
        smooth = fast_length(size)
        yield Expected(parse_spec(f"tensorsketch:{smooth}"), smooth**-0.5, full)
        yield Expected(parse_spec(f"sjlt:{size}"), size**-0.5, full)
        yield Expected(parse_spec(f"mask:{side}x{side} | sjlt:{size}"), 0.51 * size**-0.25, full)
        yield Expected(parse_spec(f"logra:{size}"), 0.60 * size**-0.25, full)


def fast_length(most: int) -> int:
    """Return the largest number up to `most` without a prime factor above 5: Fourier transforms of it are fast."""
    return next(size for size in range(most, 0, -1) if _is_smooth(size))


def _is_smooth(size: int) -> bool:
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1
