"""Derivatives of every token's loss along one direction of the weights, by forward-mode differentiation."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vestige.data import Batch
from vestige.gradients import token_losses


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
