"""The base of the gradient methods: a vector per query, whose inner products with gradients are the scores."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.methods._protocol import GradientStore, Job, Method, Vectors, watch
from vestige.methods._stores import ExactGradients, open_store
from vestige.runs import ScoreBlock

HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


def keep(vectors: Vectors) -> Vectors:
    """Return the queries' gradients as they are."""
    return vectors


def unit_length(vectors: Vectors) -> Vectors:
    """Return the queries' gradients at length one over all components together."""
    lengths = torch.stack([vector.square().sum(1) for vector in vectors]).sum(0).sqrt()
    return [vector / torch.where(lengths > 0, lengths, 1.0)[:, None] for vector in vectors]


@dataclass(frozen=True)
class Prepared:
    """The query vectors of a job, and the store whose gradients they are multiplied with."""

    job: Job
    store: GradientStore
    vectors: Vectors
    """Score = inner product of these with the example's gradient."""
    transform: Callable[[Vectors], Vectors] = keep
    """From the queries' gradients to `vectors`."""
    cosine: bool = False
    """Whether the product is divided by the length of the example's gradient."""

    def piece_blocks(self, piece: int) -> Iterator[ScoreBlock]:
        """Yield the scores of the training examples in a piece of the store."""
        for rows, scores, norms in self.store.piece_scores(piece, self.vectors, norms=self.cosine):
            yield ScoreBlock(rows, self._weigh(_divide(scores, norms), rows))

    def blocks(self) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples."""
        blocks = chain.from_iterable(map(self.piece_blocks, range(self.store.pieces)))
        return watch(blocks, len(self.job.train), "Scoring")

    def components(self, rows: Sequence[int]) -> Tensor:
        """Compute the scores of a few rows, `[component, query, row]`."""
        products = self.store.products(self.vectors, rows, norms=self.cosine)
        return self._weigh(_divide(products.scores, products.norms), rows)

    def totals(self, rows: Sequence[int]) -> Tensor:
        """Compute the scores of a few rows, `[query, row]`."""
        found = self.store.totals(self.vectors, rows, norms=self.cosine)
        return self._weigh(_divide(found.scores[0], found.norms), rows)

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

    def row_weights(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return the factor of each row's score: its weight, of which a division by its gradient leaves the sign."""
        if self.job.row_weights is None:
            return torch.ones(len(rows), dtype=torch.float64)
        found = torch.from_numpy(self.job.row_weights)[torch.as_tensor(rows)]
        return found.sign() if self.cosine else found

    def _weigh(self, scores: Float[Tensor, "*line row"], rows: Sequence[int] | Tensor) -> Tensor:
        return scores if self.job.row_weights is None else scores * self.row_weights(rows).to(scores)


def prepare_queries(
    job: Job, store: GradientStore, transform: Callable[[Vectors], Vectors] = keep, *, cosine: bool = False
) -> Prepared:
    """Return the queries' gradients, transformed."""
    return Prepared(job, store, transform(store.of_queries(job.queries)), transform, cosine)


@dataclass
class GradientMethod(Method):
    """A method whose score is an inner product with the example's gradient, after a division at most.

    A new one is a class with `meaning` and `vectors`:

        @method("sign-dot")
        @dataclass
        class SignDot(GradientMethod):
            meaning = Meaning(sign=HELPS, unit="...", target="this model", ...)

            def vectors(self, job):
                return prepare_queries(job, open_store(job), lambda vectors: [vector.sign() for vector in vectors])

    Exact and compressed gradients, workers, resume, scores of components and of tokens, and self-influence follow.
    """

    needs_model = True
    needs_gradients = True
    splits_components = True
    splits_tokens = True
    scores_itself = True
    works_in_pieces = True
    weighs_rows = True
    reads_focus = ("instead", "span", "weights")
    _prepared: Prepared | None = field(default=None, repr=False, init=False, compare=False)

    @abstractmethod
    def vectors(self, job: Job) -> Prepared:
        """Return the vectors made from the queries."""

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece of the store to the scores of its training examples for themselves."""
        prepared = self.prepare(job)

        def blocks(piece: int) -> Iterator[ScoreBlock]:
            for rows, gradients in prepared.store.piece_gradients(piece):
                pairs = zip(gradients, prepared.transform(gradients), strict=True)
                scores = torch.stack([(one * other).sum(1) for one, other in pairs]).sum(0)
                norms = (
                    torch.stack([one.square().sum(1) for one, _ in pairs]).sum(0).sqrt() if prepared.cosine else None
                )
                yield ScoreBlock(rows, _divide(scores, norms)[None].cpu())

        return blocks

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the score of every training example for itself, as one query.

        Raises:
            SpecError: They would all be the same.
        """
        self.require_self_scores()
        return chain.from_iterable(map(self.self_blocks(job), range(self.store(job).pieces)))

    def store(self, job: Job) -> GradientStore:
        """Return the store that the training gradients come from, and that defines their lengths."""
        return ExactGradients(job) if self.needs_exact else open_store(job)

    def prepare(self, job: Job) -> Prepared:
        """Return `vectors`, made once for a job."""
        if self._prepared is None or self._prepared.job is not job:
            self._prepared = self.vectors(job)
        return self._prepared

    def measured_losses(self, job: Job) -> list[float] | None:
        """Return the losses of the queries, where making the vectors has measured them in this process."""
        if self._prepared is None or self._prepared.job is not job or self._prepared.store.query_losses is None:
            return None
        return self._prepared.store.query_losses.double().tolist()

    def use(self, prepared: Prepared, note: str) -> Self:
        """Return the method for a job whose vectors are there already, with a note on the normalisation of scores."""
        method = copy(self)
        method._prepared = prepared
        method.meaning = replace(self.meaning, normalisation=f"{self.meaning.normalisation}; {note}")
        return method

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all training examples."""
        return self.prepare(job).blocks()

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> Tensor:
        """Compute the scores of pairs, split over components."""
        distinct, positions = torch.unique(rows, return_inverse=True)
        scores = self.prepare(job).components(distinct.tolist())
        return scores[:, queries, positions].T


def _divide(scores: Tensor, norms: Tensor | None) -> Tensor:
    """Divide scores by norms; an example without targets has no gradient, and scores zero."""
    return scores if norms is None else scores / torch.where(norms > 0, norms, 1.0)
