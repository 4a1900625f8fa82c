"""Methods by name: the built-in ones, and those that other packages announce."""

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast

from vestige.errors import SpecError, VestigeError
from vestige.methods._options import parsed_options
from vestige.methods._protocol import Method

ENTRY_POINTS = "vestige.methods"

MethodClass = TypeVar("MethodClass", bound=type)

_methods: dict[str, type] = {}


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that makes a method known as `name`.

    Raises:
        VestigeError: another class has that name.
    """

    def register(found: MethodClass) -> MethodClass:
        known = _methods.setdefault(name, found)
        if (known.__module__, known.__qualname__) != (found.__module__, found.__qualname__):
            raise VestigeError(f"Two methods are called {name!r}: {known.__module__} and {found.__module__}.")
        found.name = name
        return found

    return register


def method_names() -> list[str]:
    """Return the name of every method that `get_method` finds, sorted; nothing of other packages is imported."""
    return sorted({*_methods, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def get_method(name: str, **options: Any) -> Method:
    """Return the method called `name`, made with its options.

    Raises:
        SpecError: there is no such method, it has no such option, or the option's value is of another type.
    """
    found = method_class(name)
    return cast(Method, found(**parsed_options(name, found, options)))


def method_class(name: str) -> type:
    """Return the class of the method called `name`.

    Raises:
        SpecError: there is no such method.
    """
    found = _methods.get(name) or _from_other_packages(name)
    if found is None:
        close = difflib.get_close_matches(name, method_names(), n=1, cutoff=0.5)
        hint = f"Did you mean --method {close[0]}? " if close else ""
        raise SpecError(f"There is no method {name!r}. {hint}Known methods: {', '.join(method_names())}.")
    return found


def _from_other_packages(name: str) -> type | None:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return method(name)(point.load())
    return None
