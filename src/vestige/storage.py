"""What is on disk is whole or absent, belongs to one command at a time, and is never mixed with files of others.

A file is written under a name of its own, fsynced and renamed: a process that is killed while writing leaves one stray
temporary file and never a torn result, and two that write the same file at once do no harm, because their bytes are
equal. A result of several files is written beside its path and moved there when it is whole (`stage_folder`). A
command holds its folder by a lock of the kernel on a file beside it, which goes with the process however that ends.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from vestige.errors import DiskSpaceError, IndexMismatch, UserError
from vestige.progress import format_bytes
from vestige.timing import count_bytes, time_phase

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "Free disk space, choose another --out, or store less per example: --dtype int8, or a smaller --compress."
_RESERVE = 16 * 2**20
"""Bytes left free besides the index itself: markers, directory entries, the rounding up to disk blocks."""
_OLD_SECONDS = 24 * 3600
"""A temporary file lives for the seconds that writing takes; after a day its writer is dead on any host."""

_FULL_WORDS = ("no space left on device", "disk quota exceeded", "file too large", "os error 28", "os error 122")
"""A full disk, in the words of libraries that hide an error's number: safetensors, tokenizers, pyarrow, datasets."""
_FULL_OF_TORCH = ("pytorchstreamwriter failed writing", "unexpected pos")
"""A file that cannot grow, whatever the reason, in the words of `torch.save`."""

_GONE_WORDS = ("no such file or directory", "parent directory")
"""What safetensors and the operating system, and `torch.save`, say when the folder of a file is gone."""

_ATTEMPT = secrets.token_hex(4)
_COUNTER = count()
_TEMPORARY = re.compile(r"\.tmp\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<attempt>[0-9a-f]+)\.\d+$")
_PARTIAL = re.compile(r"\.(.+)\.partial")
_LOCK_SECONDS = 1.0
"""How long a folder that another command holds is waited for: that command may just be ending."""
_HELD: ContextVar[tuple[Path, ...]] = ContextVar("held folders", default=())
"""Folders that this process, or the one that started it, holds: what is in them is held too."""


