"""`vestige study`: an experiment from its data to its table and gates."""

import json
import time

from vestige.errors import UserError
from vestige.files import make_folder, write_durably
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
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, expected a folder. Choose another --out.")
    make_folder(settings.out)
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
    content = json.dumps(report.to_dict(), indent=1) + "\n"
    write_durably(settings.out / _RECORD, [content.encode()])
    return report
