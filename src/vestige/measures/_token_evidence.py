"""Evidence token by token, of the examples that stand out: where in a text it lies that a model knows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int

from vestige.data import make_batch, plan_batches
from vestige.measures._evidence import Evidence
from vestige.measures._forward import score_targets
from vestige.measures._job import AuditJob
from vestige.models import batch_sharing
from vestige.runs import PREFERRED, low_stands_out, token_texts

SHOWN = 25
"""Examples: as many as a list of the page has."""


TokenEvidence = tuple[pa.Table | None, str | None]
"""Row, position and token, its log-probability (nats), the same standardised over the vocabulary, and the one under
other weights; and the name of these: the first checkpoint, or the reference model if it has the same tokens."""


def measure_tokens(evidence: Evidence) -> TokenEvidence:
    """Measure each token of the examples that lead the list of the strongest evidence; none without a tokenizer."""
    job = evidence.job
    rows = _choose_rows(evidence)
    if job.tokenizer is None or not len(rows):
        return None, None
    source, name = _find_other(job)
    # No pieces: a process that loads the model for these few examples would take longer than they do.
    found = _score_rows(job, job.main.source, rows)
    if source is not None:
        found["against"] = _score_rows(job, source, rows)["log_probability"]
    return _make_table(job, rows, {key: each.numpy() for key, each in found.items()}), name


def _choose_rows(evidence: Evidence) -> Int[np.ndarray, "row"]:
    """Return the rows that `Audit.top` will list, without a measure named."""
    own, measures = evidence.job.own, {each.name: each for each in evidence.job.measures if each.of == "example"}
    for name in (*(name for name in PREFERRED if name in measures), *measures):
        column = evidence.values(name)
        if column is not None and not np.isnan(column).all():
            rows = np.flatnonzero(own & ~np.isnan(column))
            order = column[rows] if low_stands_out(measures[name].says) else -column[rows]
            return rows[np.lexsort((-evidence.job.data.target_counts[rows], order))][:SHOWN]
    return np.zeros(0, dtype=np.int64)


def _find_other(job: AuditJob) -> tuple[Any, str | None]:
    """Return the weights that the model is compared with, and their name."""
    if len(job.subjects) > 1:
        return job.subjects[0].source, job.subjects[0].name
    reference = job.settings.reference_model
    if reference is None:
        return None, None
    tokenizer: Any = job.models.of(reference).tokenizer
    own: Any = job.tokenizer
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        return None, None
    return reference, str(job.settings.record()["reference_model"])


@torch.no_grad()
def _score_rows(job: AuditJob, source: Any, rows: Int[np.ndarray, "row"]) -> dict[str, torch.Tensor]:
    """Return scores of every target token, [row token]; position t holds those of token t."""
    model = job.models.of(source).model
    width = int(max(job.data.lengths[rows]))
    found = {name: torch.full((len(rows), width), torch.nan, dtype=torch.float64) for name in ("log_probability", "z")}
    for chosen in plan_batches(job.data.lengths[rows], job.token_budget, sharing=batch_sharing(model)):
        batch = make_batch(job.data, rows[chosen]).to(next(model.parameters()).device)
        output: Any = model(input_ids=batch.input_ids, use_cache=False)
        scores = score_targets(output.logits[:, :-1], batch.labels[:, 1:])
        for values, whole in zip(scores[:2], found.values(), strict=True):
            known = torch.where(scores.wanted, values, torch.nan).cpu()
            whole[torch.from_numpy(chosen), 1 : known.shape[1] + 1] = known
    return found


def _make_table(job: AuditJob, rows: Int[np.ndarray, "row"], found: dict[str, np.ndarray]) -> pa.Table:
    texts = [job.data.input_ids[row] for row in rows]
    lengths = list(map(len, texts))
    inside = np.arange(found["z"].shape[1]) < np.array(lengths)[:, None]
    columns = {name: pa.array(values[inside], from_pandas=True) for name, values in found.items()}
    return pa.table(
        {
            "row": np.repeat(rows, lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
            "token": pa.array([token for ids in texts for token in token_texts(ids, job.tokenizer)], pa.string()),
            "log_probability": columns["log_probability"],
            "standardised": columns["z"],
            "against": columns.get("against", pa.nulls(sum(lengths), pa.float64())),
        }
    )
