"""TracIn, LESS and TRAK written out slowly in float64: one model, one example, one query at a time."""

import torch
from torch import Tensor, nn

from tests.reference.gradients import example_gradients, example_loss


def gradient(model: nn.Module, names: list[str], ids, targets, mean: bool = False) -> Tensor:
    """The gradients of the named parameters, one after another."""
    found = example_gradients(model, torch.as_tensor(ids).long(), torch.as_tensor(targets), mean)
    return torch.cat([found[name].flatten() for name in names])


def gradients(model: nn.Module, names: list[str], data, mean: bool = False) -> Tensor:
    """[example, parameter]."""
    pairs = zip(data.input_ids, data.targets, strict=True)
    return torch.stack([gradient(model, names, ids, targets, mean) for ids, targets in pairs])


def tracin(models: list[nn.Module], rates: list[float], names: list[str], train, queries) -> Tensor:
    """sum_c lr_c <g_c(q), g_c(z)>."""
    return sum(  # type: ignore[return-value]
        rate * gradients(model, names, queries) @ gradients(model, names, train).T
        for model, rate in zip(models, rates, strict=True)
    )


def adam_update(gradient: Tensor, first: Tensor, second: Tensor, step: int, betas, epsilon: float) -> Tensor:
    """What Adam would subtract, per unit of learning rate, after this gradient."""
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    corrected = first / (1 - betas[0] ** (step + 1)), second / (1 - betas[1] ** (step + 1))
    return corrected[0] / (corrected[1].sqrt() + epsilon)


def margins(model: nn.Module, names: list[str], data) -> tuple[Tensor, Tensor]:
    """Gradient of log(p / (1 - p)) by autograd, and p, where p = exp(-mean loss of the example's own tokens)."""
    rows, probabilities = [], []
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        values = {name: value.detach().clone() for name, value in model.named_parameters()}
        for name in names:
            values[name].requires_grad_(True)
        loss = example_loss(model, values, torch.as_tensor(ids).long(), torch.as_tensor(targets), True)
        p = torch.exp(-loss)
        found = torch.autograd.grad(torch.log(p / (1 - p)), [values[name] for name in names])
        rows.append(torch.cat([part.flatten() for part in found]))
        probabilities.append(p.detach())
    return torch.stack(rows), torch.stack(probabilities)


def trak(models: list[nn.Module], names: list[str], train, queries, damping: float) -> Tensor:
    """mean_m [phi(q) (Phi^T Phi + d I)^-1 phi(z)] * mean_m [1 - p(z)], the projection being the identity."""
    kernels, doubts = [], []
    for model in models:
        phi, p = margins(model, names, train)
        asked, _ = margins(model, names, queries)
        gram = phi.T @ phi
        gram += damping * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        kernels.append(asked @ torch.linalg.solve(gram, phi.T))
        doubts.append(1 - p)
    return torch.stack(kernels).mean(0) * torch.stack(doubts).mean(0)
