"""The command that a worker runs: the one that was typed, or the one that a Python call stands for."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.settings import LaunchSettings


def worker_command(settings: LaunchSettings, verb: str) -> list[str] | None:
    """Return the words of the command with these settings, None if a value lives in this process alone.

    A live module or a list of examples cannot go to another process; work that needs another one raises then
    (`require_command`), so that work in this process needs no command at all.
    """
    given = settings.arguments()
    if not all(_is_plain(value) for value in given.values()) or any(_is_texts(given[name]) for name in settings.files):
        return None
    fields = type(settings).model_fields
    defaults = {name: fields[name].default for name in settings.never_repeated if name in fields}
    words = shlex.split(settings.model_copy(update=defaults).command_line(verb))
    return [sys.executable, "-m", "vestige.cli", *words[1:]]


def require_command(command: Sequence[str] | None) -> list[str]:
    """Return the command, for work that leaves this process.

    Raises:
        UserError: There is none.
    """
    if command is None:
        raise UserError(
            "Workers in other processes read the model and the data from disk, and one of them was given as a live "
            "Python object or as a list of texts. Save it (model.save_pretrained(FOLDER) with its tokenizer, data and "
            "texts as JSONL) and give the path, or work in this process with workers=1."
        )
    return list(command)


def _is_texts(value: Any) -> bool:
    """Return whether the value is a list of texts, which typed as words would be names of files."""
    return isinstance(value, list | tuple) and any(isinstance(item, str) for item in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float | Path) for item in value)
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | Path)
