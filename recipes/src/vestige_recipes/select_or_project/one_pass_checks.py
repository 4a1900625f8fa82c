"""Products from one pass beside gradients that are computed once more, one at a time, and beside projections."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.data import TokenizedData, make_batch
from vestige.evaluate import OnePassResult
from vestige.models import Component, LoadedModel, summed_loss, trainable_copy


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


class OneByOne:
    """Gradients by automatic differentiation, one example at a time, nothing kept."""

    def __init__(self, loaded: LoadedModel, components: Sequence[Component], data: TokenizedData) -> None:
        self._model = trainable_copy(loaded)
        named = dict(self._model.named_parameters())
        self._parameters = [named[component.name] for component in components]
        self._data = data
        self.passes = 0
        """Counted."""

    def parts(self, place: int) -> list[Tensor]:
        """The gradient of one example, tensor by tensor."""
        self.passes += 1
        batch = make_batch(self._data, np.array([place]))
        loss = summed_loss(self._model, batch.to(self._parameters[0].device))
        return list(torch.autograd.grad(loss, self._parameters))

    def whole(self, place: int) -> Tensor:
        """The same in one vector of float64."""
        return torch.cat([part.flatten() for part in self.parts(place)]).double()


def direct_gradients(result: OnePassResult, words: str, queries: int) -> DirectGradients:
    """The first queries and their candidates once more: automatic differentiation of the whole model, one by one."""
    products, compared = result.gradients[words], result.inputs.compared
    gradients = OneByOne(compared.loaded, compared.components, compared.data)
    kept: dict[int, Tensor] = {}
    differences = [0.0]
    cosine = products.of(range(queries)).cosine()
    started = time.perf_counter()
    for query in range(queries):
        places = [int(result.inputs.query_place[query]), *(int(row) for row in products.rows[query] if row >= 0)]
        kept |= {place: gradients.whole(place) for place in places if place not in kept}
    spent = time.perf_counter() - started
    for query in range(queries):
        mine = kept[int(result.inputs.query_place[query])]
        for number, place in enumerate(row for row in products.rows[query].tolist() if row >= 0):
            whole = float(mine @ kept[place] / (mine.norm() * kept[place].norm()))
            differences.append(abs(whole - float(cosine[query, number])))
    return DirectGradients(gradients.passes, spent / max(gradients.passes, 1), max(differences))


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
