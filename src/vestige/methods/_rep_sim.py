"""`rep-sim`: how alike the model's hidden states are for an example and for an answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import Batch, TokenizedData
from vestige.errors import ModelError, SpecError
from vestige.methods._hidden import NO_CAUSAL_SIGN, Pooling, batches, pooled, shortest_forward
from vestige.methods._protocol import Job, Method
from vestige.methods._registry import method
from vestige.runs import Meaning, ScoreBlock


@method("rep-sim")
@dataclass(frozen=True)
class RepSim(Method):
    """Cosine of the pooled hidden states of example and query (Rep-Sim of the DATE-LM benchmark).

    `layer` counts as transformers does: 0 is the embedding, the last one is the default. `pooling` "mean" averages
    over the positions that predict a target; "last" takes the last of them, as DATE-LM does. The mean is the default,
    because it does not hang on whether an answer ends with an end-of-text token.
    """

    layer: Annotated[int | None, "Number of the hidden state to compare, 0 being the embedding; none: the last."] = None
    pooling: Annotated[Pooling, "Over the positions that predict a target: their mean or sum, or the last one."] = (
        "mean"
    )

    needs_model = True
    works_sharded = True
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
        for batch in batches(job, loaded, data, rows):
            with torch.no_grad():
                states = _hidden_states(loaded.model, batch, self.layer)
                vectors = pooled(states, batch.labels, self.pooling)
            yield batch.rows.cpu(), torch.nn.functional.normalize(vectors, dim=1)


def _hidden_states(model: nn.Module, batch: Batch, layer: int | None) -> Float[Tensor, "example token width"]:
    """Return hidden states at `layer`, or the last ones.

    Raises:
        SpecError: the model has no such layer.
        ModelError: the model does not return hidden states.
    """
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
