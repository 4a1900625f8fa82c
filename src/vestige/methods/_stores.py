"""Where the gradients of the training data come from: an index on disk, or the model itself, exact.

Both answer the same questions, so that a method does not know which one it works on. Vectors are kept as one matrix
`[query, n]` per component: n compressed numbers for an index, all `out * in` entries without one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress import adjoint_gradient, parse_spec
from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.gradients import BothSinks, CausalLoss, DotSink, GradientPass, GradientSink, NormSink
from vestige.index import CompressedGradients, Index, batch_tokens
from vestige.methods._protocol import Job
from vestige.models import LoadedModel
from vestige.progress import announce, format_bytes, progress

Vectors = list[Float[Tensor, "query n"]]

EXACT_SHARE = 0.4
"""Share of the free memory that the queries' whole gradients may take; beyond it they are compressed."""


class Products(NamedTuple):
    """Inner products of some rows with the query vectors."""

    rows: Int[Tensor, "row"]
    scores: Float[Tensor, "component query row"]
    norms: Float[Tensor, "row"] | None
    """Length of each row's gradient, where it was asked for."""


class GradientStore(Protocol):
    """Per-example gradients of the training data."""

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Gradients of the queries."""
        ...

    def scores(self, vectors: Vectors, *, norms: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(rows, summed scores [query, row], norms [row]) of all training examples, each once."""
        ...

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """The scores of a few rows, split over components."""
        ...

    def computed_now(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """`products` from the model as it is at this moment, whatever is stored."""
        ...

    def squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, squared gradient norms [row]) of all training examples."""
        ...

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """The matrices whose inner product with an example's gradient is that query's score."""
        ...


class IndexedGradients:
    """Compressed gradients read from an index; queries are compressed by the same maps.

    `measure` says what the length of a gradient is; not given: the Euclidean one.
    """

    def __init__(
        self, job: Job, index: Index, measure: Callable[[Float[Tensor, "row column"]], Tensor] | None = None
    ) -> None:
        self._job, self.index, self._measure = job, index, measure
        manifest = index.manifest
        self._spec = parse_spec(manifest.compression.spec)
        self.columns = [index.columns(number) for number in range(len(manifest.components))]

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Compressed gradients of the queries, in their order."""
        manifest, loaded = self.index.manifest, self._job.model_for(self._job.settings.method)
        compute = CompressedGradients(
            loaded, self._job.components, manifest.components, self._spec, manifest.seed, manifest.loss
        )
        with compute:
            content = compute.rows(data, plan_batches(data.lengths, manifest.token_budget))
        gradients = torch.empty_like(content.gradients)
        gradients[content.example] = content.gradients
        return self.split(gradients)

    def split(self, gradients: Float[Tensor, "query column"]) -> Vectors:
        """One matrix per component."""
        return [gradients[:, part] for part in self.columns]

    def scores(self, vectors: Vectors, *, norms: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """One matrix product per block of the index."""
        whole = torch.cat(vectors, dim=1)
        with progress(self.index.rows, "Scoring") as bar:
            for block in self.index.blocks():
                lengths = block.norm if self._measure is None else self._measure(block.gradients)
                yield block.example, whole @ block.gradients.T, lengths if norms else None
                bar.advance(len(block.example))

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """Inner products component by component."""
        return self._products(vectors, rows, self.index.gradients_of(rows), norms)

    def computed_now(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """The same from gradients computed anew."""
        gradients = torch.cat(self.of_queries(self._job.train.subset(rows)), dim=1)
        return self._products(vectors, rows, gradients, norms)

    def _products(self, vectors: Vectors, rows: Sequence[int], gradients: Tensor, norms: bool) -> Products:
        pairs = zip(vectors, self.columns, strict=True)
        scores = torch.stack([vector @ gradients[:, part].T for vector, part in pairs])
        lengths = gradients.norm(dim=1) if self._measure is None else self._measure(gradients)
        return Products(torch.as_tensor(np.asarray(rows)), scores, lengths if norms else None)

    def squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Squared norms of the stored rows."""
        for block in self.index.blocks():
            yield block.example, block.gradients.square().sum(1)

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """Compressed vectors brought back to matrices by the adjoint of their compressor."""
        manifest = self.index.manifest
        return [
            adjoint_gradient(self._spec.build(part.name, part.shape, manifest.seed), vector[query : query + 1])[0]
            for part, vector in zip(manifest.components, vectors, strict=True)
        ]


class ExactGradients:
    """Whole gradients, formed while the model runs over the training data once; nothing is stored."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded: LoadedModel = job.model_for(job.settings.method)
        self._device = next(self._loaded.model.parameters()).device
        self._budget = batch_tokens(job.settings, self._loaded)
        self._objective = CausalLoss(job.settings.loss)

    def of_queries(self, data: TokenizedData) -> Vectors:
        """Whole gradients of the queries: `queries * parameters` numbers."""
        components = self._job.components
        gradients = [torch.empty(len(data), part.size, device=self._device) for part in components]
        sink = GradientSink(components)
        with GradientPass(self._loaded.model, components, self._objective) as gradient_pass:
            for row in range(len(data)):
                sink.begin(1, self._device)
                gradient_pass.run(make_batch(data, [row]).to(self._device), sink)
                for stored, gradient in zip(gradients, sink.gradients, strict=True):
                    stored[row] = gradient.flatten()
        return gradients

    def scores(self, vectors: Vectors, *, norms: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """One forward and backward pass over the training data."""
        data = self._job.train
        with progress(len(data), "Scoring") as bar:
            for part in self._streamed(vectors, np.arange(len(data)), norms):
                yield part.rows, part.scores.sum(0), part.norms
                bar.advance(len(part.rows))

    def products(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """A pass over just these rows."""
        parts = list(self._streamed(vectors, np.asarray(rows), norms))
        order = torch.argsort(torch.cat([part.rows for part in parts]))
        place = torch.argsort(torch.argsort(torch.as_tensor(np.asarray(rows)), stable=True), stable=True)
        lengths = torch.cat([part.norms for part in parts if part.norms is not None]) if norms else None
        return Products(
            torch.as_tensor(np.asarray(rows)),
            torch.cat([part.scores for part in parts], dim=2)[:, :, order][:, :, place],
            None if lengths is None else lengths[order][place],
        )

    def computed_now(self, vectors: Vectors, rows: Sequence[int], *, norms: bool) -> Products:
        """The same: nothing is stored."""
        return self.products(vectors, rows, norms=norms)

    def squared_norms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Exact squared norms by ghost products, no gradient kept."""
        data, sink = self._job.train, NormSink(self._job.components)
        with (
            GradientPass(self._loaded.model, self._job.components, self._objective) as gradient_pass,
            progress(len(data), "Self-influence") as bar,
        ):
            for batch in plan_batches(data.lengths, self._budget):
                sink.begin(len(batch))
                gradient_pass.run(make_batch(data, batch).to(self._device), sink)
                yield torch.as_tensor(batch), sink.finish().sum(0).cpu()
                bar.advance(len(batch))

    def direction(self, vectors: Vectors, query: int) -> list[Float[Tensor, "out in"]]:
        """The query's own matrices."""
        pairs = zip(vectors, self._job.components, strict=True)
        return [vector[query].view(component.shape) for vector, component in pairs]

    def _streamed(self, vectors: Vectors, rows: Int[np.ndarray, "row"], norms: bool) -> Iterator[Products]:
        """Products of some rows in batches, longest first."""
        data, components = self._job.train, self._job.components
        shaped = [vector.view(-1, *component.shape) for vector, component in zip(vectors, components, strict=True)]
        dot, norm = DotSink(shaped), NormSink(components)
        sink = BothSinks(dot, norm) if norms else dot
        with GradientPass(self._loaded.model, components, self._objective) as gradient_pass:
            for batch in plan_batches(data.lengths[rows], self._budget):
                dot.begin(len(batch))
                norm.begin(len(batch))
                gradient_pass.run(make_batch(data, rows[batch]).to(self._device), sink)
                lengths = norm.finish().sum(0).sqrt().cpu() if norms else None
                yield Products(torch.as_tensor(rows[batch]), dot.scores.cpu(), lengths)


def gradients_fit(job: Job) -> bool:
    """Whether the queries' whole gradients fit into memory; says so if they do not."""
    assert job.selection is not None
    size = 4 * len(job.queries) * job.selection.selected_parameters
    available = psutil.virtual_memory().available
    if size <= EXACT_SHARE * available:
        return True
    announce(
        f"Whole gradients of {len(job.queries)} queries would take {format_bytes(size)} of {format_bytes(available)} "
        "free memory: they are compressed instead."
    )
    return False
