"""What a model makes of texts: loss, margin, gap between logits, accuracy."""

import numpy as np
import torch
from torch import Tensor, nn

from vestige.data import NO_TARGET, TokenizedData, make_batch, plan_batches
from vestige.models import batch_sharing

_LEAST_DOUBT = 2.0**-52
"""A margin is the log-odds of a probability; one that float32 rounds to 1 counts as this far from it."""


@torch.no_grad()
def measure(model: nn.Module, data: TokenizedData, token_budget: int, *, mean: bool) -> dict[str, np.ndarray]:
    """Measure loss, margin, gap and accuracy of each text, float64 [text].

    The loss is the cross-entropy summed over target tokens, or averaged if `mean`. With l the negative mean loss per
    target token, the margin is l - log(1 - e^l), the log-odds of the tokens' geometric mean probability (the output
    that TRAK measures). The gap is the target's logit minus the largest other logit, the accuracy whether it is above
    zero, both averaged over target tokens. Without a target token the loss is 0 and the rest NaN.
    """
    sums, counts = np.zeros((3, len(data))), data.target_counts
    for rows in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
        if counts[rows].any():
            sums[:, rows] = _summed(model, data, rows)
    averages = sums / np.where(counts > 0, counts, np.nan)
    loss = np.where(counts > 0, averages[0], 0.0) if mean else sums[0]
    return {"loss": loss, "margin": margin(averages[0]), "gap": averages[1], "accuracy": averages[2]}


def margin(mean_loss: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) where p = e^-loss."""
    return -mean_loss - np.log(np.maximum(-np.expm1(-mean_loss), _LEAST_DOUBT))


def _summed(model: nn.Module, data: TokenizedData, rows: np.ndarray) -> np.ndarray:
    """Sum losses, gaps and right answers over the target tokens of each row, float64 [3, example]."""
    batch = make_batch(data, rows).to(next(model.parameters()).device)
    wanted = batch.labels[:, 1:] != NO_TARGET
    chosen = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][wanted].float()
    target = batch.labels[:, 1:][wanted][:, None]
    right = chosen.gather(1, target)[:, 0]
    losses = torch.logsumexp(chosen, dim=1) - right
    gaps = right - chosen.scatter(1, target, -torch.inf).amax(dim=1)
    owners = wanted.nonzero()[:, 0].cpu().numpy()
    return np.stack([_by_owner(owners, each, len(rows)) for each in (losses, gaps, gaps > 0)])


def _by_owner(owners: np.ndarray, values: Tensor, count: int) -> np.ndarray:
    return np.bincount(owners, weights=values.double().cpu().numpy(), minlength=count)
