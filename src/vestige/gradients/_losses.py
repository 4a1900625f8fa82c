"""Of the losses of examples: what the model knows by them, and derivatives along directions of its weights."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vestige.data import Batch, TokenizedData, make_batch, plan_batches
from vestige.gradients._cards import FittingBatches
from vestige.gradients._objective import CausalLoss, token_losses
from vestige.models import batch_sharing

BETTER = 0.95
"""Share of the guesses' loss below which a model has learned something: random weights, which favour some tokens by
chance, come within a few percent."""


class Second(NamedTuple):
    """How the weighted loss of a batch, and its gradient, change along several directions."""

    losses: Float[Tensor, "example token"]
    derivatives: Float[Tensor, "direction example token"]
    """Inner product of each direction with the gradient of each token's loss, times the example's share."""
    products: dict[str, Tensor]
    """The Hessian of the weighted loss times each direction, by parameter, [direction, *shape]."""


def second_derivatives(
    model: nn.Module, batch: Batch, shares: Float[Tensor, "example 1"], directions: dict[str, Tensor]
) -> Second:
    """Return the derivatives along directions, by one forward pass and a double backward pass for each direction.

    The model keeps its mode: in training mode dropout falls as the random numbers of torch have it, once for all
    directions. Double backward is used rather than reverse over forward, in which torch takes the statistics of a
    layer norm for constants.

    Args:
        model: Any causal model.
        batch: The examples.
        shares: What each example's losses are multiplied with in the sum.
        directions: By name of parameter, [direction, *shape].
    """
    parameters = {name: model.get_parameter(name) for name in directions}
    # Only the composed attention can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        losses = token_losses(model, batch)
        weights = torch.ones_like(losses, requires_grad=True)
        total = (losses * weights * shares).sum()
        gradients = torch.autograd.grad(total, [*parameters.values()], create_graph=True)
        count = len(next(iter(directions.values())))
        found = [
            torch.autograd.grad(
                gradients,
                [weights, *parameters.values()],
                [each[number] for each in directions.values()],
                retain_graph=number + 1 < count,
                allow_unused=True,
                materialize_grads=True,
            )
            for number in range(count)
        ]
    derivatives, *products = (torch.stack(column) for column in zip(*found, strict=True))
    return Second(losses.detach(), derivatives, dict(zip(parameters, products, strict=True)))


def token_derivatives(model: nn.Module, tangents: dict[str, Tensor], batch: Batch) -> Float[Tensor, "example token"]:
    """Compute the derivative of every token's loss along the tangents."""
    parameters = dict(model.named_parameters())
    primals = {name: parameters[name].detach() for name in tangents}

    def losses(values: dict[str, Tensor]) -> Tensor:
        return token_losses(lambda **inputs: functional_call(model, values, (), inputs), batch)

    # Only the composed attention has a forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _UntrainedRows():
        return torch.func.jvp(losses, (primals,), (tangents,))[1]


class _UntrainedRows(TorchFunctionMode):
    """The row `padding_idx` of an embedding is never trained, so its look-up has no derivative either."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return output
        ids, weight, *rest = args
        padding = rest[0] if rest else (kwargs or {}).get("padding_idx")
        if padding is None:
            return output
        untrained = unpack_dual(weight).primal[padding]
        return torch.where((ids == padding)[..., None], untrained, output)


class Knowledge(NamedTuple):
    """Mean loss per target token, in nats."""

    model: float
    uniform: float
    """Of a guess that takes all tokens of the vocabulary for equally likely."""
    unigram: float
    """Of a guess by how often each token is a target in the other examples."""

    @property
    def learned(self) -> bool:
        """True if the model does better than both guesses."""
        return self.model < BETTER * min(self.uniform, self.unigram)

    @property
    def reading(self) -> str:
        """The three losses in words."""
        return (
            f"{self.model:.2f} nats per token, where guessing by the tokens' frequencies has {self.unigram:.2f} and "
            f"equal chances have {self.uniform:.2f}"
        )


def measure_knowledge(
    model: nn.Module, data: TokenizedData, token_budget: int, *, losses: Float[np.ndarray, "example"] | None = None
) -> Knowledge | None:
    """Return the loss of the model and of guessing on the targets of `data`; None where there is no target.

    The frequencies that an example is guessed by are those of the other examples, smoothed towards equal chances by
    the number of distinct tokens (Witten and Bell 1991), so that a few rare tokens do not decide.

    Args:
        model: A causal language model.
        data: Some examples.
        token_budget: Most tokens of a batch.
        losses: Sums of the model's losses over the targets of each example, where they are known.
    """
    counts = data.target_counts
    if not counts.any():
        return None
    total = _sum_losses(model, data, token_budget) if losses is None else float(losses.sum())
    targets = [np.asarray(ids)[np.asarray(mask)] for ids, mask in zip(data.input_ids, data.targets, strict=True)]
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    shape = getattr(getattr(embeddings, "weight", None), "shape", (0,))
    size = max(int(shape[0]), *(int(ids.max()) + 1 for ids in targets if len(ids)))
    return Knowledge(total / int(counts.sum()), math.log(size), _unigram_loss(targets, size))


def _sum_losses(model: nn.Module, data: TokenizedData, token_budget: int) -> float:
    device, total = next(model.parameters()).device, 0.0
    objective, fitting = CausalLoss("sum"), FittingBatches(data.lengths)

    def run(rows: np.ndarray) -> float:
        return float(objective.losses(model, make_batch(data, rows).to(device)).double().sum())

    with torch.no_grad():
        for batch in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
            total += sum(fitting.run(batch, run))
    return total


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
