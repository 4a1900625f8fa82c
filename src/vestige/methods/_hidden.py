"""Pooling of what the model computes, without gradients: shared by the methods that compare activations.

Both pool over the positions that predict a target token: what the model had in mind when it learned, or gave, the
answer. Padding and prompts carry no weight, so no score depends on the batch.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches
from vestige.indexes import batch_tokens
from vestige.methods._protocol import Job
from vestige.models import LoadedModel, acts_in_forward, batch_sharing

Pooling = Literal["mean", "sum", "last"]

NO_CAUSAL_SIGN = "no causal reading: higher = more alike; a negative score is unlike, not harmful"


def pooled(
    states: Float[Tensor, "example token width"], labels: Int[Tensor, "example token"], pooling: Pooling
) -> Float[Tensor, "example width"]:
    """Return the mean, sum or last of the states that predict a target; zero for an example without any.

    The result is float32 at least.
    """
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


def batches(job: Job, loaded: LoadedModel, data: TokenizedData, rows: Int[np.ndarray, "row"]) -> Iterator[Batch]:
    """Yield the rows in batches of the token budget, on the model's device, longest first."""
    device = next(loaded.model.parameters()).device
    budget = batch_tokens(job.settings, loaded)
    for places in plan_batches(data.lengths[rows], budget, sharing=batch_sharing(loaded.model)):
        yield make_batch(data, rows[places]).to(device)


def shortest_forward(model: nn.Module) -> nn.Module:
    """Return the model without its head; the whole model if it has an adapter that acts in PEFT's own forward pass."""
    return model if acts_in_forward(model) else backbone(model)


def backbone(model: nn.Module) -> nn.Module:
    """Return the model without its output head, where transformers marks the head; PEFT adapters stay."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(causal, "base_model", causal)
