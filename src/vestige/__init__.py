"""Vestige: which training examples made a language model behave as it does.

The public names, each imported on first use, so that `import vestige` costs no torch:

    index, precondition, attribute             the commands, as on the command line
    report, view, doctor
    untrac                                     unlearning as attribution
    train                                      a training that attribution and audit read; train.Recorder for your own
    audit                                      what a model has memorized, per example; audit.psmi and all measures
    bank                                       models trained on parts of the data; bank.bank_of for any model
    select                                     which examples to train on
    export                                     an index or a run in formats of other software
    evaluate                                   a function for each evaluation: vestige.evaluate.sketch(...)
    prepare                                    a function for each kind of data to make: vestige.prepare.split(...)
    Index, Scores, Bank, Audit                 what the commands leave on disk, opened again
    VestigeError                               the base of every error raised on purpose
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige import evaluate as evaluate
    from vestige import prepare as prepare
    from vestige.audit import audit as audit
    from vestige.bank import Bank as Bank
    from vestige.bank import bank as bank
    from vestige.curvature import precondition as precondition
    from vestige.doctor import doctor as doctor
    from vestige.errors import VestigeError as VestigeError
    from vestige.index import Index as Index
    from vestige.index import export as export
    from vestige.index import index as index
    from vestige.methods import attribute as attribute
    from vestige.report import report as report
    from vestige.report import view as view
    from vestige.runs import Audit as Audit
    from vestige.runs import Scores as Scores
    from vestige.select import select as select
    from vestige.train import train as train
    from vestige.unlearn import untrac as untrac

__all__ = [
    "Audit",
    "Bank",
    "Index",
    "Scores",
    "VestigeError",
    "attribute",
    "audit",
    "bank",
    "doctor",
    "evaluate",
    "export",
    "index",
    "precondition",
    "prepare",
    "report",
    "select",
    "train",
    "untrac",
    "view",
]

_HOMES = {
    "Audit": "vestige.runs",
    "Bank": "vestige.bank",
    "Index": "vestige.index",
    "Scores": "vestige.runs",
    "VestigeError": "vestige.errors",
    "attribute": "vestige.methods",
    "audit": "vestige.audit",
    "bank": "vestige.bank",
    "doctor": "vestige.doctor",
    "export": "vestige.index",
    "index": "vestige.index",
    "precondition": "vestige.curvature",
    "report": "vestige.report",
    "select": "vestige.select",
    "train": "vestige.train",
    "untrac": "vestige.unlearn",
    "view": "vestige.report",
}

_ROOMS = ("evaluate", "prepare")
"""Public names that are packages: what they hold is called, not they."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"vestige.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'vestige' has no attribute {name!r}; it has {', '.join(__all__)}")
    package = import_module(_HOMES[name])
    # Importing the package `vestige.index` has bound that name by now: to the package, which is callable.
    return globals()[name] if name in globals() else getattr(package, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _VerbRoom(ModuleType):
    """A package that answers to the command of its name: `vestige.index(...)` beside `vestige.index.Index`."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._verb(*arguments, **settings)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self._verb)

    @property
    def _verb(self) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds an imported submodule in its package, whatever the package calls by that name.
        if isinstance(value, ModuleType) and name in _HOMES:
            value.__class__ = _VerbRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
