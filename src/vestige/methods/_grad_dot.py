"""Inner products of gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vestige.methods._prepared import HELPS, GradientMethod, Prepared, open_store, prepare, unchanged
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.runs import Meaning, ScoreBlock


@method("grad-dot")
@dataclass
class GradDot(GradientMethod):
    """Inner product of gradients: the first-order change of the query's loss by a plain gradient step (TracIn's term).

    `score = <grad loss(query), grad loss(example)>` (Pruthi et al. 2020, arXiv:2002.08484, one checkpoint).
    """

    works_sharded = True
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
        return prepare(job, open_store(job), unchanged)

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece to `|gradient|^2` of its training examples."""
        store = self.prepare(job).store
        return lambda piece: (ScoreBlock(rows, squared[None]) for rows, squared in store.piece_squared_norms(piece))
