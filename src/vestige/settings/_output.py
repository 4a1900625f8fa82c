"""What every command that writes does around its work: its inputs stay apart from its output, which it holds."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vestige.distributed import is_helper
from vestige.errors import SpecError, UserError
from vestige.files import disk_error
from vestige.folder_locks import hold_folder
from vestige.settings._base import Settings, flag
from vestige.settings._launch import LaunchSettings


@contextmanager
def writing(settings: Settings, command: str) -> Iterator[None]:
    """Hold the output of a command while the block runs; a full disk ends it with what to do.

    Processes with the same settings may share the work on one folder, but for `overwrite`, which begins with removing.

    Args:
        settings: Of the command; those without `out` write nowhere, or into an index that others read.
        command: Its name.

    Raises:
        SpecError: An input is the output, or lies where it would be replaced.
        UserError: Another command writes to that folder, or it was removed during the work.
        DiskSpaceError: The disk is full.
    """
    out = getattr(settings, "out", None)
    writes = not getattr(settings, "dry_run", False)
    try:
        with _held(settings, out, command) if isinstance(out, Path) and writes else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:
        if (full := disk_error(error, out or getattr(settings, "index", None) or Path("its folder"))) is None:
            raise
        raise full from error


@contextmanager
def _held(settings: Settings, out: Path, command: str) -> Iterator[None]:
    _require_apart(settings, out)
    alone = not isinstance(settings, LaunchSettings) or getattr(settings, "overwrite", False)
    words, shared = settings.command_line(command), None if alone else _identity(settings)
    with hold_folder(out, words, shared=shared, lock=not is_helper()):
        yield


def _require_apart(settings: Settings, out: Path) -> None:
    """Raise if an input is the output folder or, where results are replaced, lies in it."""
    place = out.resolve()
    for name, value in settings.arguments().items():
        if name == "out" or name in settings.beside_results or not _is_input(settings, name):
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            path = _path(item)
            inside = path is not None and place in path.parents and "overwrite" in type(settings).model_fields
            if inside or (path == place and place.is_dir()):
                raise SpecError(
                    f"{flag(name)} {item} {'lies in' if inside else 'is'} the folder of --out, where results are "
                    "replaced. Choose another --out."
                )


def _is_input(settings: Settings, name: str) -> bool:
    annotation = type(settings).model_fields[name].annotation
    return annotation is Any or annotation in (Path, Path | None)


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
