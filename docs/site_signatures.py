"""An extension of Griffe: functions of commands with the arguments that their decorator gives them."""

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

from vestige import settings

_DECORATOR = re.compile(r"with_settings\((\w+)")
_ARGUMENT = re.compile(r"^    (\w+) \((.*?), (?:required|default .*?)\):\s+", re.MULTILINE | re.DOTALL)


class CommandArguments(griffe.Extension):
    """Writes the fields of the settings into the docstrings of functions under `@with_settings(...)`."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace the argument `settings` by its fields."""
        found = _DECORATOR.search(" ".join(str(one.value) for one in func.decorators))
        if found is None or func.docstring is None:
            return
        taken = getattr(settings, found[1])
        described = settings.describe_arguments(inspect.cleandoc(func.docstring.value), taken)
        # Defaults stand in the signature, and the page adds them to the arguments.
        func.docstring.value = _ARGUMENT.sub(lambda one: f"    {one[1]} ({' '.join(one[2].split())}): ", described)
        names = sorted(taken.model_fields, key=lambda name: name not in taken.positional)
        func.parameters = griffe.Parameters(*[_parameter(name, taken) for name in names])


def _parameter(name: str, taken: type[settings.Settings]) -> griffe.Parameter:
    field = taken.model_fields[name]
    kind = griffe.ParameterKind.positional_or_keyword if name in taken.positional else griffe.ParameterKind.keyword_only
    default = str(field.default) if isinstance(field.default, Path) else field.default
    return griffe.Parameter(name, kind=kind, default=None if field.is_required() else repr(default))
