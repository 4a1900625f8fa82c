"""Compressed gradients of the training data, read from an index on disk."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.compress import adjoint_gradient, compress_factors
from vestige.curvature import Measure, Measures
from vestige.data import TokenizedData, plan_batches
from vestige.gradients import OneHot
from vestige.indexes import CompressedGradients, Index, IndexBlock, IndexedComponent
from vestige.methods._protocol import GradientStore, Job, Products, ScoredRows, Vectors
from vestige.methods._queries import subtract_contrast
from vestige.models import batch_sharing
from vestige.progress import announce
from vestige.timing import time_phase

PARTS_NUMBERS = 2**26
"""Most numbers alive at once while gradients of the whole model are computed component by component."""
SUM_TOLERANCE = 0.01
"""Difference between a score and the sum over its components, relative to the largest score, that is announced."""


class IndexedGradients(GradientStore):
    """Compressed gradients read from the index of a job; queries are compressed by the same maps.

    `measure` says what the length of a gradient is; not given: the Euclidean one. `Measures` are for `piece_scores`.
    """

    piece_bytes: ClassVar[int] = 2**31
    """Stored gradients in one piece of work, at most, unless a shard alone is larger."""

    def __init__(self, job: Job, measure: Measure | Measures | None = None) -> None:
        assert job.index is not None, "an index was made for a method that needs one"
        self._job, self.index, self.measure = job, job.index, measure
        self.device = self.compute_device = torch.device("cpu")
        if job.loaded is not None and (card := next(job.loaded.model.parameters()).device).type == "cuda":
            self.compute_device = card
        self._groups = self.index.shard_groups(self.piece_bytes)
        self._spec = self.index.spec
        self.columns = [span.columns for span in self.index.spans]
        self._shared = self.index.manifest.compression.scope == "model"

    @property
    def identity(self) -> str:
        """The index's content."""
        measure = "" if self.measure is None else f" {self.measure.name}"
        # Scores that a card and a CPU computed, which differ by rounding, do not mix.
        place = "" if self.compute_device.type == "cpu" else f" {self.compute_device.type}"
        return f"index {self.index.fingerprint} {self._groups}{measure}{place}"

    @property
    def pieces(self) -> int:
        """The number of groups of shards."""
        return len(self._groups)

    def piece_rows(self, piece: int) -> int:
        """Return the number of rows in the piece's shards."""
        return self.index.rows_of(self._groups[piece])

    def piece_blocks(self, piece: int) -> Iterator[IndexBlock]:
        """Yield the rows of a piece, their gradients on `compute_device`."""
        return self.index.blocks(shards=self._groups[piece], device=self.compute_device)

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Return compressed gradients of the queries, in their order."""
        columns = self.index.manifest.components

        def measure(part: TokenizedData) -> tuple[Vectors, Float[Tensor, "example"]]:
            gradients, losses = self._compress(part, columns)
            return self.split(gradients), losses

        vectors, self.query_losses = subtract_contrast(data, measure)
        return vectors

    def compress(self, gradients: Vectors) -> Vectors:
        """Return whole gradients, or other matrices like them, compressed by the maps of the index."""
        manifest, count = self.index.manifest, len(gradients[0])
        found = torch.zeros(count, self.index.width)
        for part, flat in zip(manifest.components, gradients, strict=True):
            compressor = self._spec.build(part.name, part.shape, manifest.seed, flat.device, shared=self._shared)
            # A matrix is the sum of its lines, each times a unit vector: thin factors, as a gradient is over tokens.
            lines = OneHot(torch.arange(part.shape[0], device=flat.device).expand(count, -1), part.shape[0])
            compressed = compress_factors(compressor, lines, flat.unflatten(1, part.shape))
            found[:, part.start : part.stop] += compressed.cpu()
        return self.split(found)

    def join(self, stores: Sequence[GradientStore], lines: int) -> GradientStore:
        """Return the index, with the measure of length of each of the stores for its lines."""
        measures = [store.measure for store in cast(Sequence[IndexedGradients], stores)]
        kept = tuple(measure for measure in measures if isinstance(measure, Measure))
        return IndexedGradients(self._job, Measures(kept, lines)) if kept else self

    def split(self, gradients: Float[Tensor, "query column"]) -> Vectors:
        """Return one matrix per component; a single one where the components were added up."""
        return [gradients[:, part] for part in self.columns]

    def piece_scores(self, piece: int, vectors: Vectors, *, norms: bool) -> Iterator[ScoredRows]:
        """Yield the scores of a piece: inner products with its stored rows."""
        whole = torch.cat(vectors, dim=1).to(self.compute_device)
        if self.measure is None:
            for rows, scores, lengths in self.index.scan(whole, shards=self._groups[piece]):
                yield rows, scores, lengths if norms else None
            return
        measure = self.measure.to(self.compute_device)
        for block in self.piece_blocks(piece):
            with time_phase("scoring"):
                scores, lengths = (whole @ block.gradients.T).cpu(), measure(block.gradients).cpu()
            yield block.example, scores, lengths if norms else None

    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield squared norms of the stored rows."""
        for block in self.index.blocks(shards=self._groups[piece]):
            with time_phase("scoring"):
                squared = block.gradients.square().sum(1)
            yield block.example, squared

    def piece_gradients(self, piece: int) -> Iterator[tuple[Tensor, Vectors]]:
        """Yield the stored rows."""
        for block in self.index.blocks(shards=self._groups[piece]):
            yield block.example, self.split(block.gradients)

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute inner products component by component.

        Stored gradients of the whole model cannot be taken apart again: the components' are computed again, and differ
        from what is stored by its rounding.
        """
        found = self._multiply(vectors, rows, norms)
        if not self._shared:
            return found
        scores = self._compute_parts(vectors[0], rows)
        _announce_unlike(scores.sum(0), found.scores[0])
        return found._replace(scores=scores)

    def totals(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute the scores of a few rows from what is stored alone."""
        found = self._multiply(vectors, rows, norms)
        return found._replace(scores=found.scores.sum(0, keepdim=True))

    def _multiply(self, vectors: Vectors, rows: Sequence[int], norms: bool) -> Products:
        gradients = self.index.gradients_of(rows)
        pairs = zip(vectors, self.columns, strict=True)
        scores = torch.stack([vector @ gradients[:, part].T for vector, part in pairs])
        lengths = gradients.norm(dim=1) if self.measure is None else self.measure(gradients)
        return Products(scores, lengths if norms else None)

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """Bring compressed vectors back to matrices by the adjoint of their compressor."""
        manifest = self.index.manifest
        return [
            adjoint_gradient(
                self._spec.build(part.name, part.shape, manifest.seed, shared=self._shared),
                vectors[0 if self._shared else number][query : query + 1],
            )[0]
            for number, part in enumerate(manifest.components)
        ]

    def _compress(
        self, data: TokenizedData, columns: Sequence[IndexedComponent]
    ) -> tuple[Float[Tensor, "example column"], Float[Tensor, "example"]]:
        """Compute losses, and gradients compressed into these columns, of the data by the model as it is, in order."""
        sharing = batch_sharing(self._job.model_for(self._job.settings.method).model)
        batches = plan_batches(data.lengths, self.index.manifest.token_budget, sharing=sharing)
        with open_compressed(self._job, self.index, columns) as compute:
            content = compute.rows(data, batches)
        gradients, losses = torch.empty_like(content.gradients), torch.empty_like(content.loss)
        gradients[content.example], losses[content.example] = content.gradients, content.loss
        return gradients, losses

    def _compute_parts(
        self, vectors: Float[Tensor, "query column"], rows: Sequence[int]
    ) -> Float[Tensor, "component query row"]:
        """Compute `<v, S_c g_c>` of every component c, whose columns are laid side by side for this."""
        parts, width = self.index.manifest.components, self.index.width
        apart = [
            part.model_copy(update={"start": number * width, "stop": (number + 1) * width})
            for number, part in enumerate(parts)
        ]
        step = max(1, PARTS_NUMBERS // (width * len(parts)))
        scores = [vectors.new_zeros(len(parts), len(vectors), 0)]
        for start in range(0, len(rows), step):
            data = self._job.train.subset(rows[start : start + step])
            gradients = self._compress(data, apart)[0].unflatten(1, (len(parts), width))
            scores.append(torch.einsum("qk,rck->cqr", vectors, gradients))
        return torch.cat(scores, dim=2)


def open_compressed(job: Job, like: Index, columns: Sequence[IndexedComponent]) -> CompressedGradients:
    """Return what computes gradients of the job's model, compressed as those of an index are, into these columns."""
    loaded, made = job.model_for(job.settings.method), like.manifest
    return CompressedGradients(loaded, job.components, columns, like.spec, made.seed, made.loss, made.compression.scope)


def _announce_unlike(computed: Float[Tensor, "query row"], stored: Float[Tensor, "query row"]) -> None:
    """Print how far the components' scores are from adding up to the scores, where that is far."""
    apart = float((computed - stored).abs().max()) if stored.numel() else 0.0
    largest = float(stored.abs().max()) if stored.numel() else 0.0
    if apart > SUM_TOLERANCE * largest:
        announce(
            f"Component scores, computed again, add up to the listed scores within {apart / largest:.1%} of the "
            "largest one: the index stores rounded numbers, or was made on another device."
        )
