"""The compressor for `--compress auto`: the most precise one whose work stays small beside the model's own."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vestige.compress import CompressionSpec, cost_share, parse_spec
from vestige.errors import DiskSpaceError, SpecError
from vestige.indexes._inputs import Inputs
from vestige.indexes._manifest import BYTES_PER_NUMBER, lay_out
from vestige.models import Component
from vestige.progress import announce, format_bytes
from vestige.settings import CompressionSettings

MOST_SHARE = 0.25
"""Most that compressing may take, as a share of the forward and backward passes of the same linear layers."""
FEWEST = 16
"""Least numbers per component: below, scores are noise."""
MOST = 4096
"""Most numbers per component that `auto` takes: more bytes bring little."""
FEWEST_SHARED = 256
"""Least numbers for the whole model, whose components disturb each other in them."""
ROW_BYTES = 64 * 2**10
"""Bytes per example that `auto` aims at when no budget is given: a million examples in 64 GiB."""


class Candidate(NamedTuple):
    """One compressor, with what is expected of its scores and its cost."""

    spec: CompressionSpec
    error: float
    """Root mean square error of a cosine."""
    full: bool
    """Whether it keeps as many numbers as it may."""
    share: float = 0.0
    """Work, as a share of the linear layers' own forward and backward passes."""


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


def choose_compressor(
    compressors: Iterable[Candidate], linear: Sequence[tuple[int, int]], tokens: int, device: str
) -> Choice:
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
        one._replace(share=cost_share(one.spec, linear, max(1, tokens), device)) if linear else one
        for one in compressors
    ]
    priced.sort(key=lambda one: (one.error, one.share))
    affordable = [one for one in priced if one.share <= MOST_SHARE]
    taken = affordable[0] if affordable else min((one for one in priced if one.full), key=lambda one: one.share)
    better = [one for one in priced if one.error < taken.error]
    return Choice(taken, better[0] if better else None, device)


def list_candidates(width: int) -> Iterator[Candidate]:
    """Yield compressors to `width` numbers, and to each smaller power of two.

    A sketch of the whole gradient is off by `1 / sqrt(K)`. Maps of the two sides multiply two errors, each of about the
    square root of that; their factors are what `benchmarks/sketch_quality.py` measured on a small trained GPT (0.58 to
    0.64 for LoGra, 0.42 to 0.60 for FactGraSS).
    """
    powers = [1 << place for place in range(width.bit_length(), 0, -1) if FEWEST <= 1 << place < width]
    for size in [width, *powers]:
        full, side = size == width, 2 * math.isqrt(size)
        smooth = fast_length(size)
        yield Candidate(parse_spec(f"tensorsketch:{smooth}"), smooth**-0.5, full)
        yield Candidate(parse_spec(f"sjlt:{size}"), size**-0.5, full)
        yield Candidate(parse_spec(f"mask:{side}x{side} | sjlt:{size}"), 0.51 * size**-0.25, full)
        yield Candidate(parse_spec(f"logra:{size}"), 0.60 * size**-0.25, full)


def fast_length(most: int) -> int:
    """Return the largest number up to `most` without a prime factor above 5: Fourier transforms of it are fast."""
    return next(size for size in range(most, 0, -1) if 60 ** size.bit_length() % size == 0)


def choose_spec(
    settings: CompressionSettings, inputs: Inputs, *, earlier: CompressionSpec | None = None
) -> CompressionSpec:
    """Return the requested compression, or with `auto` the choice for the disk budget and the device.

    For the whole model that is the widest tensor sketch, followed by a sparse projection of the same width, because
    components cannot share a tensor sketch. An index that was begun goes on with its own choice, `earlier`, if the
    budget still allows it: on another kind of device another compressor may be cheaper.

    Raises:
        DiskSpaceError: Nothing fits the budget.
        SpecError: The spec does not parse, or a budget came without `auto`.
    """
    selection, examples = inputs.selection, len(inputs.data)
    if settings.compress != "auto":
        if settings.disk is not None:
            raise SpecError(
                f"--disk belongs to --compress auto; --compress {settings.compress!r} sets the size itself. Drop one."
            )
        return parse_spec(settings.compress)
    budget = settings.disk_bytes if settings.disk_bytes is not None else ROW_BYTES * examples
    number_bytes = BYTES_PER_NUMBER[settings.dtype] * examples
    shared = settings.compress_scope == "model"
    parts, fewest = (1, FEWEST_SHARED) if shared else (len(selection.components), FEWEST)
    width = min(MOST, budget // (number_bytes * parts))
    if width < fewest:
        of_what = "the whole model" if shared else f"each of {parts} components"
        raise DiskSpaceError(
            f"{examples:,} examples do not fit in {format_bytes(budget)}: {fewest} numbers for {of_what} take "
            f"{format_bytes(fewest * number_bytes * parts)}. Give a larger --disk, fewer --components, or --dtype int8."
        )
    if shared:
        spec, reason = parse_spec(f"tensorsketch:{width} | sjlt:{width}"), "The widest sketch of the whole model."
    else:
        spec, reason = _choose_for(inputs, width, earlier)
    size = lay_out(selection.components, spec, settings.compress_scope)[-1].stop * number_bytes
    used = f"{format_bytes(size)} of {format_bytes(budget)}"
    announce(f"--compress auto: {spec} takes {used} for {examples:,} examples. {reason}")
    return spec


def _choose_for(inputs: Inputs, width: int, earlier: CompressionSpec | None) -> tuple[CompressionSpec, str]:
    """Return the compressor for a model on its device and examples as long as these are on average, and the reason."""
    components = inputs.selection.components
    shapes = [component.shape for component in components]
    fitting = [one for one in list_candidates(width) if sum(map(one.spec.size_for, shapes)) <= width * len(shapes)]
    if earlier is not None and earlier in [one.spec for one in fitting]:
        return earlier, "The index was begun with it."
    device = next(inputs.loaded.model.parameters()).device.type
    linear = [component.shape for component in components if _is_linear(component)]
    choice = choose_compressor(fitting, linear, round(float(np.mean(inputs.data.lengths))), device)
    return choice.taken.spec, choice.reason


def _is_linear(component: Component) -> bool:
    """Return whether the layer's own work is a matrix product: vectors and look-ups cost next to nothing."""
    used = any(use.kind not in ("embedding", "norm", "relative_bias") for use in component.uses)
    return used and min(component.shape) > 1
