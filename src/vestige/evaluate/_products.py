"""Inner products of the gradients of some examples with those of others: exact, sketched, or projected.

Sketched means compressed from factors while the backward pass runs, projected after the gradient was formed.
All of them stream over the tests; what stays in memory is one side, the references.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.compress import CompressingSink, Compressor, compress_gradient
from vestige.errors import NonFinite, UserError
from vestige.evaluate._timed_sinks import TimedSinks
from vestige.gradients import BothSinks, DotSink, GradientPass, GradientSink, NormSink
from vestige.models import Component
from vestige.progress import format_bytes

Advance = Callable[[int], None]


class Source(NamedTuple):
    """Where gradients come from."""

    gradient_pass: GradientPass
    """Entered, over just these components."""
    components: Sequence[Component]
    device: torch.device
    dtype: torch.dtype
    """Of exact gradients: the model's, or float32 for halves."""

    @classmethod
    def of(cls, gradient_pass: GradientPass, components: Sequence[Component], model: nn.Module) -> "Source":
        """Return the source of the gradients of `components` of `model`."""
        weight = next(model.parameters())
        return cls(gradient_pass, components, weight.device, torch.promote_types(weight.dtype, torch.float32))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one exact gradient."""
        return self.dtype.itemsize * sum(component.size for component in self.components)


class Rows(NamedTuple):
    """A batch, and where its examples stand among the references or among the tests."""

    positions: np.ndarray
    batch: Any


class Samples(NamedTuple):
    """What is compared: every reference with every test."""

    reference: tuple[Rows, ...]
    """One example each: their gradients are formed one at a time."""
    test: tuple[Rows, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of references and of tests."""
        first, second = (sum(len(rows.positions) for rows in side) for side in self)
        return first, second

    @property
    def total(self) -> int:
        """Number of examples."""
        return sum(self.counts)


class Products(NamedTuple):
    """Inner products per component, and the squared norms of both sides; float64 on the CPU."""

    values: Float[Tensor, "component reference test"]
    reference: Float[Tensor, "component reference"]
    test: Float[Tensor, "component test"]

    def summed(self) -> "Products":
        """Return the products of the whole gradients: one component."""
        return Products(*(one.sum(0, keepdim=True) for one in self))

    @property
    def lengths(self) -> Float[Tensor, "component reference test"]:
        """Product of the two norms, for every pair."""
        return (self.reference[:, :, None] * self.test[:, None, :]).clamp_min(0).sqrt()


class SketchedProducts(NamedTuple):
    """Inner products of compressed gradients."""

    products: Products
    seconds: float
    """Spent in compressing the tests' factors: not in the model's own passes, not in the products."""


def exact_products(
    source: Source,
    samples: Samples,
    memory_bytes: int,
    advance: Advance = lambda n: None,  # noqa: ARG005
) -> Products:
    """Compute exact inner products, with a pass over the tests for each share of references that fits in memory.

    Args:
        source: Where gradients come from.
        samples: The examples.
        memory_bytes: Most bytes of gradients.
        advance: Called with the number of examples that were passed through the model.

    Raises:
        UserError: Not even two gradients fit.
        NonFinite: An inner product is NaN or infinite.
    """
    products = _empty(len(source.components), samples)
    for share in _shares(samples.reference, references_at_once(source, memory_bytes)):
        vectors = _references(source, share, products, advance)
        positions = torch.as_tensor(np.concatenate([rows.positions for rows in share]))
        for rows in samples.test:
            dots, norms = DotSink(vectors), NormSink(source.components)
            dots.begin(len(rows.positions))
            norms.begin(len(rows.positions))
            source.gradient_pass.run(rows.batch, BothSinks(dots, norms))
            tests = torch.as_tensor(rows.positions)
            products.values[:, positions[:, None], tests] = dots.scores.double().cpu()
            products.test[:, tests] = norms.finish().double().cpu()
            advance(len(rows.positions))
    return _finite(products)


