import subprocess
import sys

import pytest

from vestige.cli._app import GROUPS, VERBS, build_app
from vestige.settings import (
    EVALUATIONS,
    PREPARATIONS,
    AttributeSettings,
    AuditSettings,
    BankSettings,
    CancelSettings,
    DoctorSettings,
    ExportSettings,
    ImportSettings,
    IndexSettings,
    PreconditionSettings,
    ReportSettings,
    SelectSettings,
    StatusSettings,
    StudySettings,
    SweepSettings,
    TrainSettings,
    UntracSettings,
    ViewSettings,
    flag,
)

SETTINGS = {
    "doctor": DoctorSettings,
    "train": TrainSettings,
    "index": IndexSettings,
    "precondition": PreconditionSettings,
    "bank": BankSettings,
    "attribute": AttributeSettings,
    "audit": AuditSettings,
    "untrac": UntracSettings,
    "select": SelectSettings,
    "study": StudySettings,
    "sweep": SweepSettings,
    "report": ReportSettings,
    "view": ViewSettings,
    "status": StatusSettings,
    "cancel": CancelSettings,
    "export": ExportSettings,
    "import": ImportSettings,
}

KINDS = {f"evaluate {kind}": settings for kind, settings in EVALUATIONS.items()} | {
    f"data {kind}": settings for kind, settings in PREPARATIONS.items()
}

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "sklearn", "matplotlib")

QUICK = [
    ["--help"],
    *[[verb, "--help"] for verb in VERBS],
    ["--version"],
    ["indx"],
    ["index", "--modle", "x"],
    ["evaluate", "sketch", "--help"],
    ["data", "paraphrase", "--help"],
]

NOTHING_HEAVY = f"""
import sys
from vestige.cli import main
for words in {QUICK!r}:
    try:
        main(words)
    except SystemExit:
        pass
    loaded = set({HEAVY!r}) & set(sys.modules)
    assert not loaded, (words, loaded)
"""


def test_help_and_mistakes_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", NOTHING_HEAVY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_vestige_imports_nothing_heavy():
    code = f"import sys, vestige; assert not set({HEAVY!r}) & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_verb_is_listed_with_its_outcome(vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = vestige("--help")
    assert shown.status == 0
    for verb, outcome in VERBS.items():
        assert f"{verb} " in shown.out
        assert outcome in shown.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_begins_with_the_line_of_the_list(verb, vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert VERBS[verb] in vestige(verb, "--help").out


@pytest.mark.parametrize("verb", SETTINGS | KINDS)
def test_help_of_a_verb_names_every_setting_with_its_meaning(verb, vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = vestige(*verb.split(), "--help").out
    for name, field in (SETTINGS | KINDS)[verb].model_fields.items():
        assert flag(name) in text
        assert field.description in text
    assert "--config" in text


def test_every_verb_has_settings_here():
    assert list(SETTINGS) == [verb for verb in VERBS if verb not in GROUPS]
    assert {name for name in build_app() if not name.startswith("-")} == set(VERBS)


def test_version(vestige):
    from importlib.metadata import version

    assert vestige("--version") == (0, version("vestige") + "\n", "")
