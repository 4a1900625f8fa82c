"""`vestige study`: an experiment from its data to its table and gates."""

import json
import time
from typing import Any

from vestige.errors import SpecError
from vestige.registry import command
from vestige.settings import with_settings
from vestige.storage import make_folder, require_no_others, write_durably
from vestige.terminal import show
from vestige_recipes.common.registry import STUDIES, StudyReport, StudySettings

_RECORD = "study.json"


@with_settings(StudySettings)
def study(settings: StudySettings) -> StudyReport:
    """Replay an experiment; return its outcome beside what was expected, which is also written to `study.json`.

    Parts that are finished are kept.

    Raises:
        SpecError: There is no such study, or not in this size.
        UserError: The folder holds something else.
    """
    from vestige.jobs import is_worker

    found = STUDIES.find(settings.name)
    if settings.size not in found.sizes:
        raise SpecError(f"The study {settings.name} has no size {settings.size}, but: {', '.join(found.sizes)}.")
    if not is_worker() and not (settings.out / _RECORD).exists():
        require_no_others(settings.out, ())
        make_folder(settings.out)
        _write_record(settings, {"study": settings.name})
    started = time.perf_counter()
    outcome = found.run(settings)
    report = StudyReport(
        settings.name,
        settings.record(),
        tuple(outcome.columns),
        tuple(map(tuple, outcome.rows)),
        # A handful of steps shows that everything runs, and nothing else.
        () if settings.size == "tiny" else tuple(outcome.gates),
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
    show(study_command.call(settings))
