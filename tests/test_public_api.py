import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import vestige
from vestige.registry import COMMANDS, import_object

PUBLIC = [
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

FUNCTIONS = [command.name for command in COMMANDS if command.function]


def test_the_public_names_are_these():
    assert vestige.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(vestige))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name):
    public = getattr(vestige, name)
    assert callable(public) or inspect.ismodule(public)
    assert public.__doc__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_command_takes_in_python_what_it_takes_on_the_command_line(name):
    command = COMMANDS.find(name)
    parameters = inspect.signature(import_object(command.function)).parameters
    fields = command.settings.model_fields
    assert set(parameters) == set(fields)
    for key, field in fields.items():
        default = inspect.Parameter.empty if field.is_required() else field.default
        assert parameters[key].default == default, key


@pytest.mark.slow
def test_a_command_stays_a_function_whatever_was_imported():
    code = "import pkgutil, importlib, vestige\n"
    code += "for one in pkgutil.iter_modules(vestige.__path__):\n    importlib.import_module(f'vestige.{one.name}')\n"
    code += "packages = [name for name in vestige.__all__ if not callable(getattr(vestige, name))]\n"
    code += "assert packages == ['evaluate', 'prepare'], packages"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="it has Audit, Bank, Fix, Index, Scores"):
        _ = vestige.attribut  # pyright: ignore


def test_the_fields_of_settings_have_types_and_descriptions():
    for settings in [command.settings for command in COMMANDS]:
        hints = get_type_hints(settings)
        for name, field in settings.model_fields.items():
            assert name in hints
            assert field.description, (settings, name)
            assert field.description.endswith("."), (settings, name)


def test_packages_use_only_public_names_of_each_other():
    root = Path(vestige.__file__).parent
    for path in root.rglob("*.py"):
        foreign = set(re.findall(r"from vestige\.(\w+)\._\w+ import", path.read_text()))
        assert foreign <= {path.relative_to(root).parts[0]}, path
