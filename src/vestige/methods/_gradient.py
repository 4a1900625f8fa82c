"""The gradient methods: inner products of a training example's gradient with a vector made from the query's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.curvature import FisherBlocks, fisher_of
from vestige.errors import SpecError
from vestige.methods._protocol import ComponentBlock, Job
from vestige.methods._registry import method
from vestige.methods._stores import ExactGradients, GradientStore, IndexedGradients, Vectors
from vestige.models import Component
from vestige.runs import Meaning, ScoreBlock

HELPS = "positive: a training step on the example lowers the query's loss; negative: it raises it"


@dataclass
class Prepared:
    """What a method has made of the queries, kept between its calls for one job."""

    job: Job
    store: GradientStore
    vectors: Vectors
    """Score = inner product of these with the example's gradient."""
    cosine: bool = False
    """Whether that is divided by the length of the example's gradient."""

    def blocks(self) -> Iterator[ScoreBlock]:
        """Scores of all training examples."""
        for rows, scores, norms in self.store.scores(self.vectors, norms=self.cosine):
            yield ScoreBlock(rows, _divided(scores, norms))

    def components(self, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Scores of pairs, split over components."""
        distinct, place = torch.unique(rows, return_inverse=True)
        products = self.store.products(self.vectors, distinct.tolist(), norms=self.cosine)
        scores = _divided(products.scores, products.norms)
        return ComponentBlock([part.name for part in self.job.components], scores[:, queries, place].T)

    def direction(self, query: int) -> list[Tensor]:
        """The matrices whose inner product with an example's gradient is the score, before any division."""
        return self.store.direction(self.vectors, query)

    def row_norms(self, rows: Sequence[int]) -> Tensor:
        """What the score of each row was divided by: ones, or the length of its gradient."""
        if not self.cosine:
            return torch.ones(len(rows))
        norms = self.store.products(self.vectors, rows, norms=True).norms
        assert norms is not None
        return norms


def _divided(scores: Tensor, norms: Tensor | None) -> Tensor:
    """Scores over norms; an example without targets has no gradient, and scores zero."""
    return scores if norms is None else scores / torch.where(norms > 0, norms, 1.0)


def open_store(job: Job) -> GradientStore:
    """The job's index, or the model itself when there is none."""
    return IndexedGradients(job, job.index) if job.index is not None else ExactGradients(job)


@method("grad-dot")
@dataclass
class GradDot:
    """Inner product of gradients: the first-order change of the query's loss by a plain gradient step (TracIn's term).

    `score = <grad loss(query), grad loss(example)>` (Pruthi et al. 2020, arXiv:2002.08484, one checkpoint).
    """

    name = "grad-dot"
    needs_model = True
    needs_gradients = True
    needs_index = False
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss per unit of learning rate",
        target="this model",
        normalisation="none",
        estimates="How much one plain gradient step on the example would lower the query's loss.",
        cost="One forward and backward pass over the training data, or one read of the index.",
        limits="Long or surprising examples have large gradients and lead many lists; no curvature.",
    )
    _prepared: Prepared | None = field(default=None, repr=False)

    def prepare(self, job: Job) -> Prepared:
        """The queries' gradients."""
        if self._prepared is None or self._prepared.job is not job:
            store = open_store(job)
            self._prepared = Prepared(job, store, store.of_queries(job.queries))
        return self._prepared

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Scores of all training examples."""
        return self.prepare(job).blocks()

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Scores of pairs, split over components."""
        return self.prepare(job).components(queries, rows)

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """`|gradient|^2` of every training example."""
        for rows, squared in self.prepare(job).store.squared_norms():
            yield ScoreBlock(rows, squared[None])


