"""A model retrained with a bare loop of PyTorch, and texts measured one by one: slow, obvious, shared with nothing."""

import copy

import torch
from torch import nn


def retrained(model: nn.Module, texts, batches, learning_rate: float) -> nn.Module:
    """AdamW, rate falling linearly, gradients of the mean target loss clipped to norm 1.

    `texts` are pairs of token ids and target marks.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for number, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (len(batches) - number) / len(batches)
        losses = torch.cat([token_losses(model, *texts[row]) for row in rows])
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def token_losses(model: nn.Module, ids, targets) -> torch.Tensor:
    """The loss of each target token."""
    chances = model(input_ids=torch.tensor([list(map(int, ids))])).logits[0].log_softmax(-1)
    return torch.stack([-chances[at - 1, int(ids[at])] for at in range(1, len(ids)) if targets[at]])


def gaps(model: nn.Module, ids, targets) -> list[float]:
    """By how much each target token's logit is above all others."""
    logits = model(input_ids=torch.tensor([list(map(int, ids))])).logits[0]
    found = []
    for at in range(1, len(ids)):
        if targets[at]:
            others = [float(one) for token, one in enumerate(logits[at - 1]) if token != int(ids[at])]
            found.append(float(logits[at - 1, int(ids[at])]) - max(others))
    return found
