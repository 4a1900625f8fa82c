"""The settings of a command as the arguments of its Python function: in its docstring, and in its errors."""

import re
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vestige.settings._base import Settings, flag

_WIDTH = 112
_SECTION = re.compile(r"^(Returns|Raises|Yields):$", re.MULTILINE)
_COMMAND = re.compile(r"vestige [a-z][^\n`]*?(?=\.?(?:\n|`|$)|\. [A-Z])")
"""A command inside of a message, to the end of its sentence: it is typed, wherever it is read."""
_FLAG = re.compile(r"--([a-z][a-z-]*)(?: ([\w./=:{}%+-]*[\w}]))?")
_IN_A_CONFIG_FILE = re.compile(r", or `\w+: VALUE` in a config file")


def describe_arguments(doc: str, settings: type[Settings]) -> str:
    """Return the docstring of a function with a line or two for each argument: its type, default and meaning.

    Args:
        doc: Of the function, without its arguments.
        settings: What it takes; the command's own stand before those that it shares with others.
    """
    owners = {name: _owner(settings, name) for name in settings.model_fields}
    order = sorted(
        owners, key=lambda name: (not settings.model_fields[name].is_required(), owners[name] is not settings)
    )
    lines = [line for name in order for line in _describe(name, settings)]
    arguments = "\n".join(["Args:", *lines])
    found = _SECTION.search(doc)
    if found is None:
        return f"{doc.rstrip()}\n\n{arguments}\n"
    return f"{doc[: found.start()]}{arguments}\n\n{doc[found.start() :]}"


def _owner(settings: type[Settings], name: str) -> type:
    return next(owner for owner in settings.__mro__ if name in vars(owner).get("__annotations__", {}))


def _describe(name: str, settings: type[Settings]) -> list[str]:
    field = settings.model_fields[name]
    default = "required" if field.is_required() else f"default {_shown(field.default)}"
    meaning = put_in_python_words(field.description or "", settings)
    text = f"{name} ({describe_type(field.annotation)}, {default}): {meaning}"
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def _shown(default: Any) -> str:
    return repr(str(default)) if isinstance(default, Path) else repr(default)


def describe_type(annotation: Any) -> str:
    """Return a type as a person would write it: bounds and validators are for the settings to check."""
    origin, members = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return describe_type(members[0])
    if origin is Literal:
        return " or ".join(map(repr, members))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe_type(member) for member in members))
    if origin is not None:
        inner = ", ".join(describe_type(member) for member in members if member is not ...)
        return f"{origin.__name__} of {inner}" if origin in (tuple, list) else f"{origin.__name__}[{inner}]"
    return "None" if annotation is NoneType else annotation.__name__


def put_in_python_words(message: str, settings: type[Settings]) -> str:
    """Return a message that names flags with the arguments of the Python function in their place.

    "Type --queries VALUE" becomes "Pass queries=...", "Drop --no-trust" becomes "Drop trust=False"; commands that the
    message gives to be typed stay.

    Args:
        message: As the command line prints it.
        settings: What the function takes.
    """
    names = {flag(name): name for name in settings.model_fields}
    message = _IN_A_CONFIG_FILE.sub("", message)
    parts, end = [], 0
    for command in _COMMAND.finditer(message):
        parts += [_replace_flags(message[end : command.start()], names, settings), command[0]]
        end = command.end()
    return "".join([*parts, _replace_flags(message[end:], names, settings)])


def _replace_flags(text: str, names: dict[str, str], settings: type[Settings]) -> str:
    text = re.sub(r"\b([Tt])ype (?=--)", lambda found: "Pass " if found[1] == "T" else "pass ", text)

    def argument(found: re.Match[str]) -> str:
        typed, word, rest = f"--{found[1]}", found[2], text[found.end() :]
        negative = names.get(f"--{typed.removeprefix('--no-')}") if typed.startswith("--no-") else None
        name = negative or names.get(typed)
        if name is None:
            return found[0]
        field, behind = settings.model_fields[name], "" if word is None else f" {word}"
        if field.annotation is bool:
            return f"{name}={negative is None}{behind}"
        if word is None or not _is_value(word, rest, field):
            return f"`{name}`{behind}"
        return f"{name}={_spell(word, field)}{',' * rest.startswith(' --')}"

    return _FLAG.sub(argument, text)


def _is_value(word: str, rest: str, field: FieldInfo) -> bool:
    """Return whether the word behind a flag is its value, and not the next word of the sentence."""
    described = describe_type(field.annotation)
    if word.isupper() or not word.islower() or not word.isalpha() or repr(word) in described:
        return True
    return "str" in described and (not rest or rest[0] in ".,;)\n" or rest.startswith(" or "))


def _spell(word: str, field: FieldInfo) -> str:
    if word == "VALUE":
        return "..."
    if word.isupper() or word.replace(".", "", 1).isdigit():
        return word
    key, equals, value = word.partition("=")
    if equals and "dict" in describe_type(field.annotation):
        return f'{{"{key}": "{value}"}}'
    return f'"{word}"'
