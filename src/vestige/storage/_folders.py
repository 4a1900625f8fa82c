"""Folders of results: never mixed with files of others, and moved to their path when they are whole."""

import errno
import glob
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from vestige.errors import IndexMismatch, UserError
from vestige.storage._files import is_temporary, make_folder, remove_tree, sync, temporary_path, write_error

_PARTIAL = re.compile(r"\.(.+)\.partial")


def require_no_others(folder: Path, ours: Collection[str]) -> None:
    """Raise `UserError` unless the folder is absent, empty, or holds nothing but files of these names.

    Args:
        folder: To write a result into.
        ours: What a result consists of, as paths in the folder. `*` stands for anything but a slash; a folder's name
            alone stands for all that is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder. Choose another --out.")
    others = list(_others(folder, ours)) if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} holds other files ({', '.join(others[:3])}). Give a new or empty folder as --out.")


def _others(folder: Path, ours: Collection[str], prefix: str = "") -> Iterator[str]:
    """Yield paths in the folder that none of the names stands for; folders without a file in them do not count."""
    depth = prefix.count("/") + 1
    names = [name.split("/") for name in ours]
    for path in sorted(folder.iterdir()):
        inside = f"{prefix}{path.name}"
        begun = [name for name in names if fnmatchcase(inside, "/".join(name[:depth]))]
        if is_temporary(path) or any(len(name) <= depth for name in begun) or _is_hollow(path):
            continue
        if begun and path.is_dir():
            yield from _others(path, ["/".join(name) for name in begun], f"{inside}/")
        else:
            yield inside


def _is_hollow(path: Path) -> bool:
    """Return whether it is a folder that holds nothing but folders."""
    if path.is_symlink() or not path.is_dir():
        return False
    return not any(
        files or any(Path(parent, name).is_symlink() for name in inner) for parent, inner, files in os.walk(path)
    )


def remove_result(
    folder: Path, ours: Collection[str], record: str, *, begun: Collection[str] = (), keep: Collection[str] = ()
) -> None:
    """Remove the result in the folder, for `--overwrite`; a folder that is absent is no error.

    Args:
        folder: Of the result.
        ours: What it consists of, as for `require_no_others`.
        record: The file without which only what is `begun` may be there.
        begun: As `ours`, for a result without its record.
        keep: Names of what stays.

    Raises:
        UserError: The folder holds other files, or a symbolic link; nothing was changed.
    """
    if not folder.exists():
        return
    require_no_others(folder, ours if (folder / record).exists() else begun)
    require_no_links(folder)
    # All of it goes at once: what a kill left could not be assigned to its owner.
    folder = folder.resolve()
    aside = temporary_path(folder.with_name(f".{folder.name}"))
    try:
        folder.rename(aside)
    except OSError as error:
        raise write_error(error, folder, 0) from error
    folder.mkdir()
    for name in keep:
        if (aside / name).exists():
            (aside / name).rename(folder / name)
    remove_tree(aside)


def require_no_links(folder: Path) -> None:
    """Raise `UserError` if anything in the folder is a symbolic link: what is behind one is not ours to delete."""
    for parent, *names in os.walk(folder):
        for path in (Path(parent, name) for name in [*names[0], *names[1]]):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, which Vestige did not make; nothing was changed. Remove the link, or "
                    "give another --out."
                )


@contextmanager
def stage_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `folder` to write a result into; it takes that path, whole, when the block ends.

    With `replace`, what is there goes, by two renames: killed between them, the earlier result lies beside its path,
    and the next command that holds the folder restores it.

    Raises:
        IndexMismatch: A result is there, and `replace` is False.
        UserError: The folder cannot be written to.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    attempt = temporary_path(folder.with_name(f".{folder.name}"))
    try:
        attempt.mkdir()
        yield attempt
        for parent, _, names in os.walk(attempt):
            for path in [*(Path(parent, name) for name in names), Path(parent)]:
                sync(path)
        _move_into_place(attempt, folder, replace)
    finally:
        remove_tree(attempt)


def _move_into_place(attempt: Path, folder: Path, replace: bool) -> None:
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.replaced")
    if replace and folder.exists() and any(folder.iterdir()):
        # A folder with files cannot be replaced in one step: the old result steps aside, back if that fails.
        folder.rename(aside)
    try:
        attempt.replace(folder)
    except OSError as error:
        if aside.exists():
            aside.rename(folder)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise IndexMismatch(
                f"{folder} was written by another command during this one; nothing was changed. Give another --out."
            ) from error
        raise write_error(error, folder, 0) from error
    sync(folder.parent)
    remove_tree(aside)


def partial_folder(out: Path) -> Path:
    """Return where finished pieces of a run are kept until it is written: beside it, which appears when it is whole."""
    whole = Path(out).absolute()
    return whole.with_name(f".{whole.name}.partial")


def find_result_folder(folder: Path) -> Path:
    """Return the folder of the run that `folder` keeps pieces of; of any other folder, itself."""
    match = _PARTIAL.fullmatch(folder.name)
    return folder if match is None else folder.with_name(match[1])


def remove_partial(out: Path, record: str | None = None) -> None:
    """Remove what was kept for a run in `out` that is written; with a `record`, what is newer than it stays.

    Newer pieces belong to another command.
    """
    partial = partial_folder(out)
    files = [Path(parent, name) for parent, _, names in os.walk(partial) for name in names]
    newest = max((path.lstat().st_mtime for path in files), default=0.0)
    if record is None or newest <= (Path(out) / record).stat().st_mtime:
        remove_tree(partial)


def find_replaced_result(folder: Path) -> Path | None:
    """Return the path of an earlier result whose replacement was killed; None without one."""
    folder = folder.resolve()
    found = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*.replaced"))
    return found[0] if found else None


def put_back(folder: Path) -> None:
    """Restore, or remove, the earlier result after a replacement that was killed."""
    while (aside := find_replaced_result(folder)) is not None:
        if folder.exists() and any(folder.iterdir()):
            remove_tree(aside)
        else:
            aside.replace(folder)
