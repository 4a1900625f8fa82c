"""The listed scores taken apart: over the model's components, and over the tokens of the training example."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vestige.data import Batch
from vestige.gradients import token_losses
from vestige.indexes import batch_tokens
from vestige.methods._gradient_method import GradientMethod, Prepared
from vestige.methods._job import read_batches
from vestige.methods._protocol import Job, Method
from vestige.models import parameter_view
from vestige.progress import progress
from vestige.runs import ComponentScores, TokenScores

Pairs = Sequence[tuple[int, int]]
"""(query, row) of every listed score."""


def split_over_components(job: Job, method: Method, pairs: Pairs) -> list[ComponentScores] | None:
    """Return the score of every pair, split over components; None for a method that has none."""
    if not method.splits_components:
        return None
    distinct = sorted(set(pairs))
    queries, rows = torch.tensor([pair[0] for pair in distinct]), torch.tensor([pair[1] for pair in distinct])
    block = method.components(job, queries, rows)
    scores = block.scores.double().cpu().numpy()
    return [ComponentScores(query, row, part) for (query, row), part in zip(distinct, scores, strict=True)]


def split_over_tokens(job: Job, method: Method, pairs: Pairs) -> list[TokenScores]:
    """Return the score of every pair, split over the tokens of the example: the effect of learning to predict each.

    An example's loss is a sum over its target tokens, so its gradient and every score that is linear in it are too.
    With v the vector whose inner product with the gradient is the score, the share of token t is `<v, grad loss_t>`:
    the derivative of that token's loss along v. Forward-mode differentiation gives it for all tokens at once.
    """
    prepared, distinct = cast(GradientMethod, method).prepare(job), sorted(set(pairs))
    found: list[TokenScores] = []
    with progress(len(distinct), "Token scores", unit="pairs") as bar:
        for query in range(len(job.queries)):
            rows = [row for number, row in distinct if number == query]
            found += _split_query(job, prepared, query, rows)
            bar.advance(len(rows))
    return found


def _split_query(job: Job, prepared: Prepared, query: int, rows: Sequence[int]) -> Iterator[TokenScores]:
    """Yield the scores of a query for some rows, split over tokens."""
    loaded, data = job.model_for(job.settings.method), job.train
    model = loaded.model
    device = next(model.parameters()).device
    tangents: dict[str, Tensor] = {}
    for component, matrix in zip(job.components, prepared.direction(query), strict=True):
        parameter = model.get_parameter(component.parameter)
        tangent = tangents.setdefault(component.parameter, torch.zeros_like(parameter))
        parameter_view(model, component, tangent).copy_(matrix.to(device))
    norms = dict(zip(rows, prepared.row_norms(rows).tolist(), strict=True))
    wanted = np.asarray(rows, dtype=np.int64)
    for positions, batch in read_batches(model, data, batch_tokens(job.settings, loaded), wanted):
        derivatives = _derivatives(model, tangents, batch).double().cpu().numpy()
        for row, values in zip(wanted[positions].tolist(), derivatives, strict=True):
            count = max(int(data.target_counts[row]), 1) if job.settings.loss == "mean" else 1
            yield TokenScores(query, row, values[: len(data.input_ids[row])] / count / (norms[row] or 1.0))


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
