"""The registry of what packages bring, by their entry points."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vestige import registry
from vestige.errors import SpecError
from vestige.registry import COMMANDS, Registry, forget_entry_points


@pytest.fixture
def announced(monkeypatch):
    """Announce entry points, given as names and values, in place of those of installed packages."""

    def announce(*pairs):
        points = [EntryPoint(name, value, "toys") for name, value in pairs]
        monkeypatch.setattr(registry, "entry_points", lambda: EntryPoints(points))
        forget_entry_points()
        return Registry("toys", "toy", float)

    yield announce
    forget_entry_points()


def test_an_object_is_found_by_its_name(announced):
    toys = announced(("b", "math:pi"), ("a", "math:e"))
    assert toys.names() == ["a", "b"]
    assert [round(each, 2) for each in toys] == [2.72, 3.14]


def test_an_unknown_name_leads_to_the_nearest(announced):
    with pytest.raises(SpecError, match=r"There is no toy 'bal'. Did you mean 'ball'\? There are: ball, cube\."):
        announced(("ball", "math:pi"), ("cube", "math:e")).find("bal")


def test_two_packages_with_one_name_are_refused_and_the_same_twice_is_not(announced):
    assert announced(("a", "math:e"), ("a", "math:e")).names() == ["a"]
    with pytest.raises(SpecError, match="Two packages bring the toy 'a': math:e and math:pi"):
        announced(("a", "math:e"), ("a", "math:pi")).names()


@pytest.mark.parametrize("value", ["no_such_module_here:x", "math:no_such_name"])
def test_what_cannot_be_imported_is_named_with_its_package(announced, value):
    with pytest.raises(SpecError, match=r"The toy 'a' of .* cannot be imported: .* Update or uninstall it"):
        announced(("a", value)).find("a")


def test_an_object_of_another_kind_is_refused(announced):
    with pytest.raises(SpecError, match=r"The toy 'a' of .* is no builtins.float. Update or uninstall it"):
        announced(("a", "math:floor")).find("a")


def test_objects_of_this_process_are_found_before_those_of_packages(announced):
    toys = announced(("a", "math:e"))
    toys.add("b", 2.0)
    toys.add("b", 2.0)
    assert toys.names() == ["a", "b"]
    assert toys.find("b") == 2.0
    with pytest.raises(SpecError, match="Two objects are called 'b'"):
        toys.add("b", 3.0)


def test_every_built_in_command_is_announced_under_its_own_name():
    assert {"index", "attribute", "data split", "evaluate lds"} <= set(COMMANDS.names())
    for name in COMMANDS.names():
        assert COMMANDS.find(name).name == name
