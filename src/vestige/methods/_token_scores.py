"""A score split over the tokens of a training example: the effect of learning to predict each of them.

An example's loss is a sum over its target tokens, so its gradient and every score that is linear in it are too. With v
the vector whose inner product with the gradient is the score, the share of token t is `<v, grad loss_t>`: the
derivative of that token's loss along v. Forward-mode differentiation gives it for all tokens at once.
"""

from collections.abc import Iterator, Sequence
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
from vestige.gradients import Reduction, token_losses
from vestige.models import Component, batch_sharing, parameter_view


class RowTokens(NamedTuple):
    """Token shares of one training example."""

    row: int
    scores: Float[np.ndarray, "token"]


def token_scores(
    model: nn.Module,
    components: Sequence[Component],
    direction: Sequence[Float[Tensor, "out in"]],
    data: TokenizedData,
    rows: Sequence[int],
    reduction: Reduction,
    token_budget: int,
) -> Iterator[RowTokens]:
    """Yield the share of every token of `rows` in the inner product of their gradients with `direction`."""
    device = next(model.parameters()).device
    tangents: dict[str, Tensor] = {}
    for component, matrix in zip(components, direction, strict=True):
        parameter = model.get_parameter(component.parameter)
        tangent = tangents.setdefault(component.parameter, torch.zeros_like(parameter))
        parameter_view(model, component, tangent).copy_(matrix.to(device))
    lengths = data.lengths[np.asarray(rows, dtype=np.int64)]
    for places in plan_batches(lengths, token_budget, sharing=batch_sharing(model)):
        chosen = [rows[place] for place in places]
        derivatives = _derivatives(model, tangents, make_batch(data, chosen).to(device)).double().cpu().numpy()
        for row, values in zip(chosen, derivatives, strict=True):
            count = max(int(data.target_counts[row]), 1) if reduction == "mean" else 1
            yield RowTokens(row, values[: len(data.input_ids[row])] / count)


def _derivatives(model: nn.Module, tangents: dict[str, Tensor], batch: Batch) -> Float[Tensor, "example token"]:
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
