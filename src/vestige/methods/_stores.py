"""Where the gradients of the training data come from: an index on disk, or the model itself, exact.

Both answer the same questions, so that a method does not know which one it works on. Vectors are kept as one matrix
`[query, n]` per component: n compressed numbers for an index, all `out * in` entries without one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.progress import progress

Vectors = list[Float[Tensor, "query n"]]


class Products(NamedTuple):
    """Inner products of some rows with the query vectors."""

    rows: Int[Tensor, "row"]
    scores: Float[Tensor, "component query row"]
    norms: Float[Tensor, "row"] | None
    """Length of each row's gradient, where it was requested."""


class GradientStore(Protocol):
    """Per-example gradients of the training data."""

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Return gradients of the queries."""
        ...

    device: torch.device
    """Where the vectors are multiplied with the gradients."""

    @property
    def identity(self) -> str:
        """Says which gradients these are: of the same identity they are the same numbers."""
        ...

    @property
    def pieces(self) -> int:
        """Pieces of work that the training examples fall into; follows from the data alone."""
        ...

    def piece_rows(self, piece: int) -> int:
        """Return the number of training examples in a piece."""
        ...

    def piece_scores(
        self, piece: int, vectors: Vectors, *, norms: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (rows, summed scores [query, row], norms [row]) of the training examples of a piece, each once."""
        ...

    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, squared gradient norms [row]) of the training examples of a piece."""
        ...

    def scores(self, vectors: Vectors, *, norms: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield `piece_scores` of all training examples."""
        ...

    def squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `piece_squared_norms` of all training examples."""
        ...

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute the scores of a few rows, split over components."""
        ...

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """Return the matrices whose inner product with an example's gradient is that query's score."""
        ...


class InPieces(ABC):
    """What follows from the pieces: the whole, with progress shown."""

    @property
    @abstractmethod
    def pieces(self) -> int: ...

    @abstractmethod
    def piece_rows(self, piece: int) -> int: ...

    @abstractmethod
    def piece_scores(
        self, piece: int, vectors: Vectors, *, norms: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]: ...

    @abstractmethod
    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def scores(self, vectors: Vectors, *, norms: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (rows, summed scores [query, row], norms [row]) of all training examples, each once."""
        with progress(sum(map(self.piece_rows, range(self.pieces))), "Scoring") as bar:
            for piece in range(self.pieces):
                for block in self.piece_scores(piece, vectors, norms=norms):
                    yield block
                    bar.advance(len(block[0]))

    def squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, squared gradient norms [row]) of all training examples."""
        with progress(sum(map(self.piece_rows, range(self.pieces))), "Self-influence") as bar:
            for piece in range(self.pieces):
                for block in self.piece_squared_norms(piece):
                    yield block
                    bar.advance(len(block[0]))
