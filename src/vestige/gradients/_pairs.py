"""Exact products of all pairs of examples of two data sets, block by block, in bounded memory."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.errors import DataError
from vestige.gradients._cross import Gradients, joined, numbers
from vestige.gradients._held import HeldGradients, Room
from vestige.gradients._objective import Objective, example_count
from vestige.gradients._pass import GradientPass
from vestige.gradients._sinks import KeepingSink
from vestige.models import Component

MEMORY_BYTES = 2**30
"""Most bytes of a block of the second examples: half for their factors, half for matrices formed from them."""


class _Block(NamedTuple):
    """Some batches of the second examples, held while the first stream by."""

    rows: slice
    batches: range
    held: list[HeldGradients]


def pairwise_products(
    model: nn.Module,
    components: Sequence[Component],
    objective: Objective,
    first_batches: Sequence[Any],
    second_batches: Sequence[Any] | None = None,
    *,
    by_component: bool = False,
    memory_bytes: int = MEMORY_BYTES,
) -> Float[Tensor, "*component example example2"]:
    """Return the inner products of the gradients of every first example with those of every second, or of the first.

    `[example, example2]` in the order of the batches, on the CPU; with `by_component`, `[component, example,
    example2]`, whose sum it is. Without `second_batches` the first meet themselves, and each pair of batches once.

    Factors of a block of second batches are kept (at least one batch), and the first run by once for every block; no
    gradient is formed where that is dearer (`cheapest_route`).

    Raises:
        DataError: there is no batch.
    """
    others = first_batches if second_batches is None else second_batches
    if len(first_batches) == 0 or len(others) == 0:
        raise DataError("Products of pairs need examples on both sides, and one side has no batch.")
    rows = _rows(first_batches)
    shape = (len(components) if by_component else 1, rows[-1].stop, _rows(others)[-1].stop)
    total: Tensor | None = None
    with GradientPass(model, components, objective) as gradient_pass:
        for block in _blocks(gradient_pass, components, others, len(first_batches), memory_bytes):
            start = block.batches.start if second_batches is None else 0
            for place in range(start, len(first_batches)):
                gradients = _gradients(gradient_pass, components, first_batches[place])
                pairs = zip(block.held, gradients, strict=True)
                found = torch.stack([held.products(mine).to("cpu", _wide(gradients)) for held, mine in pairs])
                found = found if by_component else found.sum(0, keepdim=True)
                total = found.new_zeros(shape) if total is None else total
                total[:, rows[place], block.rows] = found
                if second_batches is None and place >= block.batches.stop:
                    total[:, block.rows, rows[place]] = found.transpose(1, 2)
    assert total is not None
    return total if by_component else total[0]


def _rows(batches: Sequence[Any]) -> list[slice]:
    """Return the positions of each batch's examples among all."""
    rows, start = [], 0
    for batch in batches:
        rows.append(slice(start, start + example_count(batch)))
        start = rows[-1].stop
    return rows


def _gradients(gradient_pass: GradientPass, components: Sequence[Component], batch: Any) -> list[Gradients]:
    sink = KeepingSink(components)
    sink.begin(example_count(batch))
    gradient_pass.run(batch, sink)
    return sink.finish()


def _wide(gradients: Sequence[Gradients]) -> torch.dtype:
    return next((one.like().dtype for one in gradients if not one.zero), torch.float32)


def _blocks(
    gradient_pass: GradientPass,
    components: Sequence[Component],
    batches: Sequence[Any],
    uses: int,
    memory_bytes: int,
) -> Iterator[_Block]:
    """Yield the batches in order, as many at once as their factors fit into half of the memory."""
    rows, waiting, size, start = _rows(batches), [], 0, 0
    for place, batch in enumerate(batches):
        gradients = _gradients(gradient_pass, components, batch)
        bytes_of_batch = sum(numbers(one) for one in gradients) * torch.empty((), dtype=_wide(gradients)).element_size()
        if waiting and size + bytes_of_batch > memory_bytes // 2:
            yield _block(waiting, rows, range(start, place), uses, memory_bytes)
            waiting, size, start = [], 0, place
        waiting.append(gradients)
        size += bytes_of_batch
    yield _block(waiting, rows, range(start, len(batches)), uses, memory_bytes)


def _block(waiting: list[list[Gradients]], rows: list[slice], batches: range, uses: int, memory_bytes: int) -> _Block:
    room = Room(memory_bytes // 2)
    held = [HeldGradients(joined(parts), room, uses) for parts in zip(*waiting, strict=True)]
    return _Block(slice(rows[batches.start].start, rows[batches.stop - 1].stop), batches, held)
