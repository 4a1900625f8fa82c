"""Curvature as explicit matrices in float64, one unpadded example at a time: slow, obvious, shares no code."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def predicting(targets: Tensor) -> list[int]:
    """Positions whose output predicts a target."""
    return [t - 1 for t in range(1, len(targets)) if targets[t]]


def layer_factors(model: nn.Module, path: str, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(output gradients, inputs with a one at the end), a line for each token before the last target."""
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.update(inputs=inputs[0].detach(), output=output)

    handle = model.get_submodule(path).register_forward_hook(keep)
    log_probabilities = torch.log_softmax(model(ids[None]).logits[0], -1)
    handle.remove()
    sum(-log_probabilities[t, ids[t + 1]] for t in predicting(targets)).backward()
    model.zero_grad()
    last = max(predicting(targets)) + 1
    inputs = seen["inputs"].reshape(len(ids), -1)[:last]
    gradients = seen["output"].grad.reshape(len(ids), -1)[:last]
    return gradients, torch.cat([inputs, torch.ones(last, 1, dtype=inputs.dtype)], dim=1)


def kronecker(model: nn.Module, path: str, data) -> tuple[Tensor, Tensor, float]:
    """(S, A with the bias's line last, tokens per example), summed token by token."""
    left, right, tokens = 0.0, 0.0, 0
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        gradients, inputs = layer_factors(model, path, torch.as_tensor(ids).long(), torch.as_tensor(targets))
        for gradient, given in zip(gradients, inputs, strict=True):
            left, right, tokens = left + torch.outer(gradient, gradient), right + torch.outer(given, given), tokens + 1
    return left / tokens, right / tokens, tokens / len(data)


def eigen_corrected(left: Tensor, right: Tensor, gradients: list[Tensor]) -> Tensor:
    """EK-FAC as one matrix: explicit Kronecker eigenvectors, mean squares of the rotated gradients [out, in]."""
    vectors = torch.kron(torch.linalg.eigh(left).eigenvectors, torch.linalg.eigh(right).eigenvectors)
    squares = torch.stack([(vectors.T @ gradient.flatten()) ** 2 for gradient in gradients]).mean(0)
    return vectors @ torch.diag(squares) @ vectors.T


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Damping relative to the mean eigenvalue."""
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def _flat_function(model: nn.Module, names: list[str], ids: Tensor, targets: Tensor):
    """Logits at predicting positions as a function of the parameters `names` in one flat vector."""
    parameters = {name: model.get_parameter(name).detach() for name in names}
    start = torch.cat([value.flatten() for value in parameters.values()])

    def logits(flat: Tensor) -> Tensor:
        parts = flat.split([value.numel() for value in parameters.values()])
        values = {name: part.view(value.shape) for (name, value), part in zip(parameters.items(), parts, strict=True)}
        return functional_call(model, values, (ids[None],), tie_weights=True).logits[0][predicting(targets)]

    return logits, start


def gauss_newton(model: nn.Module, names: list[str], data) -> Tensor:
    """Mean over examples of J^T H J, in the parameters' own layout."""
    total = 0.0
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        function, start = _flat_function(model, names, torch.as_tensor(ids).long(), torch.as_tensor(targets))
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(function)(start)
        for slope, values in zip(jacobian, function(start).detach(), strict=True):
            chances = torch.softmax(values, -1)
            total = total + slope.T @ (torch.diag(chances) - torch.outer(chances, chances)) @ slope
    return total.detach() / len(data)


def hessian(model: nn.Module, names: list[str], data) -> Tensor:
    """Mean over examples of the second derivatives of the loss, in the parameters' own layout."""
    total = 0.0
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        ids, targets = torch.as_tensor(ids).long(), torch.as_tensor(targets)
        function, start = _flat_function(model, names, ids, targets)
        labels = ids[[t + 1 for t in predicting(targets)]]

        def loss(flat: Tensor, function=function, labels=labels) -> Tensor:
            return -torch.log_softmax(function(flat), -1)[torch.arange(len(labels)), labels].sum()

        with sdpa_kernel(SDPBackend.MATH):
            total = total + jacrev(jacrev(loss))(start)
    return total.detach() / len(data)
