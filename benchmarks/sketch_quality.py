"""How far compressed inner products are from exact ones: two tables, with the bounds that they have to keep.

    python benchmarks/sketch_quality.py [--seeds 3] [--only digits|gpt] [--quick]

1. scikit-learn's digits, 1000 to train and 200 to test, an MLP 64-64-32-10 after 30 epochs: the whole gradient of 6,570
   numbers under a dense Gaussian projection, SJLT, GraSS (a mask of 4 K, then SJLT) and a random mask.
2. A GPT-2 of two layers and width 128 after 120 steps on Python's own help topics, bytes as tokens: each of the eight
   linear maps under LoGra, FactGraSS and the factorised mask; means over the eight.

NRMSE is the root mean square error of a cosine; rho is the mean over test examples of Spearman's correlation with the
exact products over training examples. Both are computed by `vestige.evaluate`, the exact products by streaming.
Ends with status 1 when a bound is not kept.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pydoc_data import topics
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from tables import aligned
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from vestige.compress import Compressor, compress_gradient
from vestige.data import Batch
from vestige.evaluate import (
    Family,
    Products,
    Quality,
    Rows,
    Samples,
    Source,
    exact_products,
    quality,
    sketch_products,
)
from vestige.gradients import CausalLoss, FunctionObjective, GradientPass, GradientSink
from vestige.models import select_components

WHOLE = {"Gauss": "gauss:K", "SJLT": "sjlt:K", "GraSS x4": "mask:4K | sjlt:K", "mask": "mask:K"}
FACTORISED = {"LoGra": "logra:RxR", "FactGraSS": "mask:2Rx2R | sjlt:K", "factorised mask": "mask:RxR"}
DIGITS_SIZES, GPT_SIZES = (64, 256, 1024, 4096), (64, 256, 1024)
MEMORY = 2 * 2**30


class Cell(NamedTuple):
    """One compressor at one size, mean over seeds (and over components)."""

    nrmse: float
    rho: float


class Gate(NamedTuple):
    """A bound and what was seen."""

    text: str
    passed: bool


Table = dict[tuple[str, int], Cell]


def main() -> None:
    """Print the tables and the verdicts."""
    options = _options()
    torch.set_num_threads(1)
    gates: list[Gate] = []
    if options.only != "gpt":
        with _timed("digits"):
            table, biases = digits(range(options.seeds), epochs=2 if options.quick else 30)
        _show("Digits, whole gradient", table, WHOLE, DIGITS_SIZES)
        gates += digits_gates(table, biases)
    if options.only != "digits":
        with _timed("gpt"):
            table = gpt(range(options.seeds), steps=5 if options.quick else 120)
        _show("Tiny GPT, mean over eight linear maps", table, FACTORISED, GPT_SIZES)
        gates += gpt_gates(table)
    for gate in gates:
        print(f"{'pass' if gate.passed else 'FAIL'}  {gate.text}")
    if not all(gate.passed for gate in gates):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="random sketches to average over (3)")
    parser.add_argument("--only", choices=("digits", "gpt"), help="one table alone")
    parser.add_argument("--quick", action="store_true", help="hardly any training: does it run?")
    return parser.parse_args()


class _timed:  # noqa: N801  (read as a word: with _timed(...))
    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        print(f"{self._name}: {time.perf_counter() - self._started:.0f} s", file=sys.stderr, flush=True)


def digits(seeds: Sequence[int], *, epochs: int = 30, sizes: Sequence[int] = DIGITS_SIZES) -> tuple[Table, list[float]]:
    """The first table, and for the unbiasedness of masks the mean errors over 200 of them in standard errors."""
    gradients = digits_gradients(epochs)
    reference, test = gradients[1000:], gradients[:1000]
    exact = reference @ test.T
    lengths = reference.norm(dim=1)[:, None] * test.norm(dim=1)[None]
    table = {}
    for name, template in WHOLE.items():
        for size in sizes:
            found = []
            for seed in seeds:
                compressor = Family(template).at(size).build("model", (gradients.shape[1], 1), seed)
                found.append(quality(_products(compressor, reference, test), exact, lengths))
            table[name, size] = _mean(found)
    return table, [bias_of_masks(gradients, size) for size in sizes]


def _products(compressor: Compressor, reference: Tensor, test: Tensor) -> Tensor:
    sides = (compress_gradient(compressor, one[:, :, None].float()).double() for one in (reference, test))
    first, second = sides
    return first @ second.T


def bias_of_masks(gradients: Tensor, size: int, masks: int = 200) -> float:
    """Mean error of one mean inner product over `masks` random masks, in standard errors of that mean."""
    reference, test = gradients[1000:].mean(0, keepdim=True), gradients[:1000].mean(0, keepdim=True)
    exact = float((reference * test).sum())
    spec, width = Family("mask:K").at(size), gradients.shape[1]
    errors = [float(_products(spec.build("model", (width, 1), seed), reference, test)) - exact for seed in range(masks)]
    return float(np.mean(errors) / (np.std(errors, ddof=1) / np.sqrt(masks)))


def digits_gradients(epochs: int) -> Tensor:
    """Exact gradients `[example, parameter]` of the 1000 training and then the 200 test digits, float64."""
    inputs, labels = _digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for rows in torch.randperm(1000).split(50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    model.eval()
    accuracy = float((model(inputs[1000:]).argmax(1) == labels[1000:]).float().mean())
    print(f"digits: test accuracy {accuracy:.3f}", file=sys.stderr)
    components = select_components(model, ("all",)).components
    sink, parts = GradientSink(components), []
    objective = FunctionObjective(
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
    )
    with GradientPass(model, components, objective) as gradient_pass:
        for rows in torch.arange(len(inputs)).split(100):
            sink.begin(len(rows), "cpu")
            gradient_pass.run((inputs[rows], labels[rows]), sink)
            parts.append(torch.cat([part.flatten(1) for part in sink.gradients], dim=1).double())
    return torch.cat(parts)


def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:1200]
    return torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])


def digits_gates(table: Table, biases: Sequence[float]) -> list[Gate]:
    """The bounds of the first table."""
    gates = [
        Gate(
            f"digits: NRMSE of {name} at {size} is {cell.nrmse:.4f}, at most {1.3 / size**0.5:.4f}",
            cell.nrmse <= 1.3 / size**0.5,
        )
        for (name, size), cell in table.items()
        if name in ("Gauss", "SJLT")
    ]
    worst = max(biases, key=abs)
    return [
        *gates,
        Gate(f"digits: mean error of 200 masks is {worst:+.2f} standard errors, at most 3", abs(worst) <= 3),
    ]


def gpt(seeds: Sequence[int], *, steps: int = 120, sizes: Sequence[int] = GPT_SIZES) -> Table:
    """The second table: 32 references by 224 tests."""
    windows = _windows()
    model = _trained_gpt(windows, steps)
    selection = select_components(model, ("transformer.h.*.weight", "!norm"))
    with GradientPass(model, selection.components, CausalLoss()) as gradient_pass:
        source = Source.of(gradient_pass, selection.components, model)
        samples = _samples(windows)
        exact = exact_products(source, samples, MEMORY)
        return {
            (name, size): _over_components(source, samples, Family(template), size, seeds, exact)
            for name, template in FACTORISED.items()
            for size in sizes
        }


def _over_components(
    source: Source, samples: Samples, family: Family, size: int, seeds: Sequence[int], exact: Products
) -> Cell:
    spec = family.at(size)
    sketches = [[spec.build(one.name, one.shape, seed) for one in source.components] for seed in seeds]
    results = sketch_products(source, samples, sketches)
    return _mean(
        [
            quality(*triple)
            for result in results
            for triple in zip(result.products.values, exact.values, exact.lengths, strict=True)
        ]
    )


def _windows(length: int = 64) -> Tensor:
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    tokens = torch.tensor(list(text))
    return tokens[: len(tokens) // length * length].view(-1, length)


def _trained_gpt(windows: Tensor, steps: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (32,))]
        optimiser.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimiser.step()
    print(f"gpt: {model.num_parameters():,} parameters, last loss {float(loss.detach()):.2f}", file=sys.stderr)
    return model.eval()


def _samples(windows: Tensor, references: int = 32, tests: int = 224) -> Samples:
    chosen = windows[np.random.default_rng(1).permutation(len(windows))[: references + tests]]

    def rows(start: int, stop: int, first: int) -> Rows:
        part = chosen[start:stop]
        return Rows(np.arange(start, stop) - first, Batch(torch.arange(start, stop), part, part))

    return Samples(
        tuple(rows(one, one + 1, 0) for one in range(references)),
        tuple(rows(one, one + 16, references) for one in range(references, references + tests, 16)),
    )


def gpt_gates(table: Table) -> list[Gate]:
    """The bounds of the second table."""
    gates = []
    for size in (size for name, size in table if name == "LoGra" and size >= 256):
        logra, ours = table["LoGra", size].nrmse, table["FactGraSS", size].nrmse
        gates.append(
            Gate(
                f"gpt: NRMSE of FactGraSS at {size} is {ours:.4f}, at most 1.1 x LoGra's {logra:.4f}",
                ours <= 1.1 * logra,
            )
        )
    return gates


def _mean(found: Sequence[Quality]) -> Cell:
    return Cell(fmean(one.nrmse for one in found), fmean(one.spearman for one in found))


def _show(title: str, table: Table, names: dict[str, str], sizes: Sequence[int]) -> None:
    lines = [["K: NRMSE / rho", *names], [":--", *["--:"] * len(names)]]
    for size in sizes:
        cells = [table[name, size] for name in names]
        lines.append([str(size), *(f"{cell.nrmse:.3f} / {cell.rho:.3f}" for cell in cells)])
    print(f"\n{title}\n\n{aligned(lines)}\n", flush=True)


if __name__ == "__main__":
    main()
