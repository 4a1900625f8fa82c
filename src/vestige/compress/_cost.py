"""The cost of a compressor for one token, counted from its spec, beside the forward and backward pass of its layer.

Four kinds of work are counted, because hardware prices them differently: multiply-adds of matrix products; numbers read
or written in order; numbers gathered from computed positions; and `n log2 n` for every Fourier transform of n numbers.
`RATES` turns them into one unit, the time that a multiply-add takes in a large matrix product of the same device, in
which a linear layer `[out, in]` with a frozen weight costs `2 out in`: once forward, once for its input's gradient.
"""

import math
from collections.abc import Iterable

from vestige.compress._apply import is_gathered
from vestige.compress._registry import Work
from vestige.compress._spec import CompressionSpec

Shape = tuple[int, int]


RATES = {
    "cpu": Work(products=1, streamed=15, gathered=70, transformed=9),
    "cuda": Work(products=1, streamed=150, gathered=600, transformed=80),
}
"""Price of each kind of work, by kind of device; any other kind is taken for a GPU.

`cpu` was fitted to `benchmarks/compressor_speed.py` on one core, which compares it with what it measures. `cuda` was
not measured. It follows from what processors of that kind are built for: they do some hundred multiply-adds in the time
that one number takes from memory, fetch numbers eight at a time (of which a gather may need one), and read and write a
transform's numbers a few times. Its figures are on the high side, so that the costly is avoided rather than chosen;
with them FactGraSS is 2 to 8 times cheaper than LoGra on GPT-2's layers, where 3.1 to 3.5 has been published.
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
