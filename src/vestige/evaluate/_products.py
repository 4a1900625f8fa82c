"""Inner products of the gradients of some examples with those of others: exact, sketched, or projected.

Sketched means compressed from factors while the backward pass runs, projected after the gradient was formed.
All of them stream over the tests; what stays in memory is one side, the references.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vestige.compress import CompressingSink, Compressor, compress_gradient
from vestige.errors import CorruptFile, NonFinite, UserError
from vestige.evaluate._result import open_folder
from vestige.gradients import BothSinks, DotSink, FactorSink, GradientPass, GradientSink, NormSink, Side
from vestige.models import Component
from vestige.progress import format_bytes
from vestige.storage import make_folder, remove_strays, write_durably

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

    def gradients_of(self, batch: Any, examples: int) -> list[Float[Tensor, "example _out _in"]]:
        """Return exact gradients as matrices, one for each component."""
        sink = GradientSink(self.components)
        sink.begin(examples, self.device, self.dtype)
        self.gradient_pass.run(batch, sink)
        return sink.gradients


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
    def sides(self) -> list[tuple[str, Rows]]:
        """All batches, each with its side: references first."""
        return [("reference", rows) for rows in self.reference] + [("test", rows) for rows in self.test]


class Products(NamedTuple):
    """Inner products per component, and the squared norms of both sides; float64 on the CPU."""

    values: Float[Tensor, "component reference test"]
    reference: Float[Tensor, "component reference"]
    test: Float[Tensor, "component test"]

    @classmethod
    def zeros(cls, components: int, samples: Samples) -> "Products":
        """Return products of these sizes to fill in."""
        references, tests = samples.counts
        shapes = ((components, references, tests), (components, references), (components, tests))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def sum_components(self) -> "Products":
        """Return the products of the whole gradients: one component."""
        return Products(*(one.sum(0, keepdim=True) for one in self))

    @property
    def lengths(self) -> Float[Tensor, "component reference test"]:
        """Product of the two norms, for every pair."""
        return (self.reference[:, :, None] * self.test[:, None, :]).clamp_min(0).sqrt()


class Computed(NamedTuple):
    """Inner products, and what they cost."""

    products: Products
    seconds: float = 0.0
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
    products = Products.zeros(len(source.components), samples)
    step = references_at_once(source, memory_bytes)
    for start in range(0, len(samples.reference), step):
        share = samples.reference[start : start + step]
        vectors: list[Tensor] = []
        for number, rows in enumerate(share):
            gradients = source.gradients_of(rows.batch, 1)
            vectors = vectors or [part.new_zeros(len(share), *part.shape[1:]) for part in gradients]
            for vector, part in zip(vectors, gradients, strict=True):
                vector[number] = part[0]
            norms = [part.double().square().sum() for part in gradients]
            products.reference[:, int(rows.positions[0])] = torch.stack(norms).cpu()
            advance(1)
        positions = torch.as_tensor(np.concatenate([rows.positions for rows in share]))
        for rows in samples.test:
            dots, squares = DotSink(vectors), NormSink(source.components)
            dots.begin(len(rows.positions))
            squares.begin(len(rows.positions))
            source.gradient_pass.run(rows.batch, BothSinks(dots, squares))
            tests = torch.as_tensor(rows.positions)
            products.values[:, positions[:, None], tests] = dots.scores.double().cpu()
            products.test[:, tests] = squares.finish().double().cpu()
            advance(len(rows.positions))
    return _require_finite(products)


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


def sketch_products(
    source: Source,
    samples: Samples,
    sketches: Sequence[Sequence[Compressor]],
    advance: Advance = lambda n: None,  # noqa: ARG005
) -> list[Computed]:
    """Compute inner products of gradients compressed from their factors, as `vestige index` does it.

    Args:
        source: Where gradients come from.
        samples: The examples.
        sketches: For each sketch, one compressor per component; all see the same passes of the model.
        advance: Called with the number of examples that were passed through the model.

    Raises:
        NonFinite: An inner product is NaN or infinite.
    """
    ends = [np.cumsum([one.size for one in compressors]).tolist() for compressors in sketches]
    sinks = [CompressingSink(maps, [0, *end[:-1]], end[-1]) for maps, end in zip(sketches, ends, strict=True)]
    seconds = np.zeros(len(sinks))

    def compress(side: str, rows: Rows) -> list[Tensor]:
        for sink in sinks:
            sink.begin(len(rows.positions), source.device)
        timed = _TimedSinks(sinks)
        source.gradient_pass.run(rows.batch, timed)
        if side == "test":
            seconds[:] += timed.seconds
        advance(len(rows.positions))
        return [sink.gradients for sink in sinks]

    found = multiply_gradients([list(sink.columns) for sink in sinks], samples, compress)
    return [Computed(one, spent) for one, spent in zip(found, seconds.tolist(), strict=True)]


def project_products(
    source: Source,
    samples: Samples,
    compressors: Sequence[Compressor],
    advance: Advance = lambda n: None,  # noqa: ARG005
) -> Products:
    """Compute inner products of gradients that were formed as matrices and compressed after that.

    Slow and obvious: what `sketch_products` has to equal up to rounding.

    Raises:
        NonFinite: An inner product is NaN or infinite.
    """
    ends = np.cumsum([0, *(one.size for one in compressors)]).tolist()

    def compress(_side: str, rows: Rows) -> list[Tensor]:
        gradients = source.gradients_of(rows.batch, len(rows.positions))
        advance(len(rows.positions))
        return [torch.cat([compress_gradient(*pair) for pair in zip(compressors, gradients, strict=True)], dim=1)]

    return multiply_gradients([[slice(*pair) for pair in pairwise(ends)]], samples, compress)[0]


def multiply_gradients(
    columns: Sequence[Sequence[slice]],
    samples: Samples,
    gradients_of: Callable[[str, Rows], Sequence[Float[Tensor, "example column"]]],
) -> list[Products]:
    """Compute inner products of compressed gradients, for one or several ways to compress them.

    Args:
        columns: For each way, a slice of its columns per component.
        samples: The examples.
        gradients_of: From a side and some of its rows to their gradients, one array for each way.

    Raises:
        NonFinite: An inner product is NaN or infinite.
    """
    kept = [torch.zeros(samples.counts[0], max(one.stop for one in parts), dtype=torch.float64) for parts in columns]
    found = [Products.zeros(len(parts), samples) for parts in columns]
    for side, rows in samples.sides:
        positions = torch.as_tensor(rows.positions)
        each = [gradients.double().cpu() for gradients in gradients_of(side, rows)]
        for parts, references, products, gradients in zip(columns, kept, found, each, strict=True):
            norms = torch.stack([gradients[:, part].square().sum(1) for part in parts])
            getattr(products, side)[:, positions] = norms
            if side == "reference":
                references[positions] = gradients
                continue
            for number, part in enumerate(parts):
                products.values[number][:, positions] = references[:, part] @ gradients[:, part].T
    return [_require_finite(products) for products in found]


class _TimedSinks:
    """Hands every factor to several sinks, and notes the seconds that each of them takes."""

    def __init__(self, sinks: Sequence[FactorSink]) -> None:
        self._sinks, self.seconds = sinks, np.zeros(len(sinks))

    def reduce(self, component: int, side: Side, factor: Any) -> tuple[Any, ...]:
        """Return what each of the sinks keeps."""
        return tuple(self._time(number, "reduce", component, side, factor) for number in range(len(self._sinks)))

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Let each sink add its share, of what it kept."""
        for number, (mine, theirs) in enumerate(zip(left, right, strict=True)):
            self._time(number, "accumulate", component, examples, mine, theirs)

    def _time(self, number: int, step: str, *arguments: Any) -> Any:
        _wait_for_device()
        started = time.perf_counter()
        result = getattr(self._sinks[number], step)(*arguments)
        _wait_for_device()
        self.seconds[number] += time.perf_counter() - started
        return result


