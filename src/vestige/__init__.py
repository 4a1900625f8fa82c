"""Vestige: which training examples made a language model behave as it does.

The public names, each imported on first use, so that `import vestige` costs no torch:

    index, precondition, attribute             the commands, as on the command line
    report, view, doctor
    demo                                       an example run that comes with Vestige
    untrac                                     unlearning as attribution
    train                                      a training that attribution and audit read
    audit                                      what a model has memorized, per example
    fix                                        train again without some rows, before and after
    bank                                       models trained on parts of the data
    select                                     which examples to train on
    export                                     an index or a run in formats of other software
    evaluate                                   a function for each evaluation: vestige.evaluate.sketch(...)
    prepare                                    a function for each kind of data to make: vestige.prepare.split(...)
    Index, Scores, Bank, Audit, Fix            what the commands leave on disk, opened again
    VestigeError                               the base of every error raised on purpose

A command that another package brings is a public name, too. What the packages hold besides is imported from them:
`vestige.training.Recorder`, `vestige.measures.psmi` and every other measure, `vestige.banks.bank_of`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige import evaluate as evaluate, prepare as prepare
    from vestige.banks import Bank as Bank
    from vestige.checks import doctor as doctor
    from vestige.curvature import precondition as precondition
    from vestige.errors import VestigeError as VestigeError
    from vestige.fixes import Fix as Fix, demo as demo, fix as fix
    from vestige.indexes import Index as Index, export as export, index as index
    from vestige.measures import audit as audit
    from vestige.methods import attribute as attribute, untrac as untrac
    from vestige.reports import report as report
    from vestige.runs import Audit as Audit, Scores as Scores
    from vestige.selection import select as select
    from vestige.training import bank as bank, train as train
    from vestige.workspace import view as view

__all__ = [
    "Audit",
    "Bank",
    "Fix",
    "Index",
    "Scores",
    "VestigeError",
    "attribute",
    "audit",
    "bank",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "fix",
    "index",
    "precondition",
    "prepare",
    "report",
    "select",
    "train",
    "untrac",
    "view",
]

_TYPES = {
    "Audit": "vestige.runs",
    "Bank": "vestige.banks",
    "Fix": "vestige.fixes",
    "Index": "vestige.indexes",
    "Scores": "vestige.runs",
    "VestigeError": "vestige.errors",
}


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "prepare"):
        return import_module(f"vestige.{name}")
    if name in _TYPES:
        return getattr(import_module(_TYPES[name]), name)
    if not name.startswith("_"):
        from vestige.registry import COMMANDS, import_object

        if name in COMMANDS.names() and (function := COMMANDS.find(name).function):
            return import_object(function)
    raise AttributeError(f"module 'vestige' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
