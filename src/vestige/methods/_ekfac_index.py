"""EK-FAC at the speed of an index: factors are measured once, and the queries meet compressed rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import PositiveFloat

from vestige.curvature import FisherBlocks, ekfac_of, fisher_of
from vestige.errors import SpecError
from vestige.methods import (
    ExactGradients,
    GradientMethod,
    IndexedGradients,
    Job,
    Prepared,
    check_memory,
    curvature_work,
    method,
)
from vestige.methods._preconditioned import ESTIMATES, FISHER_BLOCKS, LabelsOption, fit_where, make_meaning


@method("ekfac-index")
@dataclass
class EkfacIndex(GradientMethod):
    """Influence function with EK-FAC, estimated from the compressed gradients of an index.

    The score of `ekfac` is `<x, g>` with `x = (C + d I)^-1 grad loss(query)` and g the example's gradient, of which the
    index holds `S g`. Of all vectors, `v = (F + e I)^-1 S (C + e I) x` has the inner product with `S g` that comes
    closest to `<x, g>` in mean square, where C is the covariance of gradients and F that of the compressed ones, with a
    ridge e that pulls v towards `S x`: the sketch's noise is predicted from what else is stored. With e = d it is
    `influence`, with e infinite the plain sketch `<S x, S g>`.
    """

    needs_index = True
    sweeps_damping = True
    meaning = make_meaning(
        normalisation=f"EK-FAC {FISHER_BLOCKS}",
        estimates=f"{ESTIMATES}, from compressed gradients of the examples.",
        cost="Once for an index three passes over the training data and one more forward to draw labels; then a read "
        "of the index for each set of queries, and memory for their whole gradients.",
        limits="As ekfac, and what the index has lost: the more numbers for a component, the closer it comes to ekfac; "
        "the damping sets its scale, so compare within a run.",
    )
    labels: LabelsOption = "sampled"
    ridge: Annotated[
        PositiveFloat | None,
        "e, relative to the mean eigenvalue of the compressed gradients' Fisher matrix; none: the plain sketch.",
    ] = None

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients, preconditioned and then compressed."""
        return self.at_dampings(job)(job.settings.damping)

    def at_dampings(self, job: Job) -> Callable[[float], Prepared]:
        """Measure the factors, or read what the index keeps; return the map from a damping to the vectors.

        Raises:
            UserError: The whole gradients of the queries do not fit into memory.
        """
        check_memory(job)
        curvature, store, whole = (
            ekfac_of(*fit_where(job, self.name, self.labels)),
            self.store(job),
            ExactGradients(job),
        )
        fisher = None
        if self.ridge is not None:
            fisher = _scale_to(curvature.traces(), fisher_of(store.index, *curvature_work(job)))
        gradients = whole.of_queries(job.queries)
        store.query_losses = whole.query_losses

        def at(damping: float) -> Prepared:
            solved = curvature.precondition(gradients, damping)
            if fisher is None or self.ridge is None:
                return Prepared(job, store, store.compress(solved))
            ridges = [self.ridge * block.mean_eigenvalue for block in fisher.blocks]
            if len(ridges) == 1:
                ridges *= len(solved)
            parts = zip(gradients, solved, ridges, curvature.absolute_dampings(damping), strict=True)
            # (C + e I) x, since (C + d I) x is the gradient.
            bent = store.compress([gradient + (ridge - added) * one for gradient, one, ridge, added in parts])
            return Prepared(job, store, store.split(fisher.precondition(torch.cat(bent, dim=1), self.ridge)))

        return at

    def store(self, job: Job) -> IndexedGradients:
        """Return the index."""
        assert job.index is not None, "an index was made for a method that needs one"
        return IndexedGradients(job, job.index)

    @classmethod
    def require_self_scores(cls) -> None:
        """Refuse: what is stored of an example cannot be preconditioned.

        Raises:
            SpecError: Always.
        """
        raise SpecError(
            f"{cls.name} preconditions the queries alone: of the examples their compressed gradients are known. Type "
            "--method ekfac, or --method influence, for self-influence."
        )


def _scale_to(traces: list[float], fisher: FisherBlocks) -> FisherBlocks:
    """Return the Fisher matrices of compressed gradients, of the labels in the data, in the units of EK-FAC's.

    A sketch keeps squared lengths on average, so the trace of each would be that of EK-FAC's with the same labels.
    """
    wanted = [sum(traces)] if len(fisher.blocks) == 1 else traces
    blocks = []
    for block, trace in zip(fisher.blocks, wanted, strict=True):
        own = float(block.matrix.diagonal().double().sum())
        blocks.append(block._replace(matrix=block.matrix * (trace / own if own > 0 else 1.0)))
    return FisherBlocks(tuple(blocks), fisher.columns)
