"""Packages import their names one by one, when they are first used."""

import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest

import vestige

PACKAGES = [module.name for module in iter_modules(vestige.__path__) if module.ispkg]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_of_a_package_is_there_and_listed(name):
    package = import_module(f"vestige.{name}")
    for each in package.__all__:
        assert getattr(package, each) is not None
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_none_of_its_modules_by_itself(name):
    code = f"import sys, vestige.{name}; print(*[m for m in sys.modules if m.startswith('vestige.{name}._')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match=r"module 'vestige\.data' has no attribute 'nonsense'"):
        _ = import_module("vestige.data").nonsense
