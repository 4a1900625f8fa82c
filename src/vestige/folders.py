"""Folders that hold one result: files of others are left alone, and a result of other settings is never built over."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from vestige.errors import UserError
from vestige.files import is_temporary


class Difference(NamedTuple):
    """One setting that differs between two results, both sides as shown to a person."""

    field: str
    old: str
    new: str


def require_no_others(folder: Path, ours: Collection[str]) -> None:
    """Nothing happens if the folder is absent, empty, or holds nothing but files of these names.

    Args:
        folder: To write a result into.
        ours: Names of what a result consists of; `*` stands for anything.

    Raises:
        UserError: It is a file, or holds others.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder. Choose another --out.")
    found = [path for path in folder.iterdir() if not is_temporary(path)] if folder.is_dir() else []
    others = sorted(path.name for path in found if not any(fnmatchcase(path.name, name) for name in ours))
    if others:
        raise UserError(f"{folder} holds other files ({', '.join(others[:3])}). Give a new or empty folder as --out.")


def remove_result(folder: Path, ours: Collection[str], record: str, keep: Collection[str] = ()) -> None:
    """The result in the folder is gone, for `--overwrite`; a folder that is absent is no error.

    Args:
        folder: Of the result.
        ours: Names of what it consists of; `*` stands for anything.
        record: The file that makes it one.
        keep: Names of what stays.

    Raises:
        UserError: The folder holds other files.
    """
    if not folder.exists():
        return
    require_no_others(folder, ours)
    # The record goes first: whatever is left after a kill is no longer taken for a result.
    (folder / record).unlink(missing_ok=True)
    for path in [path for path in folder.iterdir() if path.name not in keep]:
        # Of a link to somebody's folder the link goes, and the folder stays.
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], old_names: Mapping[str, str], new_names: Mapping[str, str]
) -> list[Difference]:
    """The settings in which two identities differ, in their order.

    Args:
        old: Identity of the result on disk, in JSON terms.
        new: Of the one that was asked for.
        old_names: What inputs were called whose identity is a fingerprint.
        new_names: The same of the new one.
    """
    fields = [*old, *(name for name in new if name not in old)]
    return [
        Difference(name.replace("_", "-"), _shown(name, old, old_names), _shown(name, new, new_names))
        for name in fields
        if old.get(name) != new.get(name)
    ]


def mismatch_message(what: str, found: Sequence[Difference]) -> str:
    """The refusal as a person reads it: a small table, then what to do.

    Args:
        what: The result with its folder, at the beginning of a sentence.
        found: Where it differs from what was asked for.
    """
    table = [Difference("setting", "on disk", "asked for"), *found]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    return "\n".join(
        [
            f"{what} was made with other settings; nothing was changed.",
            *(f"  {row.field:{widths[0]}}  {row.old:{widths[1]}}  {row.new}" for row in table),
            "Give another --out to keep both, or --overwrite to replace it.",
        ]
    )


def _shown(name: str, identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    value = identity.get(name)
    if name in names:
        return f"{names[name]} ({str(value)[:8]})"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