def _wait_for_device() -> None:
    """Wait for the GPU, which works in the background; a clock has to wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _require_finite(products: Products) -> Products:
    if not bool(products.values.isfinite().all()):
        bad = int((~products.values.isfinite().all(0)).any(1).nonzero()[0, 0])
        raise NonFinite(
            f"An inner product with example {bad} is NaN or infinite. The model's weights or this example's loss are: "
            "run `vestige doctor` with the same --model and --data, which names the cause."
        )
    return products


class KeptProducts:
    """What a sketch evaluation has computed so far: a file of inner products for each sketch, found by its name.

    Errors are computed from these at the end, so another reference, size or seed computes only what is new.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open or begin it; it may be absent, empty, or hold an evaluation with the same identity.

        Raises:
            IndexMismatch: It holds an evaluation of something else; nothing was changed.
            UserError: It holds other files, or cannot be written to.
        """
        open_folder(folder, identity)
        self._folder = folder / "products"
        make_folder(self._folder)
        remove_strays(folder)

    def has(self, name: str) -> bool:
        """Return whether something was computed under `name`."""
        return self._path(name).exists()

    def read(self, name: str) -> Computed:
        """Read the products computed under `name`.

        Raises:
            CorruptFile: The file is damaged.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                parts = {part: file.get_tensor(part) for part in Products._fields}
                return Computed(Products(**parts), float(file.metadata()["seconds"]))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CorruptFile(f"{path} is damaged ({error}). Delete it; the same command computes it again.") from error

    def write(self, name: str, computed: Computed) -> None:
        """Keep it under `name`, summed over components."""
        parts = {part: value.contiguous() for part, value in computed.products.sum_components()._asdict().items()}
        content = save(parts, metadata={"name": name, "seconds": repr(computed.seconds)})
        write_durably(self._path(name), [content])

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
