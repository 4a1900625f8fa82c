"""`vestige study`: an experiment from its data to its table and gates."""

import json
import time
from typing import Any

from vestige.files import make_folder, write_durably
from vestige.folders import require_no_others
from vestige.launch import is_worker
from vestige.settings import StudySettings, verb

# Importing a study's module is what registers it.
from vestige.studies import (  # noqa: F401
    _digits,
    _domains,
    _format_traps,
    _memorization_canaries,
    _memorization_early,
    _memorization_facts,
    _memorization_planted,
    _select_or_project,
    _selection_domains,
    _text_lds,
    _untrac_miniature,
)
from vestige.studies._registry import StudyReport, find_study

_RECORD = "study.json"


@verb(StudySettings)
def study(settings: StudySettings) -> StudyReport:
    """The outcome of an experiment beside what was expected of it, in `study.json`; parts that are finished are kept.

    Raises:
        SpecError: There is no such study, or not in this size.
        UserError: The folder holds something else.
    """
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
