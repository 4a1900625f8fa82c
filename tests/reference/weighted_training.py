"""Plain gradient descent on weighted means of token losses, one example and one token at a time, in float64."""

import copy
from typing import NamedTuple

import torch
from torch import nn


class Row(NamedTuple):
    """An example as a model sees it, and how much it counts."""

    ids: list[int]
    targets: list[bool]
    weight: float


def trained(model: nn.Module, steps: list[list[Row]], rates: list[float]) -> nn.Module:
    """A float64 copy of the model after a step of gradient descent on each list of rows."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    for rows, rate in zip(steps, rates, strict=True):
        above, below = torch.zeros((), dtype=torch.float64), 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0]
            for place in range(1, len(row.ids)):
                if row.targets[place]:
                    chances = logits[place - 1].softmax(0)
                    above = above - row.weight * chances[row.ids[place]].log()
                    below += row.weight
        model.zero_grad()
        (above / below).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= rate * weight.grad
    return model
