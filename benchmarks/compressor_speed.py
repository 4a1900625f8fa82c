"""What compressing costs beside the layer's own work: microseconds of CPU time per token on one core.

    python benchmarks/compressor_speed.py [--sizes 64 256 1024 4096] [--layers 576x1536 ...] [--rounds 5] [--quick]

For linear layers of 576 and 1536, and of 4096 and 11008 features, float32, with batches as an index makes them:

- the layer: forward and backward with a frozen weight, which is what an index has to pay anyway;
- the forward side of a compressor: reducing the input activation;
- its backward side: reducing the output gradient, combining both and adding up the example's row;
- the error it buys: NRMSE of inner products of made-up gradients (`vestige.evaluate` measures real ones).

In every round each compressor runs once on the same tensors, and so does the layer; a number is the median over rounds.
Beside each ratio stands what the cost model of `--compress auto` predicts; at the end, how often its order was right.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import NamedTuple

import measure

measure.pin()

import torch  # noqa: E402 - torch reads the number of threads when it is imported
from tables import aligned  # noqa: E402
from torch import Tensor  # noqa: E402

from vestige.compress import (  # noqa: E402
    CompressionSpec,
    Compressor,
    combine,
    compress_factors,
    cost_share,
    reduce_factor,
)
from vestige.evaluate import Family  # noqa: E402

LAYERS = {
    "128x128": (16, 64),
    "128x512": (16, 64),
    "576x1536": (8, 128),
    "1536x576": (8, 128),
    "4096x11008": (4, 128),
    "11008x4096": (4, 128),
}
"""Inputs x outputs, with the examples and tokens of a batch."""
SIZES = (64, 256, 1024, 4096)
LOGRA, FACTGRASS, TENSOR = "logra:RxR", "mask:2Rx2R | sjlt:K", "tensorsketch:K"
FAMILIES = (LOGRA, "logra:K", FACTGRASS, "mask:RxR", TENSOR, "fjlt:RxR", "mask:4K | sjlt:K")
COMPARED = (LOGRA, FACTGRASS, TENSOR)
WHOLE = ("sjlt:K", "fjlt:K")
"""These form the whole gradient of every example first; on the wide layers that alone is half the layer's work."""
NARROW = 2**21
TELLING = 1.5
"""Two costs are told apart, and the model has to order them, if one is this many times the other."""
ERROR_SEEDS = 5
SHORTEST = 0.02  # CPU seconds of one measurement; shorter work is repeated within it


class Batch(NamedTuple):
    """The factors of a batch, and the layer's weight."""

    right: Tensor
    left: Tensor
    weight: Tensor

    @property
    def tokens(self) -> int:
        return self.left.shape[0] * self.left.shape[1]


