"""Influence functions on compressed gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vestige.curvature import FisherBlocks, fisher_of
from vestige.methods._prepared import HELPS, GradientMethod, Prepared, prepare
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import IndexedGradients, Vectors
from vestige.runs import Meaning, ScoreBlock


@method("influence")
@dataclass
class Influence(GradientMethod):
    """Influence function with a block-diagonal empirical Fisher matrix in the compressed space.

    `score = <(F_c + d_c I)^-1 S grad loss(query), S grad loss(example)>` summed over components c, with S the
    compressor and `F_c` the mean of `S g g^T S^T` over the training data (Koh and Liang 2017, arXiv:1703.04730;
    the compressed form of LoGra, Choe et al. 2024, arXiv:2405.13954, and GraSS, Hu et al. 2025, arXiv:2505.18976).
    """

    name = "influence"
    needs_index = True
    needs_exact = False
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
    _fisher: FisherBlocks | None = field(default=None, repr=False)

    def vectors(self, job: Job) -> Prepared:
        """The queries' compressed gradients, preconditioned."""
        store = _indexed(job)
        self._fisher = fisher = fisher_of(store.index)

        def preconditioned(vectors: Vectors) -> Vectors:
            return store.split(fisher.precondition(torch.cat(vectors, dim=1), job.settings.damping))

        return prepare(job, store, preconditioned)

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
