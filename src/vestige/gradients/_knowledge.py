"""Test whether the model has learned anything: its loss beside that of guessing, which needs no model."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.gradients._objective import CausalLoss
from vestige.models import batch_sharing

BETTER = 0.95
"""Share of the guesses' loss below which a model has learned something: random weights, which favour some tokens by
chance, come within a few percent."""


class Knowledge(NamedTuple):
    """Mean loss per target token, in nats."""

    model: float
    uniform: float
    """Of a guess that takes all tokens of the vocabulary for equally likely."""
    unigram: float
    """Of a guess by how often each token is a target in the other examples."""

    @property
    def learned(self) -> bool:
        """Return whether the model does better than both guesses."""
        return self.model < BETTER * min(self.uniform, self.unigram)

    @property
    def reading(self) -> str:
        """The three losses in words."""
        return (
            f"{self.model:.2f} nats per token, where guessing by the tokens' frequencies has {self.unigram:.2f} and "
            f"equal chances have {self.uniform:.2f}"
        )


def measure_knowledge(model: nn.Module, data: TokenizedData, token_budget: int) -> Knowledge | None:
    """Return the loss of the model and of guessing on the targets of `data`; None where there is no target.

    The frequencies that an example is guessed by are those of the other examples, smoothed towards equal chances by
    the number of distinct tokens (Witten and Bell 1991), so that a few rare tokens do not decide.
    """
    counts = data.target_counts
    if not counts.any():
        return None
    device, total = next(model.parameters()).device, 0.0
    with torch.no_grad():
        for rows in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
            losses = CausalLoss("sum").losses(model, make_batch(data, rows).to(device))
            total += float(losses.double().sum())
    targets = [np.asarray(ids)[np.asarray(mask)] for ids, mask in zip(data.input_ids, data.targets, strict=True)]
    size = _vocabulary(model, targets)
    return Knowledge(total / int(counts.sum()), math.log(size), _unigram_loss(targets, size))


def _vocabulary(model: nn.Module, targets: list[np.ndarray]) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    shape = getattr(getattr(embeddings, "weight", None), "shape", (0,))
    return max(int(shape[0]), *(int(ids.max()) + 1 for ids in targets if len(ids)))


def _unigram_loss(targets: list[np.ndarray], size: int) -> float:
    everything = np.concatenate(targets)
    counts = np.bincount(everything, minlength=size)
    loss = 0.0
    for ids in targets:
        own = np.bincount(ids, minlength=size)
        others = counts - own
        distinct = max(int((others > 0).sum()), 1)
        chances = (others[ids] + distinct / size) / (others.sum() + distinct)
        loss -= float(np.log(chances).sum())
    return loss / len(everything)
