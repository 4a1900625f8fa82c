"""Methods by name: the built-in ones, and those that other packages announce."""

from collections.abc import Callable
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, TypeVar

from vestige.methods._options import options_of, parsed_options
from vestige.methods._protocol import Method
from vestige.registry import Registry
from vestige.terminal import lines_of_facts

if TYPE_CHECKING:
    from rich.table import Table

MethodClass = TypeVar("MethodClass", bound=type[Method])

METHODS: Registry[type[Method]] = Registry("vestige.methods", "method", Method)


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Make a class known as the method `name`.

    Raises:
        SpecError: another class has that name.
    """

    def register(found: MethodClass) -> MethodClass:
        METHODS.add(name, found)
        found.name = name
        return found

    return register


def get_method(name: str, **options: Any) -> Method:
    """Return the method called `name`, made with its options.

    Raises:
        SpecError: there is no such method, it has no such option, or the option's value is of another type.
    """
    found = METHODS.find(name)
    return found(**parsed_options(name, found, options))


def method_table() -> "Table":
    """Return a line for each method: its name, what it estimates, and what that costs."""
    from rich.table import Table

    table = Table("method", "estimates", "costs")
    for name in METHODS.names():
        meaning = get_method(name).meaning
        table.add_row(name, meaning.estimates, meaning.cost)
    return table


def describe_method(name: str) -> str:
    """Return what a method computes, what its scores mean, what it costs, when not to believe it, and its options.

    Raises:
        SpecError: there is no such method.
    """
    found = METHODS.find(name)
    lines = lines_of_facts(get_method(name).meaning.to_dict())
    options = [f"  {one.name}={one.shown_default}  ({one.values}) {one.meaning}" for one in options_of(found)]
    taken = ["Options, with their defaults (--option name=value):", *options] if options else ["No options of its own."]
    return "\n".join([f"{name}: {cleandoc(found.__doc__ or '')}", "", *lines, "", *taken])
