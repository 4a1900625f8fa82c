"""Pooling of what the model computes, without gradients: shared by the methods that compare activations.

Both pool over the positions that predict a target token: what the model had in mind when it learned, or gave, the
answer. Padding and prompts carry no weight, so no score depends on the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, TokenizedData
from vestige.errors import ModelError, SpecError
from vestige.methods import Job, Method, method, read_batches
from vestige.models import Component, acts_in_forward
from vestige.runs import Meaning, ScoreBlock

Pooling = Literal["mean", "sum", "last"]
PoolingOption = Annotated[Pooling, "Over the positions that predict a target: their mean or sum, or the last one."]

NO_CAUSAL_SIGN = "no causal reading: higher = more alike; a negative score is unlike, not harmful"


def pool_states(
    states: Float[Tensor, "example token width"], labels: Int[Tensor, "example token"], pooling: Pooling
) -> Float[Tensor, "example width"]:
    """Return the mean, sum or last of the states that predict a target, float32 at least; zero if none does."""
    wide = torch.promote_types(states.dtype, torch.float32)
    weights = pooling_weights(labels, pooling, wide)
    return torch.bmm(weights.unsqueeze(1), states.to(wide)).squeeze(1)


def pooling_weights(
    labels: Int[Tensor, "example token"], pooling: Pooling, dtype: torch.dtype
) -> Float[Tensor, "example token"]:
    """Return the weight of each position: `t` counts when the token at `t + 1` is a target; all zero if none is."""
    predicting = torch.nn.functional.pad((labels[:, 1:] != NO_TARGET).to(dtype), (0, 1))
    if pooling == "mean":
        return predicting / predicting.sum(1, keepdim=True).clamp(min=1)
    if pooling == "last":
        later = predicting.flip(1).cumsum(1).flip(1)
        return predicting * (later == 1)
    return predicting


def shortest_forward(model: nn.Module) -> nn.Module:
    """Return the model without its head; the whole model if it has an adapter that acts in PEFT's own forward pass."""
    return model if acts_in_forward(model) else backbone(model)


def backbone(model: nn.Module) -> nn.Module:
    """Return the model without its output head, where transformers marks the head; PEFT adapters stay."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(causal, "base_model", causal)


@method("rep-sim")
@dataclass(frozen=True)
class RepSim(Method):
    """Cosine of the pooled hidden states of example and query (Rep-Sim of the DATE-LM benchmark).

    `layer` counts as transformers does: 0 is the embedding, the last one is the default. `pooling` "mean" averages
    over the positions that predict a target; "last" takes the last of them, as DATE-LM does. The mean is the default,
    because it does not hang on whether an answer ends with an end-of-text token.
    """

    layer: Annotated[int | None, "Number of the hidden state to compare, 0 being the embedding; none: the last."] = None
    pooling: PoolingOption = "mean"

    needs_model = True
    works_sharded = True
    reads_focus = ("span",)
    baseline = 2
    meaning = Meaning(
        sign=NO_CAUSAL_SIGN,
        unit="cosine",
        target="this model",
        normalisation="length of both hidden states",
        estimates="How alike the model's hidden states are while predicting the example and while giving the answer.",
        cost="One forward pass over the training data; one hidden state per query in memory, nothing on disk.",
        limits="Alike is not influential: it does not know what was learned from an example, and all cosines may be "
        "high when hidden states share a large common part.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the cosines of all rows, longest first."""
        queries = self._query_states(job)
        for rows, states in self._states(job, job.train, np.arange(len(job.train))):
            yield ScoreBlock(rows, (queries @ states.T).cpu())

    def _query_states(self, job: Job) -> Float[Tensor, "query width"]:
        rows, states = zip(*self._states(job, job.queries, np.arange(len(job.queries))), strict=True)
        return torch.cat(states)[torch.cat(rows).argsort().to(states[0].device)]

    def _states(
        self, job: Job, data: TokenizedData, rows: Int[np.ndarray, "row"]
    ) -> Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "row width"]]]:
        """Yield pooled states of length one (zero for an example without a target)."""
        loaded = job.model_for(self.name)
        for _, batch in read_batches(loaded.model, data, job.token_budget, rows):
            with torch.no_grad():
                states = _hidden_states(loaded.model, batch, self.layer)
                vectors = pool_states(states, batch.labels, self.pooling)
            yield batch.rows.cpu(), torch.nn.functional.normalize(vectors, dim=1)