@method("grad-cos")
@dataclass
class GradCos:
    """Cosine of gradients: the inner product without the lengths, so that long examples do not lead every list."""

    name = "grad-cos"
    needs_model = True
    needs_gradients = True
    needs_index = False
    meaning = Meaning(
        sign=HELPS,
        unit="cosine, from -1 to 1",
        target="this model",
        normalisation="length of both gradients",
        estimates="How well a gradient step on the example points along the one that the query asks for.",
        cost="One forward and backward pass over the training data, or one read of the index.",
        limits="Says nothing about how far the step goes: a faint example can score as high as a forceful one.",
    )
    _prepared: Prepared | None = field(default=None, repr=False)

    def prepare(self, job: Job) -> Prepared:
        """The queries' gradients at length one, over all components together."""
        if self._prepared is None or self._prepared.job is not job:
            store = open_store(job)
            vectors = store.of_queries(job.queries)
            lengths = torch.stack([vector.square().sum(1) for vector in vectors]).sum(0).sqrt().clamp(min=1e-30)
            self._prepared = Prepared(job, store, [vector / lengths[:, None] for vector in vectors], cosine=True)
        return self._prepared

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Cosines of all training examples."""
        return self.prepare(job).blocks()

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Scores of pairs, split over components."""
        return self.prepare(job).components(queries, rows)

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:  # noqa: ARG002
        """Refused: a gradient's cosine with itself is 1.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            "Self-influence with grad-cos is 1 for every example: a gradient's cosine with itself. It would rank "
            "nothing. Type --method influence or --method grad-dot."
        )


@method("influence")
@dataclass
class Influence:
    """Influence function with a block-diagonal empirical Fisher matrix in the compressed space.

    `score = <(F_c + d_c I)^-1 S grad loss(query), S grad loss(example)>` summed over components c, with S the
    compressor and `F_c` the mean of `S g g^T S^T` over the training data (Koh and Liang 2017, arXiv:1703.04730;
    the compressed form of LoGra, Choe et al. 2024, arXiv:2405.13954, and GraSS, Hu et al. 2025, arXiv:2505.18976).
    """

    name = "influence"
    needs_model = True
    needs_gradients = True
    needs_index = True
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss, times the number of training examples, up to the damping's scale",
        target="this model",
        normalisation="Fisher matrix of each component",
        estimates="How much the query's loss would rise if the example were left out of training (times N), to first "
        "order around these weights.",
        cost="One read of the index for the curvature, once, and one per set of queries.",
        limits="First order around one set of weights; block-diagonal; the damping sets its scale, so compare scores "
        "within a run, not across runs.",
    )
    _prepared: Prepared | None = field(default=None, repr=False)
    _fisher: FisherBlocks | None = field(default=None, repr=False)

    def prepare(self, job: Job) -> Prepared:
        """The queries' compressed gradients, preconditioned."""
        if self._prepared is None or self._prepared.job is not job:
            store = _indexed(job)
            gradients = torch.cat(store.of_queries(job.queries), dim=1)
            self._fisher = fisher_of(store.index)
            solved = self._fisher.precondition(gradients, job.settings.damping)
            self._prepared = Prepared(job, store, store.split(solved))
        return self._prepared

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Scores of all training examples."""
        return self.prepare(job).blocks()

    def components(self, job: Job, queries: Int[Tensor, "pair"], rows: Int[Tensor, "pair"]) -> ComponentBlock:
        """Scores of pairs, split over components."""
        return self.prepare(job).components(queries, rows)

    def self_scores(self, job: Job) -> Iterator[ScoreBlock]:
        """`g^T (F + d I)^-1 g` of every training example."""
        self.prepare(job)
        store = _indexed(job)
        assert self._fisher is not None
        whiteners = self._fisher.whitener(job.settings.damping)
        for block in store.index.blocks():
            parts = zip(whiteners, store.columns, strict=True)
            squared = [(block.gradients[:, part] @ white.T).square().sum(1) for white, part in parts]
            yield ScoreBlock(block.example, torch.stack(squared).sum(0)[None])


def _indexed(job: Job) -> IndexedGradients:
    assert job.index is not None, "the orchestration makes an index for methods that need one"
    return IndexedGradients(job, job.index)


def components_by_name(components: Sequence[Component], names: Sequence[str]) -> list[Component]:
    """The components called `names`, in that order."""
    known = {component.name: component for component in components}
    return [known[name] for name in names]
