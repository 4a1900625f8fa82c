"""From a function of complete settings to the Python function of a command, and what every command does around it.

Its arguments are the settings by name, its inputs stay apart from its output, which it holds, and live modules that it
was given are as before.
"""

import functools
import hashlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vestige.distributed import FSDP, is_helper, process_group
from vestige.errors import SpecError, UserError, memory_error
from vestige.settings._base import Settings, flag
from vestige.settings._shared import LaunchSettings
from vestige.storage import disk_error, hold_folder

_WIDTH = 112
_ARGUMENTS = re.compile(r"^Args:\n(?:(?: .*)?\n)*(?=\S|\Z)", re.MULTILINE)
_SECTION = re.compile(r"^(Returns|Raises|Yields):$", re.MULTILINE)
_COMMAND = re.compile(r"vestige [a-z][^\n`]*?(?=\.?(?:\n|`|$)|\. [A-Z])")
"""A command inside of a message, to the end of its sentence: it is typed, wherever it is read."""
_FLAG = re.compile(r"--([a-z][a-z-]*)(?: ([\w./=:{}%+-]*[\w}]))?")
_IN_A_CONFIG_FILE = re.compile(r", or `\w+: VALUE` in a config file")


def describe_arguments(doc: str, settings: type[Settings]) -> str:
    """Return the docstring of a function with a line or two for each argument: its type, default and meaning.

    Args:
        doc: Of the function of complete settings; what it says of its own arguments is left out.
        settings: What it takes; the command's own stand before those that it shares with others.
    """
    owners = {name: _owner(settings, name) for name in settings.model_fields}
    order = sorted(
        owners, key=lambda name: (not settings.model_fields[name].is_required(), owners[name] is not settings)
    )
    lines = [line for name in order for line in _describe(name, settings)]
    arguments = "\n".join(["Args:", *lines])
    doc = _ARGUMENTS.sub("", doc)
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
        if "bool" in describe_type(field.annotation).split(" or "):
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


Result = TypeVar("Result")


def with_settings(
    settings: type[Settings], command: str | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Give a function of `settings` the settings' own fields as keyword arguments, with their defaults and checks.

    So a command has the same argument names and defaults in Python, on the command line and in a config file. With
    settings that are complete, its attribute `run` is called: they are not checked again.

    Args:
        settings: What it takes.
        command: What follows `vestige` on the command line; not given: the name of the function.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        words = command or _words(function)

        def run(complete: Settings, **more: Any) -> Result:
            shared = process_group(getattr(complete, "device", None) == FSDP)
            with shared, _write(complete, words), _restore_modules(complete):
                return function(complete, **more)

        @functools.wraps(function)
        def call(*given: Any, **arguments: Any) -> Result:
            if len(given) > len(settings.positional):
                first = next(iter(settings.model_fields))
                raise TypeError(f"{function.__name__}() takes its settings by name, such as {first}=...")
            # The command line has complete settings, and calls `run`: what comes this way was written in Python.
            try:
                return run(settings(**(dict(zip(settings.positional, given, strict=False)) | arguments)))
            except UserError as error:
                error.args = (put_in_python_words(str(error), settings), *error.args[1:])
                raise

        call.__doc__ = describe_arguments(inspect.getdoc(function) or "", settings)
        vars(call).update(__signature__=_signature(settings, function), run=run)
        return call

    return decorate


def _words(function: Callable[..., Any]) -> str:
    """Return the words that are typed after `vestige` for the function."""
    package = (function.__module__ or "").partition(".")[2].split(".")[0]
    group = {"evaluate": "evaluate ", "prepare": "data "}.get(package, "")
    return group + function.__name__.replace("_", "-")


def _signature(settings: type[Settings], function: Callable[..., Any]) -> inspect.Signature:
    parameters = []
    for name, field in settings.model_fields.items():
        named = name not in settings.positional
        kind = inspect.Parameter.KEYWORD_ONLY if named else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = inspect.Parameter.empty if field.is_required() else field.default
        # Types stand in the docstring, as a person would write them.
        parameters.append(inspect.Parameter(name, kind, default=default))
    parameters.sort(key=lambda parameter: (parameter.kind, parameter.default is not inspect.Parameter.empty))
    return inspect.Signature(parameters, return_annotation=inspect.signature(function).return_annotation)


@contextmanager
def _restore_modules(settings: Settings) -> Iterator[None]:
    """Restore, also after an error, `requires_grad` and the mode of live modules among the settings."""
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
        for parameter, flag_before in flags:
            if parameter.requires_grad != flag_before:
                parameter.requires_grad_(flag_before)
        for part, training in modes:
            part.training = training


@contextmanager
def _write(settings: Settings, command: str) -> Iterator[None]:
    """Hold the output of a command while the block runs; a full disk or GPU ends it with what to do.

    Processes with the same settings may share the work on one folder, but for `overwrite`, which begins with removing.

    Raises:
        SpecError: An input is the output, or lies where it would be replaced.
        UserError: Another command writes to that folder, or it was removed during the work.
        DiskSpaceError: The disk is full.
        UserError: The memory of the GPU is full.
    """
    out = getattr(settings, "out", None)
    writes = not getattr(settings, "dry_run", False)
    try:
        with _hold(settings, out, command) if isinstance(out, Path) and writes else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:
        folder = out or getattr(settings, "index", None) or Path("its folder")
        if (full := disk_error(error, folder) or memory_error(error)) is None:
            raise
        raise full from error


@contextmanager
def _hold(settings: Settings, out: Path, command: str) -> Iterator[None]:
    _require_apart(settings, out)
    alone = not isinstance(settings, LaunchSettings) or getattr(settings, "overwrite", False)
    shared = None if alone else _identity(settings)
    with hold_folder(out, settings.command_line(command), shared=shared, lock=not is_helper()):
        yield


def _require_apart(settings: Settings, out: Path) -> None:
    """Raise if an input is the output folder or, where results are replaced, lies in it."""
    place = out.resolve()
    for name, value in settings.arguments().items():
        annotation = type(settings).model_fields[name].annotation
        is_input = annotation is Any or annotation in (Path, Path | None)
        if name == "out" or name in settings.beside_results or not is_input:
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            path = _path(item)
            inside = path is not None and place in path.parents and "overwrite" in type(settings).model_fields
            if inside or (path == place and place.is_dir()):
                raise SpecError(
                    f"{flag(name)} {item} {'lies in' if inside else 'is'} the folder of --out, where results are "
                    "replaced. Choose another --out."
                )


def _path(value: Any) -> Path | None:
    """Return the path of an input; None for one that is no file or folder here."""
    try:
        path = Path(value).expanduser() if isinstance(value, str | Path) and value else None
        return path.resolve() if path is not None and path.exists() else None
    except (OSError, ValueError):
        return None


def _identity(settings: Settings) -> str:
    """Return a digest of what commands that share a folder agree in: everything but where the work is done."""
    ignored = {"out", *LaunchSettings.model_fields}
    recorded = {name: value for name, value in settings.record().items() if name not in ignored}
    content = [type(settings).__name__, recorded]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
