"""Work of an audit in pieces: what decides them, where they are until the run is written, and how they are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from vestige.jobs import PieceFiles, Tensors, run_with_rate, step_done, tensor_pieces, worker_command
from vestige.measures._job import AuditJob
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

FORMAT = 2
"""Raised when a piece of the same settings changes its meaning."""
_OF_THE_OUTPUT = frozenset(
    [
        *("out", "overwrite", "measures", "choose_layer", "flag", "pair_field", "tries", "chance"),
        *("bank", "bank_subset", "bank_value", "memorized_at", "canaries", "canary_references"),
        *("against", "against_scores", "against_span", "against_near"),
    ]
)
"""Settings that decide no pass through a model."""


def piece_files(job: AuditJob, name: str, more: Any) -> PieceFiles:
    """Return the files of one kind of pieces, which count as done if everything that decides them is the same."""
    ignored = _OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    models = {"pass", "generation", "states"}
    measured = [each.name for each in job.measures if each.stage in models or "reference model" in each.needs]
    choices = job.choices.position.tobytes() + job.choices.tokens.tobytes() + job.classes.tobytes()
    parts = (
        FORMAT,
        version("vestige"),
        recorded,
        measured,
        [each.fingerprint for each in job.subjects],
        job.reference_fingerprint,
        job.data.fingerprint,
        hashlib.sha256(choices).hexdigest(),
        job.layers,
        more,
    )
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return PieceFiles(partial_folder(job.settings.out) / name, digest)


def run_audit_pieces(
    job: AuditJob,
    name: str,
    unit: str,
    files: PieceFiles,
    numbers: range,
    compute: Callable[[int], Tensors],
    count: Callable[[int], int] | None = None,
    is_complete: Callable[[int], bool] = lambda number: True,  # noqa: ARG005
) -> list[Tensors]:
    """Return the content of every file, computed where the settings choose; a killed call continues.

    Args:
        job: The audit.
        name: Of the work.
        unit: Of what is counted.
        files: From `piece_files`.
        numbers: Of the files, one for each piece.
        compute: From the number of a file to its content.
        count: Units of work behind a file, which `compute` reports as it does them; None: one for each file.
        is_complete: Whether what belongs to a file that is there is there too.
    """

    def compute_one(number: int) -> Tensors:
        found = compute(number)
        step_done(1)
        return found

    files.forget_damaged(numbers)
    weights = [1 if count is None else count(number) for number in numbers]
    opened = nullcontext(compute_one if count is None else compute)
    pieces = tensor_pieces(name, files, weights, lambda: opened, list[Tensors], unit=unit, numbers=numbers)

    def is_done(piece: int) -> bool:
        return pieces.is_done(piece) and is_complete(numbers[piece])

    return run_with_rate(replace(pieces, is_done=is_done), job.settings, worker_command(job.settings, "audit"))
