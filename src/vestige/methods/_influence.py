"""Influence functions on compressed gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch

from vestige.curvature import FisherBlocks, fisher_of
from vestige.errors import SpecError
from vestige.jobs import worker_command
from vestige.methods import HELPS, GradientMethod, IndexedGradients, Job, Prepared, Vectors, method
from vestige.runs import Meaning, ScoreBlock
from vestige.timing import time_phase

Relative = Literal["none", "theta", "loss", "cosine"]

_ONE = "; one matrix for all"
_BY = "Fisher matrix of each component; divided by "
_MEANT: dict[Relative, dict[str, str]] = {
    "none": {},
    "theta": {
        "unit": "nats of query loss per unit of length that leaving the example out moves the compressed weights",
        "normalisation": f"{_BY}|(F + d I)^-1 g| of the example",
    },
    "loss": {
        "unit": "nats of query loss per square root of the example's self-influence",
        "normalisation": f"{_BY}the square root of the example's self-influence",
    },
    "cosine": {
        "unit": "cosine in the metric of (F + d I)^-1, from -1 to 1",
        "normalisation": f"{_BY}the square roots of the example's and the query's self-influence",
    },
}
"""What relative scores mean instead."""


@method("influence")
@dataclass
class Influence(GradientMethod):
    """Influence function with a block-diagonal empirical Fisher matrix in the compressed space.

    `score = <(F_c + d_c I)^-1 S grad loss(query), S grad loss(example)>` summed over components c, with S the
    compressor and `F_c` the mean of `S g g^T S^T` over the training data (Koh and Liang 2017, arXiv:1703.04730;
    the compressed form of LoGra, Choe et al. 2024, arXiv:2405.13954, of LogIX, where the damping is 0.1, and of GraSS,
    Hu et al. 2025, arXiv:2505.18976). Relative influence divides by the example's own effect (RelatIF, Barshan et
    al. 2020, arXiv:2003.11630).
    """

    needs_index = True
    sweeps_damping = True
    works_sharded = True
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
    relative: Annotated[
        Relative,
        "Divide by how far leaving the example out moves the weights (theta) or its own loss (loss), or make it a "
        "cosine: the few examples with large gradients then lead fewer lists.",
    ] = "none"
    fisher: Annotated[
        Literal["component", "model"], "One matrix for each component, or a single one over all columns of the index."
    ] = "component"
    damping_unit: Annotated[
        Literal["mean-eigenvalue", "one"], "What --damping counts: mean eigenvalues of each matrix, or plain numbers."
    ] = "mean-eigenvalue"

    def __post_init__(self) -> None:
        """Set what the scores mean, which depends on the options."""
        self.meaning = replace(type(self).meaning, **_MEANT[self.relative])
        self.against_hubs = "--option relative=loss" if self.relative == "none" else ""
        if self.fisher == "model":
            self._describe_one_matrix()

    def _describe_one_matrix(self) -> None:
        text = self.meaning.normalisation.removesuffix(_ONE)
        self.meaning = replace(self.meaning, normalisation=text + _ONE)

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' compressed gradients, preconditioned."""
        return self.at_dampings(job)(job.settings.damping)

    def at_dampings(self, job: Job) -> Callable[[float], Prepared]:
        """Measure the Fisher matrices once; return the map from a damping to the vectors."""
        fisher, plain = self._curvature(job), IndexedGradients(job)
        gradients = plain.of_queries(job.queries)
        if plain.index.manifest.compression.scope == "model":
            # Components that were added up have no matrices of their own.
            self._describe_one_matrix()

        def precondition(vectors: Vectors, damping: float) -> Vectors:
            whole = torch.cat(vectors, dim=1)
            solved = fisher.precondition(whole, damping)
            if self.relative == "cosine":
                lengths = (whole * solved).sum(1).clamp(min=0).sqrt()
                solved /= torch.where(lengths > 0, lengths, 1.0)[:, None]
            return plain.split(solved)

        def at(damping: float) -> Prepared:
            transform, store = partial(precondition, damping=damping), self._store(job, fisher, damping)
            store.query_losses = plain.query_losses
            return Prepared(job, store, transform(gradients), transform, self.relative != "none")

        return at

    def store(self, job: Job) -> IndexedGradients:
        """Return the index; with relative scores, the curvature defines the length of gradients."""
        if self.relative == "none":
            return IndexedGradients(job)
        return self._store(job, self._curvature(job), job.settings.damping)

    def require_self_scores(self) -> None:
        """Refuse cosines, which are all 1.

        Raises:
            SpecError: They were requested.
        """
        if self.relative == "cosine":
            raise SpecError("Self-influence as a cosine is 1 for every example. Drop --option relative=cosine.")

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece to `g^T (F + d I)^-1 g` of its training examples, divided as their scores are."""
        fisher, damping, store = self._curvature(job), job.settings.damping, IndexedGradients(job)
        squared = fisher.measure(damping, 1).to(store.compute_device)
        divisor = fisher.measure(damping, 2).to(store.compute_device) if self.relative == "theta" else squared

        def blocks(piece: int) -> Iterator[ScoreBlock]:
            for block in store.piece_blocks(piece):
                with time_phase("scoring"):
                    scores = squared(block.gradients).square()
                    if self.relative != "none":
                        lengths = divisor(block.gradients)
                        scores /= torch.where(lengths > 0, lengths, 1.0)
                yield ScoreBlock(block.example, scores[None].cpu())

        return blocks

    def _store(self, job: Job, fisher: FisherBlocks, damping: float) -> IndexedGradients:
        if self.relative == "none":
            return IndexedGradients(job)
        return IndexedGradients(job, fisher.measure(damping, 2 if self.relative == "theta" else 1))

    def _curvature(self, job: Job) -> FisherBlocks:
        store, command = IndexedGradients(job), worker_command(job.settings, "attribute")
        whole = self.fisher == "model"
        found = fisher_of(store.index, job.settings, command, store.compute_device, whole=whole)
        return found.in_unit_of_one() if self.damping_unit == "one" else found
