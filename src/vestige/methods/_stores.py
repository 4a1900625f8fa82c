"""Where the gradients of the training data come from: the model itself, exact, or an index on disk.

Both answer the same questions, so that a method does not know which one it works on. Vectors are kept as one matrix
`[query, n]` per component: n compressed numbers for an index, all `out * in` entries without one.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.distributed import compute_round_robin
from vestige.errors import NonFinite
from vestige.gradients import (
    BothSinks,
    CausalLoss,
    DotSink,
    FittingBatches,
    GradientPass,
    Gradients,
    GradientSink,
    LowRank,
    NormSink,
    low_rank,
    matrices_of,
)
from vestige.jobs import group_items
from vestige.methods._indexed import IndexedGradients
from vestige.methods._protocol import GradientStore, Job, Products, ScoredRows, Vectors
from vestige.methods._queries import subtract_contrast
from vestige.models import LoadedModel, batch_sharing
from vestige.progress import announce

GRADIENT_NUMBERS = 2**26
"""Most numbers of whole training gradients alive at once."""


class ExactGradients(GradientStore):
    """Whole gradients, formed while the model runs over the training data once; nothing is stored."""

    piece_tokens: ClassVar[tuple[int, int]] = (2**16, 2**20)
    """Tokens in one piece of work: a 64th of the data, within these bounds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded: LoadedModel = job.model_for(job.settings.method)
        self.device = next(self._loaded.model.parameters()).device
        self._budget = job.token_budget
        self._sharing = batch_sharing(self._loaded.model)
        self._objective = CausalLoss(job.settings.loss)
        self._shortened: tuple[Vectors, list[Gradients]] | None = None

    @cached_property
    def _groups(self) -> list[list[np.ndarray]]:
        """Consecutive batches of the training data, group by group."""
        lengths = self._job.train.lengths
        fewest, most = self.piece_tokens
        wanted = min(max(int(lengths.sum()) // 64, fewest), most)
        batches = plan_batches(lengths, self._budget, sharing=self._sharing)
        return group_items(batches, lambda batch: int(lengths[batch].sum()), wanted)

    @property
    def pieces(self) -> int:
        """The number of groups of batches."""
        return len(self._groups)

    @property
    def identity(self) -> str:
        """Model, data, components, loss, number format and batches."""
        parts = [[part.name, *part.shape] for part in self._job.components]
        model, train = self._loaded, self._job.train
        dtype = next(model.model.parameters()).dtype
        return f"model {model.fingerprint} {train.fingerprint} {parts} {self._job.settings.loss} {dtype} {self._budget}"

    def piece_rows(self, piece: int) -> int:
        """Return the number of examples in the piece's batches."""
        return sum(map(len, self._groups[piece]))

    def piece_gradients(self, piece: int) -> Iterator[tuple[Tensor, Vectors]]:
        """Yield whole gradients, each formed alone."""
        step = max(1, GRADIENT_NUMBERS // max(sum(part.size for part in self._job.components), 1))
        of_piece = np.concatenate(self._groups[piece])
        for start in range(0, len(of_piece), step):
            rows = of_piece[start : start + step]
            yield torch.from_numpy(rows), self._measure(self._job.train.subset(rows))[0]

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Return whole gradients of the queries: `queries * parameters` numbers."""
        gradients, self.query_losses = subtract_contrast(data, self._measure)
        return gradients

    def _measure(self, data: TokenizedData) -> tuple[Vectors, Float[Tensor, "example"]]:
        """Return whole gradients, and losses."""
        gradients = [torch.empty(len(data), part.size, device=self.device) for part in self._job.components]
        losses = torch.zeros(len(data), dtype=torch.float64)
        for rows, found, parts in self.stream_gradients(data):
            losses[rows] = found.double().cpu()
            for stored, gradient in zip(gradients, parts, strict=True):
                stored[rows] = gradient.flatten(1)
        return gradients, losses

    def stream_gradients(
        self, data: TokenizedData
    ) -> Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "row"], list[Float[Tensor, "row out in"]]]]:
        """Yield (rows, losses, a whole gradient for each component) of some data, a few examples at a time."""
        components = self._job.components
        sink, at_once = GradientSink(components), max(1, GRADIENT_NUMBERS // sum(part.size for part in components))
        with GradientPass(self._loaded.model, components, self._objective) as gradient_pass:

            def run(rows: np.ndarray) -> tuple[Tensor, Tensor, list[Tensor]]:
                sink.begin(len(rows), self.device)
                losses = gradient_pass.run(make_batch(data, rows).to(self.device), sink)
                return torch.from_numpy(rows), losses, sink.gradients

            fitting = FittingBatches(data.lengths)
            for batch in plan_batches(data.lengths, self._budget, at_once, sharing=self._sharing):
                yield from fitting.run(batch, run)

    def piece_scores(self, piece: int, vectors: Vectors, *, norms: bool) -> Iterator[ScoredRows]:
        """Yield the scores of the piece's batches from one forward and backward pass."""
        for rows, (scores, lengths) in self._stream(vectors, self._groups[piece], norms):
            yield torch.as_tensor(rows), scores.sum(0), lengths

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute the products of just these rows in a pass over them."""
        wanted = np.asarray(rows)
        planned = plan_batches(self._job.train.lengths[wanted], self._budget, sharing=self._sharing)
        parts = [part for _, part in self._stream(vectors, [wanted[batch] for batch in planned], norms)]
        order = torch.from_numpy(np.concatenate(planned)).argsort()
        lengths = torch.cat([part.norms for part in parts if part.norms is not None])[order] if norms else None
        return Products(torch.cat([part.scores for part in parts], dim=2)[:, :, order], lengths)

    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield exact squared norms by ghost products, no gradient kept."""
        for rows, losses, squared in self._measure_lengths(piece):
            self._require_finite(rows, losses, squared)
            yield torch.as_tensor(rows), squared

    def piece_finite(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, whether the loss and, with components, the gradient of the row is finite) of a piece."""
        for rows, losses, squared in self._measure_lengths(piece):
            yield torch.as_tensor(rows), torch.isfinite(losses) & torch.isfinite(squared)

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """Return the query's own matrices, of rank `query_rank` where it is set."""
        one = slice(query, query + 1)
        matrices = self._matrices(vectors)
        return [(part[one] if isinstance(part, Tensor) else matrices_of(part, one))[0] for part in matrices]

    def _matrices(self, vectors: Vectors) -> Sequence[Tensor | Gradients]:
        """Return the vectors as matrices; with `query_rank`, the closest of that rank, made once for these vectors."""
        pairs = zip(vectors, self._job.components, strict=True)
        shaped, rank = [vector.view(-1, *part.shape) for vector, part in pairs], self._job.settings.query_rank
        if rank is None:
            return shaped
        if self._shortened is None or self._shortened[0] is not vectors:
            found = [low_rank(matrices, rank) for matrices in shaped]
            if self._shortened is None:
                _announce_kept(rank, shaped, found)
            self._shortened = (vectors, [one.gradients for one in found])
        return self._shortened[1]

    def _stream(
        self, vectors: Vectors, batches: Sequence[np.ndarray], norms: bool
    ) -> Iterator[tuple[np.ndarray, Products]]:
        """Yield (rows, their products) of some batches."""
        data, components = self._job.train, self._job.components
        dot, norm = DotSink(self._matrices(vectors), batches=len(batches)), NormSink(components)
        sink = BothSinks(dot, norm) if norms else dot
        with GradientPass(self._loaded.model, components, self._objective) as gradient_pass:

            def run(part: np.ndarray) -> tuple[Tensor, Tensor]:
                dot.begin(len(part))
                norm.begin(len(part))
                losses = gradient_pass.run(make_batch(data, part).to(self.device), sink)
                scores, lengths = dot.scores.cpu(), norm.finish().sum(0).sqrt().cpu() if norms else losses.cpu()
                self._require_finite(part, losses, scores.sum((0, 1)))
                return scores, lengths

            def multiply(batch: np.ndarray) -> Products:
                scores, lengths = zip(*fitting.run(batch, run), strict=True)
                return Products(torch.cat(scores, dim=2), torch.cat(lengths) if norms else None)

            fitting = FittingBatches(data.lengths)
            yield from compute_round_robin(batches, multiply)

    def _measure_lengths(self, piece: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yield (rows, losses, squared gradient norms) of a piece; norms are 0 without components."""
        model, components = self._loaded.model, self._job.components
        sink = NormSink(components)
        gradient_pass = GradientPass(model, components, self._objective) if components else None

        def run(rows: np.ndarray) -> tuple[Tensor, Tensor]:
            batch = make_batch(self._job.train, rows).to(self.device)
            if gradient_pass is None:
                with torch.no_grad():
                    losses = self._objective.losses(model, batch).cpu()
                return losses, torch.zeros_like(losses)
            sink.begin(len(rows))
            losses = gradient_pass.run(batch, sink)
            return losses.cpu(), sink.finish().sum(0).cpu()

        def measure(batch: np.ndarray) -> tuple[Tensor, ...]:
            return tuple(map(torch.cat, zip(*fitting.run(batch, run), strict=True)))

        fitting = FittingBatches(self._job.train.lengths)
        with gradient_pass or nullcontext():
            for rows, (losses, squared) in compute_round_robin(self._groups[piece], measure):
                yield rows, losses, squared

    def _require_finite(
        self, rows: Int[np.ndarray, "row"], losses: Float[Tensor, "row"], products: Float[Tensor, "row"]
    ) -> None:
        """Raise unless every example that is not left out has a finite loss and gradient."""
        left_out = np.isin(rows, self._job.skipped)
        for what, values in (("loss", losses), ("gradient", products)):
            bad = rows[~(torch.isfinite(values).cpu().numpy() | left_out)]
            # Where no example has a product, it is the queries that have no gradient.
            if len(bad) and (what == "loss" or len(bad) < len(rows)):
                examples = self._job.train.examples
                raise NonFinite.of_examples(what, [f'"{examples[row].id}" (row {row})' for row in bad.tolist()])


def _announce_kept(rank: int, matrices: Sequence[Tensor], found: Sequence[LowRank]) -> None:
    """Print how much of the queries is left."""
    squared = torch.stack([part.double().flatten(1).square().sum(1) for part in matrices])
    kept = (squared * torch.stack([one.kept.double() for one in found])).sum(0) / squared.sum(0).clamp(min=1e-300)
    announce(f"Rank {rank} keeps {float(kept.min()):.2%} of the squared length of the queries' vectors, or more.")


def open_store(job: Job) -> GradientStore:
    """Open the job's index, or the model itself when there is none."""
    return ExactGradients(job) if job.index is None else IndexedGradients(job)