@dataclass
class Line:
    """One compressor on one layer; seconds of every round."""

    family: str
    size: int
    spec: CompressionSpec
    compressor: Compressor
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    nrmse: float = 0.0

    @property
    def seconds(self) -> float:
        """Median over rounds of both sides."""
        return median(one + other for one, other in zip(self.forward, self.backward, strict=True))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the process for one call, repeated until the clock can tell."""
    calls, spent, start = 0, 0.0, time.process_time()
    while spent < SHORTEST:
        work()
        calls += 1
        spent = time.process_time() - start
    return spent / calls


def draw(inputs: int, outputs: int, examples: int, tokens: int, common: float = 0.0, seed: int = 0) -> Batch:
    """Factors whose coordinates fall off as 1 / sqrt(rank), in random order, as those of trained models do.

    `common` is the part of a factor that all examples share at a position, without which they would be orthogonal and
    a compressor that keeps nothing would make no error.
    """
    generator = torch.Generator().manual_seed(seed)

    def factor(width: int) -> Tensor:
        scale = (torch.arange(1, width + 1) ** -0.5)[torch.randperm(width, generator=generator)]
        own = torch.randn(examples, tokens, width, generator=generator)
        shared = torch.randn(tokens, width, generator=generator)
        return (own * (1 - common) ** 0.5 + shared * common**0.5) * scale

    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return Batch(factor(inputs), factor(outputs), weight)


def layer_work(batch: Batch) -> Callable[[], object]:
    """Forward and backward through the layer; the weight is frozen, the input is differentiated."""
    activation = batch.right.clone().requires_grad_()

    def work() -> None:
        activation.grad = None
        torch.nn.functional.linear(activation, batch.weight).backward(batch.left)

    return work


def nrmse(spec: CompressionSpec, compressor: Compressor, gradients: Batch) -> float:
    """Root mean square error of the inner products of distinct gradients, relative to their norms, over seeds."""
    pairs = torch.einsum("eto,fso->etfs", gradients.left, gradients.left).double()
    pairs *= torch.einsum("eti,fsi->etfs", gradients.right, gradients.right)
    exact = pairs.sum((1, 3))
    lengths = exact.diagonal().sqrt()
    shape = gradients.left.shape[2], gradients.right.shape[2]
    # Building a map of a large whole gradient hashes all of its coordinates: one seed has to do there.
    more = range(1, ERROR_SEEDS if spec.stages[0].on_sides or TENSOR[:6] in spec.canonical else 1)
    squares = []
    for one in [compressor, *(spec.build("layer.weight", shape, seed) for seed in more)]:
        rows = compress_factors(one, gradients.left, gradients.right).double()
        error = ((rows @ rows.T - exact) / (lengths[:, None] * lengths)).fill_diagonal_(0)
        squares.append(float(error.square().sum() / (len(error) * (len(error) - 1))))
    return (sum(squares) / len(squares)) ** 0.5


def run_round(lines: Sequence[Line], batch: Batch) -> float:
    """Every compressor once, and seconds of the layer."""
    for line in lines:
        right = reduce_factor(line.compressor, "right", batch.right)
        gradients = torch.zeros(len(batch.left), line.compressor.size)
        line.forward.append(cpu_seconds(lambda: reduce_factor(line.compressor, "right", batch.right)))  # noqa: B023

        def back(line: Line = line, right: Tensor = right, gradients: Tensor = gradients) -> None:
            gradients.add_(combine(line.compressor, reduce_factor(line.compressor, "left", batch.left), right))

        line.backward.append(cpu_seconds(back))
    return cpu_seconds(layer_work(batch))


def make_lines(name: str, sizes: Sequence[int], seeds: bool = True) -> list[Line]:
    """All compressors of a layer, built, with their errors."""
    inputs, outputs = map(int, name.split("x"))
    gradients = draw(inputs, outputs, 16, 16, common=0.5, seed=1)
    families = FAMILIES + (WHOLE if inputs * outputs <= NARROW else ())
    lines = []
    for size in sizes:
        for family in families:
            spec = Family(family).at(size)
            compressor = spec.build("layer.weight", (outputs, inputs), 0)
            error = nrmse(spec, compressor, gradients) if seeds else 0.0
            lines.append(Line(family, size, spec, compressor, nrmse=error))
    return lines


def predicted(line: Line, batch: Batch) -> float:
    """The cost model's share of the layer's own work."""
    shape = batch.left.shape[2], batch.right.shape[2]
    return cost_share(line.spec, [shape], batch.left.shape[1], "cpu")


def show(name: str, batch: Batch, lines: Sequence[Line], layer: float) -> None:
    """One layer's table."""
    unit = 1e6 / batch.tokens
    rows = [["", "forward side", "backward side", "of layer", "predicted", "NRMSE"], [":--", *["--:"] * 5]]
    for line in lines:
        sides = (f"{median(side) * unit:.2f}" for side in (line.forward, line.backward))
        shares = (f"{share:.3f}" for share in (line.seconds / layer, predicted(line, batch)))
        rows.append([str(line.spec), *sides, *shares, f"{line.nrmse:.3f}"])
    examples, tokens = batch.left.shape[:2]
    speed = 4e-9 * batch.weight.numel() * batch.tokens / layer
    print(f"\n### {name}: {examples} x {tokens} tokens, layer {layer * unit:.2f} us a token ({speed:.0f} GFLOP/s)\n")
    print(aligned(rows))
    for size in dict.fromkeys(line.size for line in lines):
        of = {line.family: line for line in lines if line.size == size}
        ratio = of[LOGRA].seconds / of[FACTGRASS].seconds
        print(f"\nK = {size}: FactGraSS {ratio:.1f} times as fast as LoGra", end="")
        print(f", {of[TENSOR].seconds / of[FACTGRASS].seconds:.1f} times as fast as the tensor sketch.")


class Agreement(NamedTuple):
    """How often the model orders two compressors of one layer and size as the clock does, where that can tell."""

    right: int
    told: int
    wrong: tuple[str, ...]


def agreement(name: str, batch: Batch, lines: Sequence[Line], families: Sequence[str]) -> Agreement:
    """Pairs of one size whose times differ by more than `TELLING`."""
    right, told, wrong = 0, 0, []
    chosen = [line for line in lines if line.family in families]
    for one, other in combinations(chosen, 2):
        slow, fast = sorted((one, other), key=lambda line: -line.seconds)
        if one.size == other.size and slow.seconds > TELLING * fast.seconds:
            told += 1
            if predicted(slow, batch) > predicted(fast, batch):
                right += 1
            else:
                wrong.append(f"{name}: {slow.spec} is slower than {fast.spec}")
    return Agreement(right, told, tuple(wrong))


def main() -> None:
    """Measure, and print the tables."""
    options = _options()
    torch.set_num_threads(1)
    print(
        f"Median of {options.rounds} rounds, CPU time of one thread, torch {torch.__version__}, microseconds a token."
    )
    found: dict[str, list[Agreement]] = {"LoGra, FactGraSS, tensor sketch": [], "all compressors": []}
    for name in options.layers:
        inputs, outputs = map(int, name.split("x"))
        batch = draw(inputs, outputs, *LAYERS.get(name, (8, 128)))
        lines = make_lines(name, options.sizes, seeds=not options.quick)
        layer = median([run_round(lines, batch) for _ in range(options.rounds)])
        show(name, batch, lines, layer)
        for families, those in zip((COMPARED, FAMILIES + WHOLE), found.values(), strict=True):
            those.append(agreement(name, batch, lines, families))
        print(f"{name} done", file=sys.stderr, flush=True)
    print(f"\n### The cost model's order, where one takes over {TELLING} times as long as the other\n")
    for title, those in found.items():
        right, told = (sum(getattr(one, key) for one in those) for key in ("right", "told"))
        wrong = [text for one in those for text in one.wrong]
        print(f"- {title}: {right} of {told} pairs." + (f" Not: {'; '.join(wrong)}." if wrong else ""))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Microseconds per token of every compressor.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="squares of whole numbers")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="inputs x outputs, such as 768x3072")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the tables show medians (5)")
    parser.add_argument("--quick", action="store_true", help="one round of the narrow layers: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.layers, options.sizes = 1, ["128x128", "576x1536"], (64, 256)
    return options


if __name__ == "__main__":
    main()
