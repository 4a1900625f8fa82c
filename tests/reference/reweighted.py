"""Training a causal language model again with other weights of the examples: plain torch, nothing of Vestige."""

from collections import defaultdict

import torch
from torch import nn


def retrain(model, steps, weights, *, weight_decay=0.0, clip=0.0, momentum=None):
    """Train in place.

    Args:
        model: A causal model without dropout, whose trained parameters require gradients.
        steps: For each step a learning rate and its examples (id, token ids, mask of the targets), in order.
        weights: By id; 1 where there is none. The number of target tokens that a step divides by never changes.
        weight_decay: Of matrices alone, as the Trainer of transformers decays.
        clip: Largest norm of a gradient; 0 for none.
        momentum: SGD in place of AdamW.
    """
    weights = defaultdict(lambda: 1.0, weights)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [each for _, each in trained if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for _, each in trained if each.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups) if momentum is None else torch.optim.SGD(groups, momentum=momentum)
    for rate, rows in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate
        targets = sum(sum(mask) for _, _, mask in rows)
        for name, ids, mask in rows:
            (weights[name] * example_loss(model, ids, mask) / targets).backward()
        if clip:
            nn.utils.clip_grad_norm_([each for _, each in trained], clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def example_loss(model, ids, mask):
    """Return the loss summed over the targets of one example."""
    chances = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)
    chosen = chances[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -(chosen * torch.tensor(mask[1:])).sum()