def references_at_once(source: Source, memory_bytes: int) -> int:
    """Return the number of gradients that fit, beside the one that is being formed.

    Raises:
        UserError: Not even one.
    """
    needed = source.gradient_bytes
    if (count := memory_bytes // needed - 1) < 1:
        raise UserError(
            f"An exact gradient of these parameters takes {format_bytes(needed)}, and two have to fit into the "
            f"{format_bytes(memory_bytes)} that may be used. Choose fewer --components (such as 'layers 0-3'), "
            "another --reference (rank=K needs no exact gradient), or give more --memory."
        )
    return count


def sketched_products(
    source: Source,
    samples: Samples,
    sketches: Sequence[Sequence[Compressor]],
    advance: Advance = lambda n: None,  # noqa: ARG005
) -> list[SketchedProducts]:
    """Compute inner products of gradients compressed from their factors, as `vestige index` does it.

    Args:
        source: Where gradients come from.
        samples: The examples.
        sketches: For each sketch, one compressor per component; all see the same passes of the model.
        advance: Called with the number of examples that were passed through the model.

    Raises:
        NonFinite: An inner product is NaN or infinite.
    """
    sinks = [_sink(compressors) for compressors in sketches]
    found = [_Sketches(sink.columns, samples) for sink in sinks]
    seconds = [0.0] * len(sinks)
    for side in ("reference", "test"):
        for rows in getattr(samples, side):
            for sink in sinks:
                sink.begin(len(rows.positions), source.device)
            timed = TimedSinks(sinks)
            source.gradient_pass.run(rows.batch, timed)
            for sink, sketch in zip(sinks, found, strict=True):
                sketch.add(side, rows.positions, sink.gradients)
            if side == "test":
                seconds = [before + more for before, more in zip(seconds, timed.seconds, strict=True)]
            advance(len(rows.positions))
    return [SketchedProducts(_finite(one.products), spent) for one, spent in zip(found, seconds, strict=True)]


def projected_products(
    source: Source,
    samples: Samples,
    compressors: Sequence[Compressor],
    advance: Advance = lambda n: None,  # noqa: ARG005
) -> Products:
    """Compute inner products of gradients that were formed as matrices and compressed after that.

    Slow and obvious: what `sketched_products` has to equal up to rounding.

    Raises:
        NonFinite: An inner product is NaN or infinite.
    """
    found = _Sketches(_sink(compressors).columns, samples)
    for side in ("reference", "test"):
        for rows in getattr(samples, side):
            sink = GradientSink(source.components)
            sink.begin(len(rows.positions), source.device, source.dtype)
            source.gradient_pass.run(rows.batch, sink)
            parts = [compress_gradient(one, part) for one, part in zip(compressors, sink.gradients, strict=True)]
            found.add(side, rows.positions, torch.cat(parts, dim=1))
            advance(len(rows.positions))
    return _finite(found.products)


def stored_products(columns: Sequence[slice], samples: Samples, gradients_of: Callable[[str, Any], Tensor]) -> Products:
    """Compute inner products of compressed gradients that exist already: `gradients_of(side, positions)` reads some."""
    found = _Sketches(columns, samples)
    for side in ("reference", "test"):
        for rows in getattr(samples, side):
            found.add(side, rows.positions, gradients_of(side, rows.positions))
    return _finite(found.products)


class _Sketches:
    """Keeps the references' compressed gradients, and turns the tests' into products when they come."""

    def __init__(self, columns: Sequence[slice], samples: Samples) -> None:
        self._columns = list(columns)
        width = max(part.stop for part in self._columns)
        self._references = torch.zeros(samples.counts[0], width, dtype=torch.float64)
        self.products = _empty(len(self._columns), samples)

    def add(self, side: str, positions: np.ndarray, gradients: Tensor) -> None:
        """Note the compressed gradients `[example, column]` of one batch."""
        rows, gradients = torch.as_tensor(positions), gradients.double().cpu()
        norms = torch.stack([gradients[:, part].square().sum(1) for part in self._columns])
        getattr(self.products, side)[:, rows] = norms
        if side == "reference":
            self._references[rows] = gradients
            return
        for number, part in enumerate(self._columns):
            self.products.values[number][:, rows] = self._references[:, part] @ gradients[:, part].T


def _sink(compressors: Sequence[Compressor]) -> CompressingSink:
    ends = np.cumsum([one.size for one in compressors]).tolist()
    return CompressingSink(compressors, [0, *ends[:-1]], ends[-1])


def _empty(components: int, samples: Samples) -> Products:
    references, tests = samples.counts
    return Products(
        torch.zeros(components, references, tests, dtype=torch.float64),
        torch.zeros(components, references, dtype=torch.float64),
        torch.zeros(components, tests, dtype=torch.float64),
    )


def _shares(references: Sequence[Rows], step: int) -> Iterator[Sequence[Rows]]:
    for start in range(0, len(references), step):
        yield references[start : start + step]


def _references(source: Source, share: Sequence[Rows], products: Products, advance: Advance) -> list[Tensor]:
    """Return the gradients of some references, `[reference, out, in]` per component; record their norms."""
    vectors: list[Tensor] = []
    sink = GradientSink(source.components)
    for number, rows in enumerate(share):
        sink.begin(1, source.device, source.dtype)
        source.gradient_pass.run(rows.batch, sink)
        if not vectors:
            vectors = [part.new_zeros(len(share), *part.shape[1:]) for part in sink.gradients]
        for vector, part in zip(vectors, sink.gradients, strict=True):
            vector[number] = part[0]
        norms = [part.double().square().sum() for part in sink.gradients]
        products.reference[:, int(rows.positions[0])] = torch.stack(norms).cpu()
        advance(1)
    return vectors


def _finite(products: Products) -> Products:
    if not bool(products.values.isfinite().all()):
        bad = int((~products.values.isfinite().all(0)).any(1).nonzero()[0, 0])
        raise NonFinite(
            f"An inner product with example {bad} is NaN or infinite. The model's weights or this example's loss are: "
            "run `vestige doctor` with the same --model and --data, which names the cause."
        )
    return products
