import subprocess
import sys

import pytest

from vestige.registry import COMMANDS
from vestige.settings import flag

NAMES = COMMANDS.names()
VERBS = sorted({name.split()[0] for name in NAMES})
GROUPS = sorted({name.split()[0] for name in NAMES if " " in name})

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


def test_every_command_is_listed_with_its_summary(vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = {"": vestige("--help").out, **{group: vestige(group, "--help").out for group in GROUPS}}
    for each in COMMANDS:
        group, _, last = each.name.rpartition(" ")
        assert f"{last} " in listed[group]
        assert each.summary in listed[group]


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_begins_with_its_summary(name, vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert COMMANDS.find(name).summary in vestige(*name.split(), "--help").out


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_names_every_setting_with_its_meaning(name, vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = vestige(*name.split(), "--help-all").out
    for setting, field in COMMANDS.find(name).settings.model_fields.items():
        assert flag(setting) in text
        assert field.description in text
    for shared in ("--config", "--quiet", "--verbose"):
        assert shared in text


@pytest.mark.parametrize("name", NAMES)
def test_the_first_level_of_help_fits_one_screen_and_marks_what_is_required(name, vestige, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command, text = COMMANDS.find(name), vestige(*name.split(), "--help").out
    assert len(text.splitlines()) <= 40
    assert f"vestige {name} --help-all" in text
    for setting, field in command.settings.model_fields.items():
        marked = any(line.split()[:2] == ["*", flag(setting)] for line in text.splitlines())
        assert marked == field.is_required(), setting
    for example in command.examples:
        assert f"  {example}\n" in text


@pytest.mark.parametrize("words", [["index", "--version"], ["data", "split", "--version"]])
def test_every_command_says_the_version(words, vestige):
    assert vestige(*words) == vestige("--version")


def test_version(vestige):
    from importlib.metadata import version

    assert vestige("--version") == (0, version("vestige") + "\n", "")
