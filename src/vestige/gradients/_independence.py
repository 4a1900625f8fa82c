"""Whether examples of a batch change each other's loss: in such a model no gradient is an example's own."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import Sharing, TokenizedData, make_batch
from vestige.errors import ModelError
from vestige.gradients._objective import CausalLoss
from vestige.models import LoadedModel, batch_sharing

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Nats per target token, and share of the loss, that rounding explains: kernels sum in another order in a batch."""


def longest_and_shortest(data: TokenizedData, sharing: Sharing, token_budget: int) -> Int[np.ndarray, "row"]:
    """Return the rows of the longest and the shortest example that can share a batch; fewer if no two can.

    Both have a target and are of different lengths, so that one of them is padded.
    """
    lengths = np.asarray(data.lengths)
    rows = np.flatnonzero((np.asarray(data.target_counts) > 0) & (2 * lengths <= token_budget))
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    groups = sharing.most(lengths[rows])
    for group in [] if sharing.equal else dict.fromkeys(groups[::-1].tolist()):
        members = rows[groups == group]
        if lengths[members[0]] < lengths[members[-1]]:
            return members[[-1, 0]]
    return rows[:0]


def require_independence(loaded: LoadedModel, data: TokenizedData, token_budget: int) -> None:
    """Raise if the longest and the shortest example that can share a batch change each other's loss in one.

    Raises:
        ModelError: They do; the message contains the option that runs every example alone.
    """
    pair = longest_and_shortest(data, batch_sharing(loaded.model), token_budget)
    if not len(pair):
        return
    objective = CausalLoss()
    together = _losses(loaded, objective, data, pair)
    alone = torch.cat([_losses(loaded, objective, data, pair[[place]]) for place in range(len(pair))])
    counts = torch.from_numpy(np.asarray(data.target_counts)[pair])
    formats = {one.dtype for one in loaded.model.parameters() if one.dtype in _TOLERANCE}
    tolerance = max((_TOLERANCE[one] for one in formats), default=_TOLERANCE[torch.bfloat16])
    apart = (together - alone).abs() / (alone.abs() + counts)
    worst = int(apart.nan_to_num(0.0).argmax())
    if apart[worst] > tolerance:
        shown = (pair[worst], pair[1 - worst])
        names = [f'"{data.examples[row].id}" ({int(data.lengths[row])} tokens)' for row in shown]
        raise ModelError(
            f"The loss of {names[0]} is {float(alone[worst]):.4f} alone and {float(together[worst]):.4f} in a batch "
            f"with {names[1]}: the forward pass of {loaded.name} depends on the batch (a mask made from token ids, "
            "experts with a capacity, statistics of the batch). Type --token-budget 1: it runs every example alone."
        )


def _losses(
    loaded: LoadedModel, objective: CausalLoss, data: TokenizedData, rows: Int[np.ndarray, "example"]
) -> Float[Tensor, "example"]:
    with torch.no_grad():
        batch = make_batch(data, rows).to(next(loaded.model.parameters()).device)
        return objective.losses(loaded.model, batch).double().cpu()
