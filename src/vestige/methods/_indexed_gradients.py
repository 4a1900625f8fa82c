"""Gradients of the training data from an index: compressed numbers on disk, read block by block."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.compress import adjoint_gradient, parse_spec
from vestige.curvature import Measure, Measures
from vestige.data import TokenizedData, plan_batches
from vestige.indexes import CompressedGradients, Index, IndexBlock, IndexedComponent
from vestige.methods._protocol import Job
from vestige.methods._stores import InPieces, Products, Vectors
from vestige.models import batch_sharing
from vestige.progress import announce
from vestige.timing import time_phase

PARTS_NUMBERS = 2**26
"""Most numbers alive at once while gradients of the whole model are computed component by component."""
SUM_TOLERANCE = 0.01
"""Difference between a score and the sum over its components, relative to the largest score, that is worth a word."""
INDEX_PIECE_BYTES = 2**31
"""Stored gradients in one piece of work, at most, unless a shard alone is larger."""


class IndexedGradients(InPieces):
    """Compressed gradients read from an index; queries are compressed by the same maps.

    `measure` says what the length of a gradient is; not given: the Euclidean one. `Measures` are for `piece_scores`.
    """

    def __init__(self, job: Job, index: Index, measure: Measure | Measures | None = None) -> None:
        self._job, self.index, self.measure = job, index, measure
        self.device = torch.device("cpu")
        self._groups = index.shard_groups(INDEX_PIECE_BYTES)
        manifest = index.manifest
        self._spec = parse_spec(manifest.compression.spec)
        self.columns = [span.columns for span in index.spans]
        self._shared = manifest.compression.scope == "model"

    @property
    def identity(self) -> str:
        """The index's content."""
        measure = "" if self.measure is None else f" {self.measure.name}"
        return f"index {self.index.fingerprint} {self._groups}{measure}"

    @property
    def pieces(self) -> int:
        """Groups of shards."""
        return len(self._groups)

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Return compressed gradients of the queries, in their order."""
        return self.split(self._compressed(data, self.index.manifest.components))

    def _compressed(self, data: TokenizedData, columns: Sequence[IndexedComponent]) -> Float[Tensor, "example column"]:
        """Compute gradients of the data by the model as it is, in its order, compressed into these columns."""
        manifest, loaded = self.index.manifest, self._job.model_for(self._job.settings.method)
        compute = CompressedGradients(
            loaded, self._job.components, columns, self._spec, manifest.seed, manifest.loss, manifest.compression.scope
        )
        with compute:
            sharing = batch_sharing(loaded.model)
            content = compute.rows(data, plan_batches(data.lengths, manifest.token_budget, sharing=sharing))
        gradients = torch.empty_like(content.gradients)
        gradients[content.example] = content.gradients
        return gradients

    def split(self, gradients: Float[Tensor, "query column"]) -> Vectors:
        """Return one matrix per component; a single one where the components were added up."""
        return [gradients[:, part] for part in self.columns]

    def piece_rows(self, piece: int) -> int:
        """Return the number of rows in the piece's shards."""
        return self.index.rows_of(self._groups[piece])

    def piece_blocks(self, piece: int) -> Iterator[IndexBlock]:
        """Yield the rows of a piece."""
        return self.index.blocks(shards=self._groups[piece])

    def piece_scores(
        self, piece: int, vectors: Vectors, *, norms: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield the scores of a piece: one matrix product per block of the index."""
        whole = torch.cat(vectors, dim=1)
        for block in self.piece_blocks(piece):
            with time_phase("scoring"):
                scores = whole @ block.gradients.T
                lengths = block.norm if self.measure is None else self.measure(block.gradients)
            yield block.example, scores, lengths if norms else None

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Compute inner products component by component.

        Stored gradients of the whole model cannot be taken apart again: the components' are computed again, and differ
        from what is stored by its rounding.
        """
        found = self._products(vectors, rows, self.index.gradients_of(rows), norms)
        if not self._shared:
            return found
        scores = self._computed_parts(vectors[0], rows)
        _announce_unlike(scores.sum(0), found.scores[0])
        return found._replace(scores=scores)

    def _computed_parts(
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
            gradients = self._compressed(data, apart).unflatten(1, (len(parts), width))
            scores.append(torch.einsum("qk,rck->cqr", vectors, gradients))
        return torch.cat(scores, dim=2)

    def _products(self, vectors: Vectors, rows: Sequence[int], gradients: Tensor, norms: bool) -> Products:
        pairs = zip(vectors, self.columns, strict=True)
        scores = torch.stack([vector @ gradients[:, part].T for vector, part in pairs])
        lengths = gradients.norm(dim=1) if self.measure is None else self.measure(gradients)
        return Products(torch.as_tensor(np.asarray(rows)), scores, lengths if norms else None)

    def piece_squared_norms(self, piece: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield squared norms of the stored rows."""
        for block in self.piece_blocks(piece):
            with time_phase("scoring"):
                squared = block.gradients.square().sum(1)
            yield block.example, squared

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


def _announce_unlike(computed: Float[Tensor, "query row"], stored: Float[Tensor, "query row"]) -> None:
    """Say so where the components' scores do not add up to the scores."""
    apart = float((computed - stored).abs().max()) if stored.numel() else 0.0
    largest = float(stored.abs().max()) if stored.numel() else 0.0
    if apart > SUM_TOLERANCE * largest:
        announce(
            f"Component scores, computed again, add up to the listed scores within {apart / largest:.1%} of the "
            "largest one: the index stores rounded numbers, or was made on another device."
        )
