"""What the methods share that precondition whole query gradients in parameter space."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from vestige.curvature import CurvatureData, Labels, Work
from vestige.data import TokenizedData
from vestige.errors import UserError
from vestige.indexes import batch_tokens
from vestige.launch import worker_command
from vestige.methods._exact_gradients import ExactGradients
from vestige.methods._prepared import GradientMethod, Prepared
from vestige.methods._protocol import Job
from vestige.methods._stores import Vectors
from vestige.progress import format_bytes
from vestige.runs import ScoreBlock
from vestige.storage import partial_folder

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
        """Measure the curvature; return the map from the queries' gradients to the preconditioned ones."""

    def vectors(self, job: Job) -> Prepared:
        """Return the queries' gradients, preconditioned.

        Raises:
            UserError: the whole gradients of the queries do not fit into memory.
        """
        check_memory(job)
        store, inverse = ExactGradients(job), self.inverse(job)
        gradients = self.once("queries", lambda: store.of_queries(job.queries))
        return Prepared(job, store, inverse(gradients), inverse)

    def self_blocks(self, job: Job) -> Callable[[int], Iterator[ScoreBlock]]:
        """Return the map from a piece to `g^T (C + d I)^-1 g` of its training examples, a few at a time."""
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


def check_memory(job: Job, dampings: int = 1) -> None:
    """Raise unless gradients before and after preconditioning fit into memory.

    On a GPU its memory is smaller, and torch reports that itself.

    Raises:
        UserError: They do not fit.
    """
    needed = (1 + dampings) * 4 * len(job.queries) * sum(part.size for part in job.components)
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{job.settings.method} keeps whole gradients: {format_bytes(needed)} for {len(job.queries)} queries, and "
            f"{format_bytes(available)} of memory are free. Ask fewer queries at once, select fewer --components, or "
            "type --method influence, which compresses them."
        )


def curvature_data(job: Job, method: str, labels: Labels) -> CurvatureData:
    """Return the training data as a curvature is measured on it: without the examples that an index leaves out."""
    loaded, settings = job.model_for(method), job.settings
    budget, data = batch_tokens(settings, loaded), scored_data(job)
    return CurvatureData(loaded.model, job.components, data, budget, settings.loss, labels, settings.seed)


def scored_data(job: Job) -> TokenizedData:
    """Return the training examples but for those that are left out."""
    if not job.skipped:
        return job.train
    return job.train.subset(np.setdiff1d(np.arange(len(job.train)), job.skipped))


def curvature_folder(job: Job) -> Path | None:
    """Return the folder of measured curvature: beside the index, else beside the run until that is written.

    None where the training data is a single piece of work without an index: then nothing is kept.
    """
    if job.index is not None:
        return job.index.folder / "curvature"
    return partial_folder(job.settings.out) / "curvature" if ExactGradients(job).pieces > 1 else None


def curvature_work(job: Job) -> Work:
    """Return where the passes for the curvature run: like everything else of the run."""
    return Work(job.settings, worker_command(job.settings, "attribute"))
