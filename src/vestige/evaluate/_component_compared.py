"""What the one pass compares: distinct examples, the pairs that are requested, and how the work is divided."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from vestige.data import TokenizedData, plan_batches
from vestige.evaluate._component_projection import Projection
from vestige.gradients import Reduction
from vestige.models import Component, LoadedModel, batch_sharing

VERSION = 2
"""Of what pieces hold, and of how the work is divided."""
PIECE_BYTES = (2**28, 2**30)
"""Most bytes of factors in a piece of queries and in one of candidates, but one batch at least."""
PIECES = (64, 16)
"""Pieces of a job that is large enough, so that little is lost when it is interrupted. Every piece of candidates reads
the queries' gradients, so of these there are fewer."""


@dataclass(frozen=True)
class Compared:
    """What is compared, and with what."""

    loaded: LoadedModel
    components: tuple[Component, ...]
    loss: Reduction
    data: TokenizedData
    """Distinct examples: the queries first, then what is a candidate and no query."""
    wanted: Bool[np.ndarray, "query example"]
    """Which of these pairs are requested."""
    projections: tuple[Projection, ...]
    token_budget: int
    folder: Path

    @property
    def queries(self) -> int:
        """Distinct queries."""
        return len(self.wanted)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that decides a product."""
        dtype = str(next(self.loaded.model.parameters()).dtype).removeprefix("torch.")
        kept = [[one.plan.name, one.projector, one.seed, *one.sizes] for one in self.projections]
        return {
            "version": str(VERSION),
            "model": self.loaded.fingerprint,
            "precision": dtype,
            "components": digest([[part.name, *part.shape] for part in self.components]),
            "loss": self.loss,
            "examples": self.data.fingerprint,
            "pairs": hashlib.sha256(np.packbits(self.wanted).tobytes()).hexdigest(),
            "projections": digest(kept),
            "token_budget": str(self.token_budget),
        }

    @cached_property
    def held(self) -> list[list[np.ndarray]]:
        """Batches of queries, piece by piece."""
        return self._pieces(np.arange(self.queries), PIECE_BYTES[0], PIECES[0])

    @cached_property
    def fresh(self) -> list[list[np.ndarray]]:
        """Batches of candidates that are no queries, piece by piece."""
        return self._pieces(np.arange(self.queries, len(self.data)), PIECE_BYTES[1], PIECES[1])

    @cached_property
    def portions(self) -> list["Portion"]:
        """The sources of the pieces of products: first candidates that are queries too, then all others."""
        both = [Portion(batches, place) for place, batches in enumerate(self.held) if self._asked(batches)]
        return [*both, *(Portion(batches, None) for batches in self.fresh)]

    def factor_bytes(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """Estimate the bytes that the factors of each example take."""
        tokens = self.data.lengths[rows]
        total = np.zeros(len(rows))
        for part in self.components:
            sides = [use_width(part, use.kind, use.role) for use in part.uses]
            total += np.minimum(tokens * float(sum(sides)), float(part.size))
        width = torch.empty((), dtype=next(self.loaded.model.parameters()).dtype).element_size()
        return (total * width).astype(np.int64)

    def _asked(self, batches: Sequence[np.ndarray]) -> bool:
        return bool(self.wanted[:, np.concatenate(batches)].any())

    def _pieces(self, rows: Int[np.ndarray, " row"], most_bytes: int, pieces: int) -> list[list[np.ndarray]]:
        if not len(rows):
            return []
        sizes = np.zeros(len(self.data), dtype=np.int64)
        sizes[rows] = self.factor_bytes(rows)
        most = max(4, -(-len(rows) // pieces))
        groups: list[list[np.ndarray]] = [[]]
        held = count = 0
        for places in plan_batches(
            self.data.lengths[rows], self.token_budget, most, sharing=batch_sharing(self.loaded.model)
        ):
            batch = rows[places]
            size = int(sizes[batch].sum())
            if groups[-1] and (held + size > most_bytes or count + len(batch) > most):
                groups.append([])
                held = count = 0
            groups[-1].append(batch)
            held, count = held + size, count + len(batch)
        return groups


class Portion(NamedTuple):
    """Some candidates."""

    batches: list[np.ndarray]
    held: int | None
    """The piece of queries that they are, or None: their gradients are still to be computed."""

    @property
    def rows(self) -> Int[np.ndarray, " row"]:
        """All of them."""
        return np.concatenate(self.batches)


def use_width(component: Component, kind: str, role: str) -> int:
    """Return the numbers that the factors of one use take for each token."""
    out, width = component.shape
    if kind == "embedding":
        return width + 2
    return 1 if role == "bias" or (out, width) == (component.size, 1) else out + width


def digest(value: object) -> str:
    """Return the sha256 of anything that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
