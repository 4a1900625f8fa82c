"""The training loop: chosen batches, one optimizer, nothing random in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch
from vestige.errors import DataError, NonFinite

_LARGEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimizer and of its learning rate."""

    learning_rate: float
    """At its highest."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0
    """Decoupled for adamw, an L2 penalty for the others."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero over the steps after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises linearly from zero."""
    clip: float = _LARGEST_GRADIENT_NORM
    """Largest norm of a step's gradient; 0 does not clip."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, of a training of `steps`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(steps - self.warmup, 1)
        factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return self.learning_rate * factor[self.schedule]


class Step(NamedTuple):
    """Measurements of one step of a training."""

    number: int
    """Steps done, this one included."""
    loss: float
    """Summed over the target tokens of the batch, in nats."""
    targets: int
    state: Callable[[], dict[str, Any]]
    """Weights, optimizer and step, from which `train` continues."""


def train(
    model: nn.Module,
    data: TokenizedData,
    batches: Sequence[np.ndarray],
    recipe: Recipe,
    after_step: Callable[[Step], None] = lambda _: None,
    resume: dict[str, Any] | None = None,
) -> None:
    """Train the model's weights that require gradients, one step per batch, on the mean loss of its targets.

    Dropout stays off, so the same start, batches, hardware and thread count give the same weights.

    Args:
        model: Trained in place.
        data: What `batches` are rows of.
        batches: Rows of each step, in order; every batch has a target token.
        recipe: Settings of the optimizer.
        after_step: Called after each step.
        resume: `Step.state()` of an earlier training with the same arguments, which goes on from there.

    Raises:
        NonFinite: A loss is not finite; the message names the examples of the batch.
    """
    # Evaluation mode, although weights are trained: it only turns dropout off.
    model.eval()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = list(named.values())
    optimizer = _optimizer(parameters, recipe)
    device, counts = parameters[0].device, data.target_counts
    first = 0 if resume is None else _restore(named, optimizer, resume)
    for number in range(first, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number, len(batches))
        rows = batches[number]
        loss = summed_loss(model, make_batch(data, rows).to(device))
        total, targets = loss.item(), int(counts[rows].sum())
        if not math.isfinite(total):
            raise NonFinite(_not_finite(data, rows, number, len(batches), recipe))
        (loss / targets).backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(Step(number + 1, total, targets, lambda done=number + 1: _state(named, optimizer, done)))


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over the target tokens of a batch, in nats, float32."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    wanted = batch.labels[:, 1:] != NO_TARGET
    return F.cross_entropy(logits[:, :-1][wanted].float(), batch.labels[:, 1:][wanted], reduction="sum")


def shuffled_batches(data: TokenizedData, rows: np.ndarray, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Return batches for `steps` steps: pass after pass over the rows, each in its own order, the last batch smaller.

    Args:
        data: What `rows` belong to; rows without a target token are left out, for nothing can be learnt from them.
        rows: Examples to train on.
        size: Examples in a batch.
        steps: How many batches.
        seed: Of the orders.

    Raises:
        DataError: No row has a target token.
    """
    counts = data.target_counts
    useful = np.sort(rows[counts[rows] > 0])
    if not len(useful):
        raise DataError(f"{data.name}: none of {len(rows)} examples has a target token, so there is nothing to learn.")
    order, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        shuffled = order.permutation(useful)
        batches += [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]
    return batches[:steps]


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    common = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **common)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer](parameters, **common)


def _state(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    weights = {name: parameter.detach() for name, parameter in named.items()}
    return {"weights": weights, "optimizer": optimizer.state_dict(), "step": step}


def _restore(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _not_finite(data: TokenizedData, rows: np.ndarray, step: int, steps: int, recipe: Recipe) -> str:
    ids = ", ".join(repr(data.examples[row].id) for row in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return (
        f"The loss of the batch in step {step + 1} of {steps} is not finite; its examples are {ids}{more}. Nothing was "
        f"saved. Lower the learning rate (now {recipe.learning_rate:g}), or check these examples."
    )
