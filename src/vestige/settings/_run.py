"""From a function of complete settings to the Python function of a command, and what every command does around it.

Its arguments are the settings by name, its inputs stay apart from its output, which it holds, and live modules that it
was given are as before.
"""

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from vestige.distributed import FSDP, is_helper, process_group
from vestige.errors import SpecError, UserError
from vestige.settings._base import Settings, flag
from vestige.settings._shared import LaunchSettings
from vestige.storage import disk_error, hold_folder

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
            return run(settings(**(dict(zip(settings.positional, given, strict=False)) | arguments)))

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
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=field.annotation))
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
    """Hold the output of a command while the block runs; a full disk ends it with what to do.

    Processes with the same settings may share the work on one folder, but for `overwrite`, which begins with removing.

    Raises:
        SpecError: An input is the output, or lies where it would be replaced.
        UserError: Another command writes to that folder, or it was removed during the work.
        DiskSpaceError: The disk is full.
    """
    out = getattr(settings, "out", None)
    writes = not getattr(settings, "dry_run", False)
    try:
        with _hold(settings, out, command) if isinstance(out, Path) and writes else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:
        if (full := disk_error(error, out or getattr(settings, "index", None) or Path("its folder"))) is None:
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
