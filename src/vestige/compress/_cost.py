"""The cost of a compressor for one token, counted from its spec, beside the forward and backward pass of its layer.

Four kinds of work are counted, because hardware prices them differently: multiply-adds of matrix products; numbers read
or written in order; numbers gathered from computed positions; and `n log2 n` for every Fourier transform of n numbers.
`RATES` turns them into one unit, the time that a multiply-add takes in a large matrix product of the same device, in
which a linear layer `[out, in]` with a frozen weight costs `2 out in`: once forward, once for its input's gradient.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vestige.compress._apply import is_gathered
from vestige.compress._registry import Work
from vestige.compress._spec import CompressionSpec, parse_spec

Shape = tuple[int, int]


RATES = {
    "cpu": Work(products=1, streamed=15, gathered=70, transformed=9),
    "cuda": Work(products=1, streamed=350, gathered=600, transformed=100),
}
"""Price of each kind of work, by kind of device; any other kind is taken for a GPU.

`cpu` was fitted to `benchmarks/compressor_speed.py` on one core, which compares it with what it measures. `cuda` was
not measured. It follows from what an H200 is built for: 225 multiply-adds of halves in the time in which it moves 3.8
bytes. A half that is signed and added up is read twice and written once, 6 bytes; a gather may fetch eight numbers for
one; for both sides' transforms of K numbers and their product some 45 K bytes are moved, which is 110 to 130 for each
`n log2 n` from 1024 to 4096 numbers, and up to 512 a matrix product replaces them for half of that. Otherwise the
figures are on the high side, so that the costly is avoided rather than chosen.
With them FactGraSS is 2 to 8 times cheaper than LoGra on GPT-2's layers (4,096 numbers), where 3.1 to 3.5 has been
published.
"""


def work(spec: CompressionSpec, shape: Shape, tokens: int) -> Work:
    """Return the work of compressing the gradient `[out, in]` of examples of `tokens` tokens, per token.

    A compressor of another package counts as a dense matrix.
    """
    rows, columns = shape
    size = rows * columns
    total, formed, sides_whole = Work(), True, True
    for stage in spec.stages:
        if stage.on_sides:
            kept = stage.keep_sides((rows, columns))
            for before, after in ((rows, kept[0]), (columns, kept[1])):
                total = total.plus(stage.kind.work(before, after) if after < before else Work())
            sides_whole = sides_whole and kept == (rows, columns)
            rows, columns = kept
            size = rows * columns
            continue
        kept_size = min(size, stage.size[0])
        if kept_size == size:
            continue
        if stage.kind.product == "circular":
            total = total.plus(_circular(rows, columns, kept_size, tokens))
            formed = False
        elif formed and sides_whole and stage.kind.picks and is_gathered(kept_size, (rows, columns)):
            total = total.plus(_entrywise(rows, columns, kept_size))
            formed = False
        else:
            total = total.plus(stage.kind.work(size, kept_size), 1 / tokens)
        size, sides_whole = kept_size, False
    return total.plus(Work(products=rows * columns)) if formed else total


def _circular(rows: int, columns: int, size: int, tokens: int) -> Work:
    """Return the work of two folded sides: a transform for each, and one back for every example."""
    return Work(streamed=rows + columns, transformed=size * math.log2(size) * (2 + 1 / tokens))


def _entrywise(rows: int, columns: int, kept: int) -> Work:
    """Return the work of the kept entries of the gradient, each from its row and column of the factors."""
    if kept > rows + columns:
        return Work(streamed=rows + columns + 2 * kept)
    return Work(gathered=2 * kept)


def price(done: Work, device: str) -> float:
    """Return the work in multiply-adds of a large matrix product on a kind of device (`cpu`, `cuda`, ...)."""
    rates = RATES.get(device, RATES["cuda"])
    return float(sum(count * rate for count, rate in zip(done, rates, strict=True)))


def cost_share(spec: CompressionSpec, shapes: Iterable[Shape], tokens: int, device: str) -> float:
    """Return the cost of compressing, as a share of the forward and backward passes of the same linear layers."""
    compressing, own = 0.0, 0.0
    for shape in shapes:
        compressing += price(work(spec, shape, tokens), device)
        own += 2 * shape[0] * shape[1]
    return compressing / own


MOST_SHARE = 0.25
"""Most that compressing may take, as a share of the forward and backward passes of the same linear layers."""
FEWEST = 16
"""Least numbers per component: below, scores are noise."""


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


def choose_compressor(compressors: Iterable[Candidate], linear: Sequence[Shape], tokens: int, device: str) -> Choice:
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
