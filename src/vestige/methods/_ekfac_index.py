"""EK-FAC at the speed of an index: factors are measured once, and the queries meet compressed rows."""

from collections.abc import Callable
from dataclasses import dataclass

from vestige.curvature import ekfac_of
from vestige.errors import SpecError
from vestige.methods import ExactGradients, GradientMethod, IndexedGradients, Job, Prepared, check_memory, method
from vestige.methods._preconditioned import ESTIMATES, FISHER_BLOCKS, LabelsOption, make_meaning, measure_factors


@method("ekfac-index")
@dataclass
class EkfacIndex(GradientMethod):
    """Influence function with EK-FAC, estimated from the compressed gradients of an index.

    `score = <S (C + d I)^-1 grad loss(query), S grad loss(example)>`, C as in `ekfac` and S the compressor of the
    index: the few queries are preconditioned whole, and compressed then. For a random S it is an unbiased estimate of
    the score of `ekfac`, with a variance that falls with the numbers kept.
    """

    needs_index = True
    sweeps_damping = True
    meaning = make_meaning(
        normalisation=f"EK-FAC {FISHER_BLOCKS}",
        estimates=f"{ESTIMATES}, from compressed gradients of the examples.",
        cost="Once for an index three passes over the training data and one more forward to draw labels; then a read "
        "of the index for each set of queries, and memory for their whole gradients.",
        limits="As ekfac, and the noise of the sketch: with fewer than about 1,000 numbers for a component it may "
        "fall behind influence; the damping sets its scale, so compare within a run.",
    )
    labels: LabelsOption = "sampled"

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients, preconditioned and then compressed."""
        return self.at_dampings(job)(job.settings.damping)

    def at_dampings(self, job: Job) -> Callable[[float], Prepared]:
        """Measure the factors, or read what the index keeps; return the map from a damping to the vectors.

        Raises:
            UserError: The whole gradients of the queries do not fit into memory.
        """
        check_memory(job)
        curvature, store, whole = measure_factors(job, self.labels, ekfac_of), self.store(job), ExactGradients(job)
        gradients = whole.of_queries(job.queries)
        store.query_losses = whole.query_losses
        return lambda damping: Prepared(job, store, store.compress(curvature.precondition(gradients, damping)))

    def store(self, job: Job) -> IndexedGradients:
        """Return the index."""
        return IndexedGradients(job)

    def require_self_scores(self) -> None:
        """Refuse: what is stored of an example cannot be preconditioned.

        Raises:
            SpecError: Always.
        """
        raise SpecError(
            f"{self.name} preconditions the queries alone: of the examples their compressed gradients are known. Type "
            "--method ekfac, or --method influence, for self-influence."
        )
