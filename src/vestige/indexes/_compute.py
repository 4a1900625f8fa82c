"""The compressed gradients of a few batches: one forward and backward pass each."""

from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import torch

from vestige.compress import CompressingSink, CompressionSpec
from vestige.data import TokenizedData, make_batch
from vestige.distributed import exchange_rows, round_robin, this_rank
from vestige.gradients import CausalLoss, GradientPass, Reduction
from vestige.indexes._content import PartBatches, ShardContent, parts_of
from vestige.indexes._manifest import IndexedComponent
from vestige.models import Component, LoadedModel
from vestige.settings import Scope


class CompressedGradients:
    """Computes compressed gradients of examples; use it as a context, which places and removes the hooks."""

    def __init__(
        self,
        loaded: LoadedModel,
        components: Sequence[Component],
        columns: Sequence[IndexedComponent],
        spec: CompressionSpec,
        seed: int,
        loss: Reduction,
        scope: Scope = "component",
    ) -> None:
        self._device = next(loaded.model.parameters()).device
        shared = scope == "model"
        places = [loaded.model.get_submodule(part.uses[0].module) for part in components]
        devices = [next((one.device for one in place.parameters()), self._device) for place in places]
        compressors = [
            spec.build(part.name, part.shape, seed, device, shared=shared)
            for part, device in zip(components, devices, strict=True)
        ]
        self._sink = CompressingSink(compressors, [part.start for part in columns], max(part.stop for part in columns))
        self._pass = GradientPass(loaded.model, components, CausalLoss(loss))

    def __enter__(self) -> "CompressedGradients":
        self._pass.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass.__exit__(kind, error, trace)

    def rows(self, data: TokenizedData, batches: Sequence[np.ndarray]) -> ShardContent:
        """Return gradients, losses and norms of the batches' examples, in that order, on the CPU in float32."""
        return self._computed(data, PartBatches(sum(map(len, batches)), iter(batches)))

    def parts(self, data: TokenizedData, batches: Sequence[np.ndarray]) -> Iterator[ShardContent]:
        """Yield `rows` of a shard's batches, part by part: memory does not grow with the shard."""
        for part in parts_of(batches, self._sink.width, fewest=this_rank().world_size):
            yield self._computed(data, part)

    def _computed(self, data: TokenizedData, part: PartBatches) -> ShardContent:
        # One array for all from the start: joined at the end, they would be in memory twice.
        gradients, losses = torch.empty(part.rows, self._sink.width), torch.empty(part.rows)
        rows = torch.empty(part.rows, dtype=torch.int64)
        starts = [0]

        def noted() -> Iterator[np.ndarray]:
            for batch in part.batches:
                starts.append(starts[-1] + len(batch))
                rows[starts[-2] : starts[-1]] = torch.as_tensor(np.asarray(batch, dtype=np.int64))
                yield batch

        for number, batch, counts in round_robin(noted()):
            self._sink.begin(len(batch), self._device)
            loss = self._pass.run(make_batch(data, batch).to(self._device), self._sink).float().cpu()
            if counts:
                places = slice(starts[number], starts[number + 1])
                losses[places], gradients[places] = loss, self._sink.gradients.cpu()
        exchange_rows((gradients, losses), np.diff(starts).tolist())
        return ShardContent(gradients, losses, gradients.norm(dim=1), rows)


def lay_out(
    components: Sequence[Component], spec: CompressionSpec, scope: Scope = "component"
) -> tuple[IndexedComponent, ...]:
    """Return the columns of every component: one after another, or the same for all, to be added up there.

    Raises:
        SpecError: Components cannot share the columns of this compression.
    """
    columns, start = [], 0
    for component in components:
        stop = start + spec.size_for(component.shape, shared=scope == "model")
        columns.append(
            IndexedComponent(
                name=component.name, kind=component.uses[0].kind, shape=component.shape, start=start, stop=stop
            )
        )
        start = 0 if scope == "model" else stop
    return tuple(columns)