def _hidden_states(model: nn.Module, batch: Batch, layer: int | None) -> Float[Tensor, "example token width"]:
    """Return hidden states at `layer`, or the last ones; refuse a layer or a model that has none."""
    run = shortest_forward(model)
    every = layer is not None or run is model
    output = run(input_ids=batch.input_ids, use_cache=False, output_hidden_states=every)
    if layer is None and getattr(output, "last_hidden_state", None) is not None:
        return output.last_hidden_state
    states = getattr(output, "hidden_states", None)
    if states is None:
        raise ModelError(
            f"{type(model).__name__} does not return hidden states, which `rep-sim` compares.\n"
            "Use a transformers model, or --method activation-dot."
        )
    if layer is not None and not -len(states) <= layer < len(states):
        raise SpecError(f"--option layer={layer}: the model has the hidden states 0 (embedding) to {len(states) - 1}.")
    return states[-1 if layer is None else layer]


@method("activation-dot")
@dataclass(frozen=True)
class ActivationDot(Method):
    """Inner products of layer outputs, pooled over positions, summed over the modules of the selected components.

    A module that holds several selected components (a weight and its bias) counts once, under the first; a tied weight
    counts each of its modules. `pooling` "mean" averages over the positions that predict a target, "sum" adds them up
    (long examples then score higher).
    """

    pooling: PoolingOption = "mean"

    needs_model = True
    splits_components = True
    reads_focus = ("span",)
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

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Compute the scores of some pairs, split over components; where several are of a module, the first has all."""
        numbers = {part.name: number for number, part in enumerate(job.components)}
        owners = torch.tensor([numbers[tap.component] for tap in taps_of(job.components)])
        distinct, column = torch.unique(queries, return_inverse=True)
        outputs = self._query_outputs(job, distinct.numpy())
        scores = torch.zeros(len(queries), len(numbers), dtype=torch.float64)
        for found, products in self._products(job, outputs, rows.unique().numpy()):
            pair, place = (rows[:, None] == found).nonzero(as_tuple=True)
            scores[pair] = scores[pair].index_add_(1, owners, products[:, column[pair], place].T.double())
        return scores

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
        loaded, taps = job.model_for(self.name), taps_of(job.components)
        if not taps:
            raise SpecError("The method `activation-dot` has no modules to compare: no component is selected.")
        with tap_modules(loaded.model, taps, self.pooling) as outputs:
            run = _shortest_forward(loaded.model, taps)
            for _, batch in read_batches(loaded.model, data, job.token_budget, rows):
                outputs.begin(batch)
                with torch.no_grad():
                    run(input_ids=batch.input_ids, use_cache=False)
                yield batch.rows.cpu(), outputs.collect()


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


class PooledOutputs:
    """Pools every tapped output the moment it is known, so that no activation outlives its layer."""

    def __init__(self, taps: Sequence[Tap], pooling: Pooling) -> None:
        self._taps = taps
        self._pooling: Pooling = pooling
        self._labels, self._sums = torch.empty(0, 0), dict[int, Tensor]()

    def begin(self, batch: Batch) -> None:
        """Start a batch."""
        self._labels, self._sums = batch.labels, {}

    def collect(self) -> list[Tensor]:
        """Return the pooled outputs of the batch, `[example, width]` for each tap.

        Raises:
            ModelError: a module did not run.
        """
        if missing := [tap.module for number, tap in enumerate(self._taps) if number not in self._sums]:
            raise ModelError(
                f"The module {missing[0]} of a selected component did not run ({len(missing)} did not).\n"
                "Leave it out with --components."
            )
        return [self._sums[number] for number in range(len(self._taps))]

    def hook(self, number: int) -> Callable[..., None]:
        """Return a forward hook that pools the output of one tap's module; it keeps no graph alive."""

        def add(_module: nn.Module, _arguments: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found = pool_states(_by_example(states.detach(), *self._labels.shape), self._labels, self._pooling)
            # A module that runs twice in one pass (shared layers) has the sum of its outputs.
            self._sums[number] = self._sums[number] + found if number in self._sums else found

        return add


def _by_example(states: Tensor, examples: int, tokens: int) -> Float[Tensor, "example token width"]:
    """Return the outputs by example: some layers flatten examples and tokens, or serve positions once for all."""
    if states.dim() == 2:
        states = states.reshape(-1, tokens, states.shape[-1])
    return states.expand(examples, tokens, states.shape[-1])


@contextmanager
def tap_modules(model: nn.Module, taps: Sequence[Tap], pooling: Pooling) -> Iterator[PooledOutputs]:
    """Pool the outputs of the taps while the context lasts."""
    outputs = PooledOutputs(taps, pooling)
    with ExitStack() as hooks:
        for number, tap in enumerate(taps):
            hooks.enter_context(model.get_submodule(tap.module).register_forward_hook(outputs.hook(number)))
        yield outputs


def _shortest_forward(model: nn.Module, taps: Sequence[Tap]) -> nn.Module:
    """Return the backbone if every tapped module is in it, else the whole model: logits are much of the work."""
    shorter = shortest_forward(model)
    inside = set(shorter.modules())
    return shorter if all(model.get_submodule(tap.module) in inside for tap in taps) else model
