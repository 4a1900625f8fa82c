"""From a function of complete settings to the Python verb: its arguments are the settings, by name."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vestige.distributed import FSDP, process_group
from vestige.settings._base import Settings
from vestige.settings._output import writing

Result = TypeVar("Result")


def verb(
    settings: type[Settings], command: str | None = None
) -> Callable[[Callable[[Any], Result]], Callable[..., Result]]:
    """Give a function of `settings` the settings' own fields as keyword arguments, with their defaults and checks.

    So a verb has the same argument names and defaults in Python, on the command line and in a config file.

    Args:
        settings: What it takes.
        command: What follows `vestige` on the command line; not given: the name of the function.
    """

    def decorate(function: Callable[[Any], Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def called(*words: Any, **arguments: Any) -> Result:
            names = dict(zip(settings.positional, words, strict=False))
            if len(words) > len(settings.positional):
                raise TypeError(f"{function.__name__}() takes its settings by name, such as {_first(settings)}=...")
            given = settings(**(names | arguments))
            shared = process_group(getattr(given, "device", None) == FSDP)
            with shared, writing(given, command or _words(function)), _modules_as_they_were(given):
                return function(given)

        vars(called)["__signature__"] = _signature(settings, function)
        return called

    return decorate


def _words(function: Callable[..., Any]) -> str:
    """Return the words that are typed after `vestige` for the function."""
    package = function.__module__.partition(".")[2].split(".")[0]
    group = {"evaluate": "evaluate ", "prepare": "data "}.get(package, "")
    return group + function.__name__.replace("_", "-")


@contextmanager
def _modules_as_they_were(settings: Settings) -> Iterator[None]:
    """Live modules among the settings keep `requires_grad` and the mode of every submodule, also after an error."""
    # A module cannot be among them unless torch was imported, which the command line does late.
    torch = sys.modules.get("torch")
    values = list(vars(settings).values()) if torch is not None else []
    values += [each for value in values if isinstance(value, list | tuple) for each in value]
    modules = [value for value in values if torch is not None and isinstance(value, torch.nn.Module)]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for part, training in modes:
            part.training = training


def _first(settings: type[Settings]) -> str:
    return next(iter(settings.model_fields))


def _signature(settings: type[Settings], function: Callable[..., Any]) -> inspect.Signature:
    parameters = []
    for name, field in settings.model_fields.items():
        kind = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name in settings.positional else inspect.Parameter.KEYWORD_ONLY
        )
        default = inspect.Parameter.empty if field.is_required() else field.default
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=field.annotation))
    parameters.sort(key=lambda parameter: (parameter.kind, parameter.default is not inspect.Parameter.empty))
    return inspect.Signature(parameters, return_annotation=inspect.signature(function).return_annotation)
