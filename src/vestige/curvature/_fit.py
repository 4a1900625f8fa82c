"""Kronecker-factored curvature of a model over its training data: one pass for K-FAC, one more for EK-FAC.

The data falls into pieces that follow from it and from the components alone. Sums of each piece are added in the order
of the pieces, here as on disk, so the numbers do not depend on which process measured which piece.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from vestige.curvature._blocks import Block, find_blocks
from vestige.curvature._kfac import (
    EigenCurvature,
    EigenvalueSink,
    KroneckerFactors,
    KroneckerSink,
    kronecker_factors,
    with_eigenvalues,
)
from vestige.curvature._labels import Labels, relabelled, sampled_labels
from vestige.data import NO_TARGET, TokenizedData, make_batch, plan_batches
from vestige.errors import NonFinite
from vestige.gradients import CausalLoss, FactorSink, GradientPass, Reduction
from vestige.models import Component, batch_sharing
from vestige.progress import progress

PIECE_TOKENS = 2**16
"""Tokens in one piece at least."""
MOST_PIECES = 64
MOST_BYTES = 2**35
"""What the sums of all pieces may take on disk together; there are fewer pieces where matrices are large."""

Sums = dict[str, Tensor]


class BatchSink(FactorSink, Protocol):
    """A sink that is notified where a batch begins and ends."""

    def begin(self, examples: int, predicting: Bool[Tensor, "example token"] | None = None) -> None:
        """Start a batch; `predicting` are the positions that predict a target, if examples have tokens."""
        ...

    def finish(self) -> None:
        """End a batch: all its factors have arrived."""
        ...


class SummingSink(BatchSink, Protocol):
    """A sink whose result is a sum over examples."""

    def sums(self) -> Sums:
        """Return the sums by name; a name is absent where nothing arrived."""
        ...


@dataclass(frozen=True)
class CurvatureData:
    """The data that a curvature is measured on: sums over all of it, so no result depends on the batches."""

    model: nn.Module
    components: Sequence[Component]
    data: TokenizedData
    token_budget: int
    reduction: Reduction = "sum"
    labels: Labels = "sampled"
    seed: int = 0
    _drawn: dict[int, dict[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """The batches of every piece."""
        matrices = 4 * sum(rows**2 + columns**2 for rows, columns in (block.shape for block in self.blocks))
        most = max(1, min(MOST_PIECES, MOST_BYTES // max(matrices, 1)))
        wanted = max(PIECE_TOKENS, -(-int(self.data.lengths.sum()) // most))
        groups: list[list[np.ndarray]] = [[]]
        size = 0
        for batch in plan_batches(self.data.lengths, self.token_budget, sharing=batch_sharing(self.model)):
            if size >= wanted:
                groups.append([])
                size = 0
            groups[-1].append(batch)
            size += int(self.data.lengths[batch].sum())
        return groups

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Components that are preconditioned together."""
        return find_blocks(self.components)

    @cached_property
    def heads(self) -> frozenset[int]:
        """The components of the output head."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        paths = {path for path, module in self.model.named_modules() if module is head}
        pairs = enumerate(self.components)
        return frozenset(number for number, part in pairs if not paths.isdisjoint(use.module for use in part.uses))

    def stream(self, sink: BatchSink, label: str) -> None:
        """Stream every example's factors through `sink`, batch by batch."""
        with progress(len(self.data), label) as bar:
            for piece in range(len(self.groups)):
                self.stream_piece(piece, sink, bar.advance)

    def stream_piece(self, piece: int, sink: BatchSink, advance: Callable[[int], None]) -> None:
        """Stream the factors of a piece's examples, with the requested labels.

        Raises:
            NonFinite: An example's loss is NaN or infinite; its id is named.
        """
        # Labels are drawn before the hooks are placed: drawing them runs the model.
        drawn = self._labels_of(piece)
        with GradientPass(self.model, self.components, CausalLoss(self.reduction)) as gradient_pass:
            for rows in self.groups[piece]:
                batch = make_batch(self.data, rows).to(self.device)
                # The label of a position is predicted by the one before it.
                sink.begin(len(rows), nn.functional.pad(batch.labels[:, 1:] != NO_TARGET, (0, 1)))
                losses = gradient_pass.run(batch if drawn is None else relabelled(batch, drawn), sink)
                if not torch.isfinite(losses).all():
                    bad = [self.data.examples[row] for row in rows[~torch.isfinite(losses).cpu().numpy()].tolist()]
                    raise NonFinite.of_examples("loss", [f'"{example.id}" (row {example.row})' for example in bad])
                sink.finish()
                advance(len(rows))

    def _labels_of(self, piece: int) -> dict[int, np.ndarray] | None:
        """Return labels by row, None for those of the data; drawn once for the passes of one process."""
        if self.labels == "data":
            return None
        if piece not in self._drawn:
            rows = np.concatenate(self.groups[piece]).tolist()
            drawn = sampled_labels(self.model, self.data.subset(rows), self.token_budget, self.seed)
            self._drawn[piece] = dict(zip(rows, drawn, strict=True))
        return self._drawn[piece]


def added(parts: Iterable[Sums]) -> Sums:
    """Return the sum of the pieces, in their order."""
    total: Sums = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name].add_(tensor) if name in total else tensor
    return total


def sums_of(measured: CurvatureData, make: Callable[[], SummingSink], label: str) -> Sums:
    """Return the sums over all pieces, in memory."""

    def parts(advance: Callable[[int], None]) -> Iterable[Sums]:
        for piece in range(len(measured.groups)):
            sink = make()
            measured.stream_piece(piece, sink, advance)
            yield sink.sums()

    with progress(len(measured.data), label) as bar:
        return added(parts(bar.advance))


def fit_kfac(measured: CurvatureData) -> KroneckerFactors:
    """Return S and A of every block, from one pass."""
    arguments = (measured.components, measured.blocks, measured.heads)
    sums = sums_of(measured, lambda: KroneckerSink(*arguments), "Kronecker factors")
    return kronecker_factors(measured.blocks, sums)


def fit_ekfac(measured: CurvatureData) -> EigenCurvature:
    """Return eigenvectors from one pass, eigenvalues from another."""
    curvature = fit_kfac(measured).eigenbases()
    return with_eigenvalues(curvature, sums_of(measured, lambda: EigenvalueSink(curvature), "EK-FAC eigenvalues"))
