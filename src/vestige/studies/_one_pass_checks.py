"""Products from one pass beside gradients that are computed once more, one at a time, and beside projections."""

import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.data import make_batch
from vestige.evaluate import OnePassResult
from vestige.models import load_model, trainable_copy
from vestige.models._training import summed_loss


class DirectGradients(NamedTuple):
    """What gradients computed by themselves say."""

    examples: int
    seconds: float
    """Of one example: a batch of one, all weights."""
    largest_difference: float
    """Of a cosine from the sum of components' products and one of two whole gradients."""


class ProjectionErrors(NamedTuple):
    """Mean absolute differences of cosines over all listed pairs."""

    to_full: float
    """Of the projection from the full gradient's."""
    off: float
    """Of the published form from the full gradient's."""
    apart: float
    """Of the published form from the cosine in which a tensor counts as often as numbers are kept of it."""


def direct_gradients(result: OnePassResult, words: str, queries: int) -> DirectGradients:
    """The first queries and their candidates once more: automatic differentiation of the whole model, one by one."""
    products, compared = result.gradients[words], result.inputs.compared
    loaded = load_model(compared.loaded.name) if isinstance(compared.loaded.name, str) else compared.loaded
    model = trainable_copy(loaded)
    names = [component.name for component in compared.components]
    kept: dict[int, Tensor] = {}
    spent = 0.0
    differences = [0.0]
    cosine = products.of(range(queries)).cosine()
    for query in range(queries):
        places = [int(result.inputs.query_place[query]), *(int(row) for row in products.rows[query] if row >= 0)]
        for place in places:
            if place not in kept:
                started = time.perf_counter()
                kept[place] = _gradient(model, names, result, place)
                spent += time.perf_counter() - started
        mine = kept[places[0]]
        for number, place in enumerate(places[1:]):
            whole = float(mine @ kept[place] / (mine.norm() * kept[place].norm()))
            differences.append(abs(whole - float(cosine[query, number])))
    return DirectGradients(len(kept), spent / max(len(kept), 1), max(differences))


def projection_errors(result: OnePassResult, words: str) -> dict[str, ProjectionErrors]:
    """How far every projection is from what it should estimate, and from what the published form estimates."""
    products, listed = result.gradients[words], result.gradients[words].listed
    full = products.cosine()
    found = {}
    for number, one in enumerate(result.inputs.compared.projections):
        weights = np.array(one.plan.sizes, dtype=np.float64)
        weighted = _weighted_cosine(result, words, weights)
        right, published = (form[words].each([number])[0] for form in (result.projected, result.published))
        pairs = ((right, full), (published, full), (published, weighted))
        found[one.plan.name] = ProjectionErrors(*(float(np.abs(a - b)[listed].mean()) for a, b in pairs))
    return found


def _weighted_cosine(
    result: OnePassResult, words: str, weights: Float[np.ndarray, " component"]
) -> Float[np.ndarray, "query candidate"]:
    products = result.gradients[words]
    values, query, example = (
        np.tensordot(weights, part, axes=1) for part in (products.values, products.query, products.example)
    )
    lengths = query[:, None] * example[products.rows]
    return values / np.sqrt(np.maximum(lengths, np.finfo(np.float64).tiny))


def _gradient(model: nn.Module, names: list[str], result: OnePassResult, place: int) -> Tensor:
    batch = make_batch(result.inputs.compared.data, np.array([place]))
    parameters = dict(model.named_parameters())
    loss = summed_loss(model, batch.to(next(model.parameters()).device))
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    return torch.cat([gradient.flatten() for gradient in gradients]).double()
