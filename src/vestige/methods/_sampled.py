"""A method's scores of a few rows, with all its measurements of the model made again on these rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress import parse_spec
from vestige.distributed import broadcast_from_rank0
from vestige.indexes import (
    CompressedGradients,
    DataIdentity,
    Index,
    IndexPlan,
    PlanRecord,
    fingerprint_rows,
    plan_index,
    prepare_index,
)
from vestige.launch import run_plan
from vestige.methods._protocol import Job
from vestige.methods._registry import get_method
from vestige.progress import quiet
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder


def sampled_scores(
    job: Job, rows: Int[np.ndarray, "row"], queries: Int[np.ndarray, "query"], *, randomised: bool = False
) -> Float[Tensor, "query row"]:
    """Return the scores of `rows` for `queries` by the job's method, as if these rows were all its training data.

    Index, curvature, projections and query vectors are made again from the model as it is: what was measured on other
    weights would carry their knowledge into the scores. Of several checkpoints the last one counts alone.

    Args:
        job: The question of the run.
        rows: Training rows.
        queries: Rows of the queries.
        randomised: Whether the weights were replaced by noise, so that no file beside them belongs to them.
    """
    folder, settings = partial_folder(job.settings.out) / "check", job.settings
    here = {name: field.get_default() for name, field in LaunchSettings.model_fields.items()}
    small = replace(
        job,
        train=job.train.subset(rows),
        queries=job.queries.subset(queries),
        settings=settings.model_copy(update={**here, "out": folder / "run", "skip_bad": False}),
        left_out=(),
        randomised=randomised,
    )
    method = get_method(settings.method, **settings.options)
    scores = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    with quiet(), _temporary(folder):
        if job.index is not None and not method.needs_exact:
            small = replace(small, index=_indexed(small, job.index, folder / "index"))
        if job.checkpoints:
            last = job.checkpoints[-1]
            stored = None if last.index is None else _indexed(small, last.index, folder / "index")
            small = replace(small, checkpoints=(replace(last, index=stored, weight=1.0),))
        for block in method.blocks(small):
            scores[:, block.rows] = block.scores.double().cpu()
    return scores


def _indexed(job: Job, like: Index, folder: Path) -> Index:
    """Return an index of the job's training data, compressed as `like` is."""
    data, loaded, old = job.train, job.model_for(job.settings.method), like.manifest
    draft = old.model_copy(
        update={
            "data": DataIdentity(name=data.name, fingerprint=data.fingerprint, examples=len(data)),
            "plan": PlanRecord(fewest_shards=1),
        }
    )
    manifest, plan = broadcast_from_rank0(
        lambda: plan_index(folder, draft, data.lengths, lambda start, stop: fingerprint_rows(data, start, stop))
    )

    @contextmanager
    def compute() -> Iterator:
        gradients = CompressedGradients(
            loaded,
            job.components,
            manifest.components,
            parse_spec(manifest.compression.spec),
            manifest.seed,
            manifest.loss,
            manifest.compression.scope,
        )
        with gradients:
            yield lambda batches: gradients.parts(data, batches)

    work = IndexPlan(folder, manifest, plan, data.examples, compute)
    broadcast_from_rank0(lambda: prepare_index(work))
    return run_plan(work, LaunchSettings.model_validate({}), None)


@contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Remove the folder before, where a killed run left it, and after."""
    broadcast_from_rank0(lambda: rmtree(folder, ignore_errors=True))
    try:
        yield
    finally:
        broadcast_from_rank0(lambda: rmtree(folder, ignore_errors=True))
