import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import vestige
from vestige.settings import (
    EVALUATIONS,
    PREPARATIONS,
    AttributeSettings,
    AuditSettings,
    BankSettings,
    DoctorSettings,
    ExportSettings,
    ImportSettings,
    IndexSettings,
    PreconditionSettings,
    ReportSettings,
    SelectSettings,
    StudySettings,
    SweepSettings,
    TrainSettings,
    UntracSettings,
    ViewSettings,
)

PUBLIC = [
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
    "import_published",
    "index",
    "precondition",
    "prepare",
    "report",
    "select",
    "study",
    "sweep",
    "train",
    "untrac",
    "view",
]

VERBS = {
    "attribute": AttributeSettings,
    "audit": AuditSettings,
    "bank": BankSettings,
    "doctor": DoctorSettings,
    "export": ExportSettings,
    "import_published": ImportSettings,
    "index": IndexSettings,
    "precondition": PreconditionSettings,
    "report": ReportSettings,
    "select": SelectSettings,
    "study": StudySettings,
    "sweep": SweepSettings,
    "train": TrainSettings,
    "untrac": UntracSettings,
    "view": ViewSettings,
}


def test_the_public_names_are_these():
    assert vestige.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(vestige))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name):
    public = getattr(vestige, name)
    assert callable(public) or inspect.ismodule(public)
    assert public.__doc__


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_in_python_what_it_takes_on_the_command_line(name):
    parameters = inspect.signature(getattr(vestige, name)).parameters
    fields = VERBS[name].model_fields
    assert set(parameters) == set(fields)
    for key, field in fields.items():
        default = inspect.Parameter.empty if field.is_required() else field.default
        assert parameters[key].default == default, key


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_an_evaluation_takes_in_python_what_it_takes_on_the_command_line(kind):
    parameters = inspect.signature(getattr(vestige.evaluate, kind.replace("-", "_"))).parameters
    assert set(parameters) == set(EVALUATIONS[kind].model_fields)


@pytest.mark.parametrize("kind", PREPARATIONS)
def test_data_is_made_in_python_with_what_the_command_line_takes(kind):
    parameters = inspect.signature(getattr(vestige.prepare, kind.replace("-", "_"))).parameters
    assert set(parameters) == set(PREPARATIONS[kind].model_fields)


def test_a_verb_stays_callable_after_its_room_was_imported():
    code = "from vestige.report import view\nimport vestige\nvestige.report('nowhere')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "vestige.errors.UserError: nowhere" in done.stderr


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="it has Audit, Bank, Index, Scores"):
        _ = vestige.attribut  # pyright: ignore


def test_the_fields_of_settings_have_types_and_descriptions():
    for settings in [*VERBS.values(), *EVALUATIONS.values(), *PREPARATIONS.values()]:
        hints = get_type_hints(settings)
        for name, field in settings.model_fields.items():
            assert name in hints
            assert field.description, (settings, name)
            assert field.description.endswith("."), (settings, name)


def test_rooms_use_only_public_names_of_each_other():
    root = Path(vestige.__file__).parent
    for path in root.rglob("*.py"):
        foreign = set(re.findall(r"from vestige\.(\w+)\._\w+ import", path.read_text()))
        assert foreign <= {path.relative_to(root).parts[0]}, path
