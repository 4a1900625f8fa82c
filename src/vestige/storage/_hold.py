"""A command holds its folder by a lock of the kernel on a file beside it, which goes with the process."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.storage._files import make_folder, remove_strays_of, this_host, write_error
from vestige.storage._folders import put_back

_LOCK_SECONDS = 1.0
"""How long a folder that another command holds is waited for: that command may just be ending."""
_HELD: ContextVar[tuple[Path, ...]] = ContextVar("held folders", default=())
"""Folders that this process, or the one that started it, holds: what is in them is held too."""


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
            put_back(folder)
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
