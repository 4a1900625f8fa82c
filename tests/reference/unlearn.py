"""Ascents the slow way: one example at a time, the optimizers written out, in float64. Shares no code with Vestige."""

import copy

import torch


def example_loss(model, ids, targets):
    """Cross-entropy of one example, summed over its target tokens."""
    tokens = torch.as_tensor(ids, dtype=torch.int64)[None]
    chances = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for place in range(1, len(ids)):
        if targets[place]:
            loss = loss - chances[place - 1, int(ids[place])]
    return loss


def set_loss(model, data, rows):
    """Mean over all target tokens of the rows."""
    total = sum(example_loss(model, data.input_ids[row], data.targets[row]) for row in rows)
    return total / sum(int(data.targets[row].sum()) for row in rows)


def gradient(model, data, rows):
    """Of the set's loss, flattened over the model's parameters."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = torch.autograd.grad(set_loss(model, data, rows), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def climbed(model, data, batches, rate, optimizer):
    """A copy of the model after one step up for each batch: plain, or Adam's with bias correction."""
    moved = copy.deepcopy(model)
    first = [torch.zeros_like(parameter) for parameter in moved.parameters()]
    second = [torch.zeros_like(parameter) for parameter in moved.parameters()]
    for step, rows in enumerate(batches, start=1):
        slopes = gradient(moved, data, rows)
        with torch.no_grad():
            for place, (parameter, slope) in enumerate(zip(moved.parameters(), slopes, strict=True)):
                if optimizer == "sgd":
                    parameter += rate * slope
                    continue
                first[place] = 0.9 * first[place] + 0.1 * slope
                second[place] = 0.999 * second[place] + 0.001 * slope**2
                mean, square = first[place] / (1 - 0.9**step), second[place] / (1 - 0.999**step)
                parameter += rate * mean / (square.sqrt() + 1e-8)
    return moved
