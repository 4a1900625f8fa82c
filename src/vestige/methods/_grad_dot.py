"""Inner products and cosines of gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vestige.methods import HELPS, GradientMethod, Job, Prepared, method, open_store, prepare_queries, unit_length
from vestige.runs import Meaning, ScoreBlock


@method("grad-dot")
@dataclass
class GradDot(GradientMethod):
    """Inner product of gradients: the first-order change of the query's loss by a plain gradient step (TracIn's term).

    `score = <grad loss(query), grad loss(example)>` (Pruthi et al. 2020, arXiv:2002.08484, one checkpoint).
    """

    works_sharded = True
    against_hubs = "--method grad-cos"
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss per unit of learning rate",
        target="this model",
        normalisation="none",
        estimates="How much one plain gradient step on the example would lower the query's loss.",
        cost="One forward and backward pass over the training data, or one read of the index.",
        limits="Long or surprising examples have large gradients and lead many lists; no curvature.",
    )

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients."""
        return prepare_queries(job, open_store(job))

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece to `|gradient|^2` of its training examples."""
        store = self.store(job)
        return lambda piece: (ScoreBlock(rows, squared[None]) for rows, squared in store.piece_squared_norms(piece))


@method("grad-cos")
@dataclass
class GradCos(GradientMethod):
    """Cosine of gradients: the inner product without the lengths, so that long examples do not lead every list."""

    works_sharded = True
    constant_self_score = "the cosine of a gradient with itself: 1 for every example"
    baseline = 3
    meaning = Meaning(
        sign=HELPS,
        unit="cosine, from -1 to 1",
        target="this model",
        normalisation="length of both gradients",
        estimates="How well a gradient step on the example points along the one that the query asks for.",
        cost="One forward and backward pass over the training data, or one read of the index.",
        limits="Says nothing about how far the step goes: a faint example can score as high as a forceful one.",
    )

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients at length one, over all components together."""
        return prepare_queries(job, open_store(job), unit_length, cosine=True)
