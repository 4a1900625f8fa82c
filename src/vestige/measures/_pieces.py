"""What decides the pieces of an audit, where they are until the run is written, and how they are run."""

import hashlib
import json
from importlib.metadata import version
from typing import Any

from vestige.launch import phase, run_plan, worker_command
from vestige.measures._job import AuditJob
from vestige.settings import LaunchSettings

FORMAT = 2
"""Raised when a piece of the same settings changes its meaning."""
_OF_THE_OUTPUT = frozenset(
    [
        "out",
        "overwrite",
        "bank",
        "bank_subset",
        "bank_value",
        "flag",
        "memorized_at",
        "choose_layer",
        "measures",
        "canaries",
        "canary_references",
    ]
)
"""Settings that decide no pass through a model."""


def ran(plan: Any) -> Any:
    """Run the plan where the settings choose, and return its result."""
    settings = plan.job.settings
    with phase(plan.name, plan.unit) as done:
        done.extend(round(plan.weight(piece)) for piece in range(plan.pieces) if not plan.is_done(piece))
        return run_plan(plan, settings, worker_command(settings, "audit"))


def digest(job: AuditJob, more: Any) -> str:
    """Return the sha256 of everything that decides the measurements."""
    ignored = _OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    models = {"pass", "generation", "states"}
    looked = [each.name for each in job.measures if each.stage in models or "reference model" in each.needs]
    subjects = [each.fingerprint for each in job.subjects]
    choices = hashlib.sha256(
        job.choices.place.tobytes() + job.choices.tokens.tobytes() + job.classes.tobytes()
    ).hexdigest()
    parts = (
        FORMAT,
        version("vestige"),
        recorded,
        looked,
        subjects,
        job.reference_fingerprint,
        job.data.fingerprint,
        choices,
        job.layers,
        more,
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
