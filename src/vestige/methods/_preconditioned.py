"""What the methods share that precondition whole query gradients in parameter space."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vestige.curvature import CurvatureData, Labels
from vestige.errors import UserError
from vestige.index import batch_tokens
from vestige.methods._prepared import GradientMethod, Prepared, prepare
from vestige.methods._protocol import Job
from vestige.methods._stores import ExactGradients, Vectors
from vestige.progress import format_bytes
from vestige.runs import ScoreBlock

UNIT = "nats of query loss, times the number of training examples, up to the damping's scale"
ESTIMATES = (
    "How much the query's loss would rise if the example were left out of training (times N), to first order around "
    "these weights"
)
SELF_NUMBERS = 2**26
"""Most numbers of whole gradients alive at once for self-influence."""


@dataclass
class Preconditioned(GradientMethod):
    """Score = `<(C + d I)^-1 grad loss(query), grad loss(example)>`, whole gradients, C as the method has it.

    Stored gradients of an index are compressed and not used; its folder keeps what curvature can be kept.
    """

    @abstractmethod
    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Measure the curvature; what it makes of the queries' gradients."""

    def vectors(self, job: Job) -> Prepared:
        """The queries' gradients, preconditioned.

        Raises:
            UserError: the whole gradients of the queries do not fit into memory.
        """
        check_memory(job)
        return prepare(job, ExactGradients(job), self.inverse(job))

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """`g^T (C + d I)^-1 g` of every training example: each is asked about itself, a few at a time."""
        prepared = self.prepare(job)
        assert isinstance(prepared.store, ExactGradients)
        exact = prepared.store
        step = max(1, SELF_NUMBERS // max(sum(part.size for part in job.components), 1))

        def blocks(piece: int) -> Iterator[ScoreBlock]:
            of_piece = exact.rows_of(piece)
            for start in range(0, len(of_piece), step):
                rows = of_piece[start : start + step]
                gradients = exact.of_queries(job.train.subset(rows))
                pairs = zip(gradients, prepared.transform(gradients), strict=True)
                scores = torch.stack([(one * other).sum(1) for one, other in pairs]).sum(0)
                yield ScoreBlock(torch.from_numpy(rows), scores[None].cpu())

        return blocks


def check_memory(job: Job) -> None:
    """Gradients before and after preconditioning; on a GPU its memory is smaller, and torch says so itself."""
    needed = 2 * 4 * len(job.queries) * sum(part.size for part in job.components)
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{job.settings.method} keeps whole gradients: {format_bytes(needed)} for {len(job.queries)} queries, and "
            f"{format_bytes(available)} of memory are free. Ask fewer queries at once, select fewer --components, or "
            "type --method influence, which compresses them."
        )


def curvature_data(job: Job, method: str, labels: Labels) -> CurvatureData:
    """The training data as a curvature is measured on it."""
    loaded, settings = job.model_for(method), job.settings
    budget = batch_tokens(settings, loaded)
    return CurvatureData(loaded.model, job.components, job.train, budget, settings.loss, labels, settings.seed)


def curvature_folder(job: Job) -> Path | None:
    """Where measured curvature is kept: beside the index, when there is one."""
    return job.index.folder / "curvature" if job.index is not None else None
