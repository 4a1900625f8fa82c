"""Products of some candidates with all queries, and what all pieces of them make together."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.evaluate._component_pass import Passed, one_example
from vestige.evaluate._component_projection import Projection
from vestige.gradients import FormingBudget, HeldGradients, products

FORMED_BYTES = 2**29
"""Most bytes of matrices formed from the factors of one piece of queries."""
DENSE = 0.25
"""Share of a block's pairs from which all of them are computed at once."""
KINDS = ("values", "outputs", "projected", "published")
"""Gradients by component, outputs by module, projections as they should be and as they were published."""


class Tables:
    """Products of some candidates with all queries, in memory until they are a file."""

    def __init__(
        self,
        wanted: Bool[np.ndarray, "query row"],
        rows: Int[np.ndarray, " row"],
        found: Sequence[Passed],
        projections: Sequence[Projection],
    ) -> None:
        self._wanted, self._rows = wanted, rows
        one = found[0]
        kinds = dict(zip(KINDS, map(len, (one.gradients, one.outputs, one.projected, one.projected)), strict=True))
        self._widths = torch.tensor([output.shape[1] for output in one.outputs])
        wide = one.norms.dtype
        shape = self._wanted.shape
        self._products = {
            name: torch.zeros(count, *shape, dtype=wide if name == "values" else torch.float64)
            for name, count in kinds.items()
        }
        self._weights = [one.published_weights() for one in projections]
        self._norms = _joined_norms([self._squares(passed) for passed in found])
        self._query_norms = {
            name: torch.zeros(norms.shape[0], len(wanted), dtype=norms.dtype) for name, norms in self._norms.items()
        }
        self.seconds: dict[str, float] = {"products": 0.0}

    def add(
        self, rows: Int[np.ndarray, " row"], queries: Passed, batches: Sequence[np.ndarray], found: Sequence[Passed]
    ) -> None:
        """Add the products of a batch of queries with all candidates."""
        started = time.perf_counter()
        for name, norms in self._squares(queries).items():
            self._query_norms[name][:, torch.as_tensor(rows)] = norms
        budget = FormingBudget(FORMED_BYTES)
        held = [HeldGradients(one, budget, len(found)) for one in queries.gradients]
        start = 0
        for batch, passed in zip(batches, found, strict=True):
            columns = slice(start, start + len(batch))
            start += len(batch)
            asked = self._wanted[rows, columns]
            if not asked.any():
                continue
            self._small(rows, columns, queries, passed)
            values = self._products["values"]
            if asked.mean() >= DENSE:
                dense = torch.stack(
                    [one.products(mine).T.cpu() for one, mine in zip(held, passed.gradients, strict=True)]
                )
                values[:, torch.as_tensor(rows), columns] = dense.to(values.dtype)
                continue
            for query, candidate in np.argwhere(asked):
                pairs = zip(queries.gradients, passed.gradients, strict=True)
                single = [products(one_example(a, int(query)), one_example(b, int(candidate))).cpu() for a, b in pairs]
                values[:, rows[query], columns.start + candidate] = torch.stack(single)[:, 0, 0].to(values.dtype)
        self.seconds["products"] += time.perf_counter() - started

    def _small(self, rows: Int[np.ndarray, " row"], columns: slice, queries: Passed, found: Passed) -> None:
        """Compute products of outputs and of projections, all pairs of the block at once."""
        place = torch.as_tensor(rows)
        for number, (one, other) in enumerate(zip(queries.outputs, found.outputs, strict=True)):
            self._products["outputs"][number][place, columns] = one.double() @ other.double().T
        for number, (one, other) in enumerate(zip(queries.projected, found.projected, strict=True)):
            first, second = one.double(), other.double()
            self._products["projected"][number][place, columns] = first @ second.T
            weighted = first * self._weights[number].square()
            self._products["published"][number][place, columns] = weighted @ second.T

    def _squares(self, passed: Passed) -> dict[str, Tensor]:
        """Return squared norms of everything, [representation, example]."""
        examples = passed.norms.shape[1]
        empty = torch.zeros(0, examples, dtype=torch.float64)
        outputs = [one.double().square().sum(1) for one in passed.outputs]
        projected = [one.double().square() for one in passed.projected]
        weighted = [(one * weight.square()).sum(1) for one, weight in zip(projected, self._weights, strict=True)]
        return {
            "values": passed.norms,
            "outputs": torch.stack(outputs) if outputs else empty,
            "projected": torch.stack([one.sum(1) for one in projected]) if projected else empty,
            "published": torch.stack(weighted) if weighted else empty,
        }

    def tensors(self, *, with_queries: bool) -> dict[str, Tensor]:
        """Return the tensors to write: products of the wanted pairs, ordered by query and candidate, and norms."""
        query, column = np.nonzero(self._wanted)
        pairs = np.stack([query, self._rows[column]], axis=1)
        tensors = {"pairs": torch.as_tensor(pairs), "rows": torch.as_tensor(self._rows), "widths": self._widths}
        for name, table in self._products.items():
            tensors[name] = table[:, torch.as_tensor(query), torch.as_tensor(column)]
            tensors[f"{name}.example"] = self._norms[name]
            if with_queries:
                tensors[f"{name}.query"] = self._query_norms[name]
        return tensors


def _joined_norms(several: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in several], dim=1) for name in several[0]}


class Table(NamedTuple):
    """Products of one kind, over pairs and norms of distinct examples."""

    values: Float[np.ndarray, "part pair"]
    query: Float[np.ndarray, "part query"]
    example: Float[np.ndarray, "part example"]
    widths: Int[np.ndarray, " part"]
    """Of outputs; empty for others."""


def tables_of(
    wanted: Bool[np.ndarray, "query example"], pieces: Sequence[Mapping[str, Tensor]]
) -> tuple[np.ndarray, dict[str, Table]]:
    """Return the number of every wanted pair `[query, example]` (-1 elsewhere), and every kind's table over pairs."""
    pairs = np.concatenate([one["pairs"].numpy() for one in pieces])
    number = np.full(wanted.shape, -1, dtype=np.int64)
    number[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    rows = np.concatenate([one["rows"].numpy() for one in pieces])
    found = {}
    for name in KINDS:
        norms = np.concatenate([one[f"{name}.example"].numpy() for one in pieces], axis=1)
        example = np.zeros((len(norms), wanted.shape[1]), dtype=norms.dtype)
        example[:, rows] = norms
        values = np.concatenate([one[name].numpy() for one in pieces], axis=1)
        widths = pieces[0]["widths"].numpy() if name == "outputs" else np.zeros(0, dtype=np.int64)
        found[name] = Table(values, pieces[0][f"{name}.query"].numpy(), example, widths)
    return number, found
