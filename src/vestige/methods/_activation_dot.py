"""`activation-dot`: inner products of layer outputs, the cheapest relative of the gradient inner product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import Batch, TokenizedData
from vestige.errors import ModelError, SpecError
from vestige.methods._hidden import NO_CAUSAL_SIGN, Pooling, batches, pooled, shortest_forward
from vestige.methods._protocol import ComponentBlock, Job, Method
from vestige.methods._registry import method
from vestige.models import Component
from vestige.runs import Meaning, ScoreBlock


@method("activation-dot")
@dataclass(frozen=True)
class ActivationDot(Method):
    """Inner products of layer outputs, pooled over positions, summed over the modules of the selected components.

    A module that holds several selected components (a weight and its bias) counts once, under the first; a tied weight
    counts each of its modules. `pooling` "mean" averages over the positions that predict a target, "sum" adds them up
    (long examples then score higher).
    """

    pooling: Annotated[Pooling, "Over the positions that predict a target: their mean or sum, or the last one."] = (
        "mean"
    )

    needs_model = True
    splits_components = True
    meaning = Meaning(
        sign=NO_CAUSAL_SIGN,
        unit="squared activation",
        target="this model",
        normalisation="none",
        estimates="How alike the outputs of the selected modules are for the example and for the answer, by size too.",
        cost="One forward pass over the training data; one vector of all outputs per query in memory, nothing on disk.",
        limits="Alike is not influential, and modules with large outputs outweigh the others.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows, longest first."""
        queries = self._query_outputs(job, np.arange(len(job.queries)))
        for rows, products in self._products(job, queries, np.arange(len(job.train))):
            yield ScoreBlock(rows, products.sum(0))

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Compute the scores of some pairs, split over the components that stand for a module."""
        names = [tap.component for tap in _taps(job)]
        asked, column = np.unique(queries.cpu().numpy(), return_inverse=True)
        wanted, place = np.unique(rows.cpu().numpy(), return_inverse=True)
        outputs = self._query_outputs(job, asked)
        scores = torch.zeros(len(queries), len(names), dtype=torch.float64)
        for found, products in self._products(job, outputs, wanted):
            local = {int(row): number for number, row in enumerate(found)}
            for pair, (query, row) in enumerate(zip(column, wanted[place], strict=True)):
                if int(row) in local:
                    scores[pair] = products[:, query, local[int(row)]].double()
        return _merged(names, scores)

    def _query_outputs(self, job: Job, rows: Int[np.ndarray, "query"]) -> list[Float[Tensor, "query width"]]:
        """Return pooled outputs of each tapped module, the queries in the order of `rows`."""
        found, outputs = zip(*self._outputs(job, job.queries, rows), strict=True)
        # Rows are distinct and ascending, so sorting what came back restores their order.
        order = torch.cat(found).argsort().to(outputs[0][0].device)
        return [torch.cat(module)[order] for module in zip(*outputs, strict=True)]

    def _products(
        self, job: Job, queries: list[Float[Tensor, "query width"]], rows: Int[np.ndarray, "row"]
    ) -> Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "module query row"]]]:
        for found, outputs in self._outputs(job, job.train, rows):
            products = [query @ output.T for query, output in zip(queries, outputs, strict=True)]
            yield found, torch.stack(products).cpu()

    def _outputs(
        self, job: Job, data: TokenizedData, rows: Int[np.ndarray, "row"]
    ) -> Iterator[tuple[Int[Tensor, "row"], list[Float[Tensor, "row width"]]]]:
        loaded, taps = job.model_for(self.name), _taps(job)
        with tapped(loaded.model, taps, self.pooling) as outputs:
            run = _shortest_forward(loaded.model, taps)
            for batch in batches(job, loaded, data, rows):
                outputs.begin(batch)
                with torch.no_grad():
                    run(input_ids=batch.input_ids, use_cache=False)
                yield batch.rows.cpu(), outputs.collected()


class Tap(NamedTuple):
    """A module whose output is pooled."""

    module: str
    component: str
    """The component that the module's output is booked under."""


def taps_of(components: Sequence[Component]) -> list[Tap]:
    """Return one tap for each module that holds a selected component, in the order of the components."""
    owners: dict[str, str] = {}
    for component in components:
        for use in component.uses:
            owners.setdefault(use.module, component.name)
    return [Tap(module, component) for module, component in owners.items()]


def _taps(job: Job) -> list[Tap]:
    taps = taps_of(job.components)
    if not taps:
        raise SpecError("The method `activation-dot` has no modules to compare: no component is selected.")
    return taps


class PooledOutputs:
    """Pools every tapped output the moment it is known, so that no activation outlives its layer."""

    def __init__(self, taps: Sequence[Tap], pooling: Pooling) -> None:
        self._taps = taps
        self._pooling: Pooling = pooling
        self._labels = torch.empty(0, 0)
        self._sums: list[Tensor | None] = []

    def begin(self, batch: Batch) -> None:
        """Start a batch."""
        self._labels = batch.labels
        self._sums = [None] * len(self._taps)

    def collected(self) -> list[Tensor]:
        """Return the pooled outputs of the batch, `[example, width]` for each tap.

        Raises:
            ModelError: a module did not run.
        """
        missing = [tap.module for tap, found in zip(self._taps, self._sums, strict=True) if found is None]
        if missing:
            raise ModelError(
                f"The module {missing[0]} of a selected component did not run ({len(missing)} did not).\n"
                "Leave it out with --components."
            )
        return [found for found in self._sums if found is not None]

    def hook(self, number: int) -> Callable[..., None]:
        """Return a forward hook that pools the output of one tap's module; it keeps no graph alive."""

        def add(_module: nn.Module, _arguments: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found = pooled(_by_example(states.detach(), *self._labels.shape), self._labels, self._pooling)
            known = self._sums[number]
            # A module that runs twice in one pass (shared layers) has the sum of its outputs.
            self._sums[number] = found if known is None else known + found

        return add


def _by_example(states: Tensor, examples: int, tokens: int) -> Float[Tensor, "example token width"]:
    """Return the outputs as [example, token, width].

    Some layers flatten examples and tokens, or serve positions once for all.
    """
    if states.dim() == 2:
        states = states.reshape(-1, tokens, states.shape[-1])
    return states.expand(examples, tokens, states.shape[-1])


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap], pooling: Pooling) -> Iterator[PooledOutputs]:
    """Pool the outputs of the taps while the context lasts."""
    outputs = PooledOutputs(taps, pooling)
    handles = [
        model.get_submodule(tap.module).register_forward_hook(outputs.hook(number)) for number, tap in enumerate(taps)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _merged(names: Sequence[str], scores: Float[Tensor, "pair module"]) -> ComponentBlock:
    """Add up the modules of one component (a tied weight has two)."""
    distinct = list(dict.fromkeys(names))
    numbers = torch.tensor([distinct.index(name) for name in names])
    merged = scores.new_zeros(len(scores), len(distinct)).index_add_(1, numbers, scores)
    return ComponentBlock(distinct, merged)


def _shortest_forward(model: nn.Module, taps: Sequence[Tap]) -> nn.Module:
    """Return the backbone if every tapped module is in it, else the whole model.

    Logits of a large vocabulary are most of a small model's work.
    """
    shorter = shortest_forward(model)
    inside = set(shorter.modules())
    return shorter if all(model.get_submodule(tap.module) in inside for tap in taps) else model
