"""TracIn: inner products of gradients, added up along training."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vestige.methods._checkpoints import Checkpoint
from vestige.methods._ensemble import CheckpointMethod, Lines, open_checkpoint_store, prepared_parts
from vestige.methods._prepared import HELPS, Prepared, prepare, unchanged
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.runs import Meaning


@method("tracin")
@dataclass
class TracIn(CheckpointMethod):
    """Inner products of gradients at checkpoints, each times its learning rate (Pruthi et al. 2020, arXiv:2002.08484).

    `score = sum_c lr_c <grad loss(query; w_c), grad loss(example; w_c)>`. The loss of an example is normalised inside
    that example, so neither batches nor a ragged last one change a score.
    """

    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss, for one plain gradient step with each checkpoint's learning rate",
        target="this run: its path through the checkpoints",
        normalisation="none",
        estimates="How much the steps on the example lowered the query's loss during training, had each been a plain "
        "gradient step, one at each checkpoint.",
        cost="One forward and backward pass over the training data for each checkpoint, or one read of its index; "
        "4 bytes on disk per checkpoint, query and example until the run is written.",
        limits="Adam and momentum do not step along the gradient; few checkpoints stand for many steps; long or "
        "surprising examples have large gradients and lead many lists.",
    )

    def term(self, job: Job, checkpoint: Checkpoint) -> "GradientTerm":  # noqa: ARG002
        """Return the inner products at this checkpoint."""
        assert job.loaded is not None
        store = open_checkpoint_store(job, job.loaded.fingerprint[:16])
        return GradientTerm(prepare(job, store, unchanged))


@dataclass(frozen=True)
class GradientTerm:
    """Inner products with the queries' gradients."""

    prepared: Prepared

    def scores(self) -> Lines:
        """Yield the scores from one pass over the training data, or one read of the index."""
        for block in self.prepared.blocks():
            yield block.rows, block.scores

    def self_scores(self) -> Lines:
        """Yield squared norms."""
        for rows, squared in self.prepared.store.squared_norms():
            yield rows, squared[None]

    def parts(self, rows: list[int]) -> Float[Tensor, "component query row"]:
        """Compute inner products component by component."""
        return prepared_parts(self.prepared, rows)
