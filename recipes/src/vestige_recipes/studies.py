"""`vestige study`: an experiment from its data to its table and gates."""

import json
import time
from importlib import import_module
from typing import Any

from vestige.files import make_folder, write_durably
from vestige.folders import require_no_others
from vestige.registry import command
from vestige.settings import verb
from vestige.terminal import show
from vestige_recipes.common.registry import StudyReport, StudySettings, find_study

EXPERIMENTS = (
    "digits.run",
    "domains.run",
    "format_traps.run",
    "memorization.canaries",
    "memorization.early",
    "memorization.facts",
    "memorization.planted",
    "select_or_project.run",
    "selection_domains.run",
    "text_lds.run",
    "untrac_miniature.run",
)
"""Modules that register studies when they are imported, which is late: they need torch."""

_RECORD = "study.json"


@verb(StudySettings)
def study(settings: StudySettings) -> StudyReport:
    """Replay an experiment; return its outcome beside what was expected, which is also written to `study.json`.

    Parts that are finished are kept.

    Raises:
        SpecError: There is no such study, or not in this size.
        UserError: The folder holds something else.
    """
    from vestige.launch import is_worker

    for name in EXPERIMENTS:
        import_module(f"vestige_recipes.{name}")
    run = find_study(settings)
    if not is_worker() and not (settings.out / _RECORD).exists():
        require_no_others(settings.out, ())
        make_folder(settings.out)
        _write_record(settings, {"study": settings.name})
    started = time.perf_counter()
    outcome = run(settings)
    report = StudyReport(
        settings.name,
        settings.record(),
        tuple(outcome.columns),
        tuple(map(tuple, outcome.rows)),
        tuple(outcome.gates),
        dict(outcome.details),
        time.perf_counter() - started,
    )
    _write_record(settings, report.to_dict())
    return report


def _write_record(settings: StudySettings, content: dict[str, Any]) -> None:
    write_durably(settings.out / _RECORD, [(json.dumps(content, indent=1) + "\n").encode()])


@command("study", StudySettings, function="vestige_recipes.studies:study", order=110, sweepable=True)
def study_command(settings: StudySettings) -> None:
    """Replay a published experiment.

    From made or public data to a table, beside what was expected of it; parts that are finished are not done again.
    """
    show(study(**settings.arguments()))
