"""Kronecker-factored curvature of a model over its training data: one pass for K-FAC, one more for EK-FAC."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import nn

from vestige.curvature._blocks import find_blocks
from vestige.curvature._kfac import EigenCurvature, EigenvalueSink, KroneckerFactors, KroneckerSink
from vestige.curvature._labels import Labels, relabelled, sampled_labels
from vestige.data import Batch, TokenizedData, make_batch, plan_batches
from vestige.gradients import CausalLoss, FactorSink, GradientPass, Reduction
from vestige.models import Component
from vestige.progress import progress


class BatchSink(FactorSink, Protocol):
    """A sink that is told where a batch begins and ends."""

    def begin(self, examples: int) -> None:
        """Start a batch."""
        ...

    def finish(self) -> None:
        """The batch's factors have all arrived."""
        ...


@dataclass(frozen=True)
class CurvatureData:
    """What a curvature is measured on: sums over all of it, so no result depends on how it is cut into batches."""

    model: nn.Module
    components: Sequence[Component]
    data: TokenizedData
    token_budget: int
    reduction: Reduction = "sum"
    labels: Labels = "sampled"
    seed: int = 0

    @cached_property
    def _sampled(self) -> list[np.ndarray] | None:
        if self.labels == "data":
            return None
        return sampled_labels(self.model, self.data, self.token_budget, self.seed)

    def batches(self) -> Iterator[Batch]:
        """The data in batches, with the labels that were asked for, on the model's device."""
        device, sampled = next(self.model.parameters()).device, self._sampled
        for rows in plan_batches(self.data.lengths, self.token_budget):
            batch = make_batch(self.data, rows).to(device)
            yield batch if sampled is None else relabelled(batch, sampled)

    def stream(self, sink: BatchSink, label: str) -> None:
        """Every example's factors through `sink`, batch by batch."""
        # Labels are drawn before the hooks are placed: drawing them runs the model.
        _ = self._sampled
        with (
            GradientPass(self.model, self.components, CausalLoss(self.reduction)) as gradient_pass,
            progress(len(self.data), label) as bar,
        ):
            for batch in self.batches():
                sink.begin(len(batch.rows))
                gradient_pass.run(batch, sink)
                sink.finish()
                bar.advance(len(batch.rows))


def fit_kfac(measured: CurvatureData) -> KroneckerFactors:
    """S and A of every block, in one pass."""
    blocks = find_blocks(measured.components)
    sink = KroneckerSink(measured.components, blocks)
    measured.stream(sink, "Kronecker factors")
    return KroneckerFactors(blocks, sink.factors())


def fit_ekfac(measured: CurvatureData) -> EigenCurvature:
    """Eigenvectors from one pass, eigenvalues from another."""
    sink = EigenvalueSink(fit_kfac(measured).eigenbases())
    measured.stream(sink, "EK-FAC eigenvalues")
    return sink.corrected()
