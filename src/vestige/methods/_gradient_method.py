"""What the gradient methods share: a vector per query, whose inner products with gradients are the scores."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.methods._protocol import ComponentBlock, Job, Method
from vestige.methods._stores import ExactGradients, GradientStore, IndexedGradients, Vectors
from vestige.runs import ScoreBlock

Made = TypeVar("Made")

HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


@dataclass
class Prepared:
    """What a method has made of the queries, kept between its calls for one job."""

    job: Job
    store: GradientStore
    vectors: Vectors
    """Score = inner product of these with the example's gradient."""
    transform: Callable[[Vectors], Vectors]
    """From the queries' gradients to `vectors`."""
    cosine: bool = False
    """Whether the product is divided by the length of the example's gradient."""

    def blocks(self) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples."""
        for rows, scores, norms in self.store.scores(self.vectors, norms=self.cosine):
            yield ScoreBlock(rows, _divided(scores, norms))

    def components(self, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Compute the scores of pairs, split over components."""
        distinct, place = torch.unique(rows, return_inverse=True)
        products = self.store.products(self.vectors, distinct.tolist(), norms=self.cosine)
        scores = _divided(products.scores, products.norms)
        return ComponentBlock([part.name for part in self.job.components], scores[:, queries, place].T)

    def direction(self, query: int) -> list[Tensor]:
        """Return the matrices whose inner product with an example's gradient is the score, before any division."""
        return self.store.direction(self.vectors, query)

    def row_norms(self, rows: Sequence[int]) -> Tensor:
        """Return the divisor of each row's score: 1, or the length of its gradient."""
        if not self.cosine:
            return torch.ones(len(rows))
        norms = self.store.products(self.vectors, rows, norms=True).norms
        assert norms is not None
        return norms


@dataclass
class GradientMethod(Method):
    """A method whose score is an inner product with the example's gradient, after a division at most."""

    needs_model = True
    needs_gradients = True
    splits_components = True
    splits_tokens = True
    scores_itself = True
    _prepared: Prepared | None = field(default=None, repr=False, init=False)
    shared: dict[str, Any] | None = field(default=None, repr=False, init=False)
    """What the members of a sweep over dampings have in common, by name; None outside of one."""

    @abstractmethod
    def vectors(self, job: Job) -> Prepared:
        """Return the vectors made from the queries."""

    @abstractmethod
    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece of the store to the scores of its training examples for themselves."""

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the score of every training example for itself, as one query."""
        return chain.from_iterable(map(self.self_blocks(job), range(self.prepare(job).store.pieces)))

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Return `make()`, called once for all members of a sweep."""
        if self.shared is None:
            return make()
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def store(self, job: Job) -> GradientStore:
        """Return the store that the training gradients come from, and that defines their lengths."""
        return ExactGradients(job) if self.needs_exact else open_store(job)

    def prepare(self, job: Job) -> Prepared:
        """Return `vectors`, made once for a job."""
        if self._prepared is None or self._prepared.job is not job:
            self._prepared = self.vectors(job)
        return self._prepared

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples."""
        return self.prepare(job).blocks()

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Compute the scores of pairs, split over components."""
        return self.prepare(job).components(queries, rows)


def _divided(scores: Tensor, norms: Tensor | None) -> Tensor:
    """Divide scores by norms; an example without targets has no gradient, and scores zero."""
    return scores if norms is None else scores / torch.where(norms > 0, norms, 1.0)


def piece_blocks(store: GradientStore, vectors: Vectors, cosine: bool, piece: int) -> Iterator[ScoreBlock]:
    """Yield the scores of the training examples in a piece of the store."""
    for rows, scores, norms in store.piece_scores(piece, vectors, norms=cosine):
        yield ScoreBlock(rows, _divided(scores, norms))


def open_store(job: Job) -> GradientStore:
    """Open the job's index, or the model itself when there is none."""
    return IndexedGradients(job, job.index) if job.index is not None else ExactGradients(job)


def prepare(
    job: Job, store: GradientStore, transform: Callable[[Vectors], Vectors], *, cosine: bool = False
) -> Prepared:
    """Return the queries' gradients, transformed."""
    return Prepared(job, store, transform(store.of_queries(job.queries)), transform, cosine)


def unchanged(vectors: Vectors) -> Vectors:
    """Return the queries' gradients as they are."""
    return vectors


def unit_length(vectors: Vectors) -> Vectors:
    """Return the queries' gradients at length one over all components together."""
    lengths = torch.stack([vector.square().sum(1) for vector in vectors]).sum(0).sqrt()
    return [vector / torch.where(lengths > 0, lengths, 1.0)[:, None] for vector in vectors]