class Written(NamedTuple):
    """What was written: its size in bytes and its sha256."""

    bytes: int
    sha256: str


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], *, exclusive: bool = False) -> Written:
    """Write `chunks` so that the file holds all of them, also after a power cut, or is as it was before.

    Args:
        path: The file; its folder must exist.
        chunks: What to write, in order.
        exclusive: Refuse to replace an existing file, also one that appears during the write.

    Raises:
        FileExistsError: `exclusive`, and another process was first.
        DiskSpaceError: The disk is full; the temporary file has been removed.
        UserError: The folder cannot be written to.
    """
    temporary = temporary_path(path)
    digest, size = hashlib.sha256(), 0
    try:
        with time_phase("writing"):
            with temporary.open("xb", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    digest.update(view)
                    size += len(view)
                    # An unbuffered write may take a part only, for instance just before the disk is full.
                    while len(view):
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            _publish(temporary, path, exclusive)
            _sync(path.parent)
        count_bytes("written", size)
    except FileExistsError:
        raise
    except OSError as error:
        raise write_error(error, path, size) from error
    finally:
        # On a disk that is read-only there is none, and even that is an error.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return Written(size, digest.hexdigest())


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path` to write under; `remove_strays` knows it, and whether its writer still lives."""
    return path.with_name(f"{path.name}.tmp.{this_host()}.{os.getpid()}.{_ATTEMPT}.{next(_COUNTER)}")


def remove_durably(path: Path) -> None:
    """Remove the file, also after a power cut; one that was not there is no error."""
    path.unlink(missing_ok=True)
    _sync(path.parent)


def make_folder(path: Path) -> None:
    """Make the folder so that it exists also after a power cut; raise `UserError` where it cannot be made."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
        _sync(path.parent)
    except FileExistsError as error:
        raise UserError(f"{path} is a file, expected a folder. Choose another --out.") from error
    except OSError as error:
        raise write_error(error, path, 0) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return `sha256_of`, read once per process while the file's size and times do not change."""
    status = path.stat()
    return _sha256_of_version(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=2**16)
def _sha256_of_version(path: Path, *_: int) -> str:
    return sha256_of(path)


def open_temporary(size: int = 0) -> BinaryIO:
    """Open a file without a name, of `size` reserved bytes, which is gone with the process, however that ends.

    Raises:
        DiskSpaceError: The bytes do not fit on the disk for temporary files.
        UserError: No file can be made there.
    """
    file = None
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        if size and hasattr(os, "posix_fallocate"):
            # Writing to a mapped page without a place on the disk would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if file is not None:
            file.close()
        raise temporary_error(error, size) from error
    return cast(BinaryIO, file)


def temporary_error(error: OSError, size: int) -> UserError:
    """Return the error to show when `size` bytes cannot be put into a temporary file."""
    folder = tempfile.tempdir or "the folder for temporary files"
    if error.errno in _FULL:
        return DiskSpaceError(
            f"{format_bytes(size)} do not fit on the disk of {folder}, the folder for temporary files. "
            "Free space on it, or name another: TMPDIR=FOLDER."
        )
    return UserError(f"No file could be made in {folder} ({error.strerror}). Name another folder: TMPDIR=FOLDER.")


def check_disk(folder: Path, needed: int, advice: str = _ADVICE) -> None:
    """Raise `DiskSpaceError` unless `needed` more bytes fit on the disk that holds `folder`, which may be absent."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed and needed + _RESERVE > free:
        raise DiskSpaceError(
            f"{folder} needs {format_bytes(needed)} more, and its disk has {format_bytes(free)} free. {advice}"
        )


def disk_error(error: BaseException, folder: Path) -> UserError | None:
    """Return the error to show where one of any library, or its cause, says that the disk is full or `folder` gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskSpaceError):
            return seen
        text = str(seen).lower()
        if any(words in text for words in _GONE_WORDS) and _is_inside(text, folder) and not folder.exists():
            return _explain_removal(folder)
        full = isinstance(seen, OSError) and seen.errno in _FULL
        # Words count where the library has no number to give; data may hold any words in a message of our own.
        full |= not isinstance(seen, OSError | UserError) and any(words in text for words in _FULL_WORDS)
        if full or (isinstance(seen, RuntimeError) and any(words in text for words in _FULL_OF_TORCH)):
            reason = str(seen).strip().splitlines()[-1][:200]
            return DiskSpaceError(
                f"The disk (or the quota) is full, or the file may not grow: {folder} could not be written ({reason}). "
                "Free disk space, and run the same command again: what is finished is kept."
            )
        seen = seen.__cause__ or seen.__context__
    return None


def write_error(error: OSError, path: Path, size: int) -> UserError:
    """Return the error to show when `size` bytes were written and no more could be."""
    resume = "Finished shards are intact: run the same command again to continue."
    if error.errno in _FULL:
        return DiskSpaceError(
            f"The disk (or the quota) is full: {path} stopped after {format_bytes(size)} and was removed. "
            f"Free disk space. {resume}"
        )
    if error.errno in _REFUSED:
        return UserError(f"{path.parent} cannot be written to ({error.strerror}). Choose another --out.")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{path.name[:40]}... is too long a name for this disk. Choose a shorter --out.")
    if isinstance(error, FileNotFoundError):
        return _explain_removal(path.parent)
    return UserError(f"Writing {path} failed ({error.strerror or error}). When the disk is back: {resume}")


def _is_inside(message: str, folder: Path) -> bool:
    """Return whether a message names a file in the folder, or in the hidden one beside it in which it is made."""
    place = folder.absolute()
    return any(f"{place.parent}/{name}".lower() in message for name in (f"{place.name}/", f".{place.name}."))


def _explain_removal(folder: Path) -> UserError:
    return UserError(
        f"{folder} was removed or renamed while it was being written to. Run the same command again: what is still "
        "there is kept."
    )


def is_temporary(path: Path) -> bool:
    """Return whether the name is one under which `write_durably` writes."""
    return _TEMPORARY.search(path.name) is not None


def remove_strays(folder: Path) -> list[Path]:
    """Remove, in the folder and those in it, what writers that are known to be dead left; return what was removed.

    Temporary files and folders of living writers, and recent ones of other hosts, stay.
    """
    # Unlike a glob, a walk does not fail on folders that vanish during it.
    return _remove_dead(Path(parent, name) for parent, *names in os.walk(folder) for name in [*names[0], *names[1]])


def remove_strays_of(path: Path) -> list[Path]:
    """Remove what dead writers of `path` left beside it; return what was removed."""
    return _remove_dead(path.parent.glob(f"{glob.escape(path.name)}.tmp.*"))


def remove_tree(path: Path) -> None:
    """Remove the file, or the folder with all that is in it; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def this_host() -> str:
    """Return the name under which this host's process numbers are valid: containers have their own numbers."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return re.sub(r"[^A-Za-z0-9-]", "-", f"{socket.gethostname()}-{namespace}")


def _remove_dead(found: Iterable[Path]) -> list[Path]:
    strays = [path for path in sorted(found) if _is_stray(path)]
    for path in strays:
        remove_tree(path)
    return strays


def _is_stray(path: Path) -> bool:
    match = _TEMPORARY.search(path.name)
    if match is None:
        return False
    if match["host"] == this_host():
        # Process numbers are given out again: one like ours with another attempt's mark belonged to a dead process.
        pid = int(match["pid"])
        return match["attempt"] != _ATTEMPT if pid == os.getpid() else not _is_alive(pid)
    try:
        return time.time() - path.stat().st_mtime > _OLD_SECONDS
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    import psutil  # takes longer to import than the rest of this file

    try:
        # A killed process keeps its number as a zombie until its parent collects its exit status, and some parents
        # never do.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _publish(temporary: Path, path: Path, exclusive: bool) -> None:
    if not exclusive:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise
        # Some network disks have no hard links. The rename leaves a moment in which two can be first.
        if path.exists():
            raise FileExistsError(str(path)) from None
        temporary.replace(path)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot sync a folder, and order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


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
                _sync(path)
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
    _sync(folder.parent)
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
