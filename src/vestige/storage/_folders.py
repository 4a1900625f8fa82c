"""Folders of results: never mixed with files of others, moved to their path when whole, held by one command."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vestige.errors import IndexMismatch, UserError
from vestige.storage._files import (
    is_temporary,
    make_folder,
    remove_strays_of,
    remove_tree,
    sync,
    temporary_path,
    this_host,
    write_error,
)

_PARTIAL = re.compile(r"\.(.+)\.partial")
_LOCK_SECONDS = 1.0
"""How long a folder that another command holds is waited for: that command may just be ending."""
_HELD: ContextVar[tuple[Path, ...]] = ContextVar("held folders", default=())
"""Folders that this process, or the one that started it, holds: what is in them is held too."""


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


def _put_back(folder: Path) -> None:
    """Restore, or remove, the earlier result after a replacement that was killed."""
    while (aside := find_replaced_result(folder)) is not None:
        if folder.exists() and any(folder.iterdir()):
            remove_tree(aside)
        else:
            aside.replace(folder)


@contextmanager
def hold_folder(folder: Path, command: str, *, shared: str | None = None, lock: bool = True) -> Iterator[None]:
    """Hold the folder while the block writes into it; what earlier commands left beside it is repaired first.

    A folder inside one that is held is held as well. Empty folders that a refused command made are removed.

    Args:
        folder: Of the result; need not exist.
        command: Shown to a second command, which is refused.
        shared: Commands with the same text may hold it at once; None for one command alone.
        lock: False where another process holds it for this one.

    Raises:
        UserError: Another command holds the folder, or it cannot be written to.
    """
    folder = folder.resolve()
    if folder.parent == folder:
        raise UserError(f"{folder} is the root of all folders. Choose another --out.")
    if any(held == folder or held in folder.parents for held in _HELD.get()):
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = _lock_path(folder)
    held = None
    token = _HELD.set((*_HELD.get(), folder))
    try:
        if lock:
            make_folder(folder.parent)
            held = _lock(path, folder, command, shared)
        if held is not None:
            _put_back(folder)
            remove_strays_of(folder.with_name(f".{folder.name}"))
        yield
    except Exception:
        if folder in made:
            _remove_empty(folder)
        raise
    finally:
        _HELD.reset(token)
        if held is not None:
            _unlock(held, path)
        for each in made[1:]:
            with contextlib.suppress(OSError):
                each.rmdir()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _lock(path: Path, folder: Path, command: str, shared: str | None) -> int | None:
    """Return the open lock file; None where there can be none: the disk has no locks or is not ours to write to."""
    about = {"command": command, "host": this_host(), "process": os.getpid(), "shared": shared}
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and folder.is_dir():
                return None
            raise write_error(error, path, 0) from error
        try:
            holder = _take(file, path, about)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise write_error(error, path, 0) from error
        if holder is None:
            return file
        _unlock(file, path)
        if time.monotonic() > deadline:
            known = f" (process {holder.get('process')} on {holder.get('host')}):\n  {holder.get('command')}"
            raise UserError(
                f"{folder} is being written by another command{known if holder else '.'}\n"
                "Wait until it has ended, or give another --out."
            )
        time.sleep(0.05)


def _take(file: int, path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lock the file and return None, or return what its holder wrote about itself."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(file)
        if about["shared"] is None or holder.get("shared") != about["shared"]:
            return holder
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Before that it may have been given back, and be another command's by now.
            holder = _holder(file)
            return None if _is_current(file, path) and holder.get("shared") == about["shared"] else holder
        return holder
    if not _is_current(file, path):
        return {}
    content = json.dumps(about).encode()
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)
    with contextlib.suppress(BlockingIOError):
        if about["shared"] is not None:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    return {}


def _holder(file: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(file, 1 << 20, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_current(file: int, path: Path) -> bool:
    """Return whether the file still has its name: its last holder may have removed it before this process locked it."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _unlock(file: int, path: Path) -> None:
    """Release the lock, and remove its file if no other process holds it."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_current(file, path):
            path.unlink()
    os.close(file)


def _remove_empty(folder: Path) -> None:
    """Remove the folder, and those in it, where no file lies in any: a job that was submitted needs its empty ones."""
    if any(files for _, _, files in os.walk(folder)):
        return
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(parent)


def is_held_by(folder: Path, pid: int) -> bool:
    """Return whether a process of this host holds the folder, according to the system, not to a file."""
    import psutil

    return any(Path(each.path) == _lock_path(folder) for each in psutil.Process(pid).open_files())


def find_holder(folder: Path) -> str | None:
    """Return the command of this host that is writing into a folder, as it was typed; None where none is."""
    import psutil

    path = _lock_path(folder.resolve())
    try:
        about = json.loads(path.read_bytes())
        own = about["host"] == this_host()
        return str(about["command"]) if own and is_held_by(folder.resolve(), int(about["process"])) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError, psutil.Error):
        return None
