"""Files that are whole or absent, and what is known of them: their hashes, the disk they do not fit on, strays."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast, final

from vestige.errors import DiskSpaceError, UserError
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
    digest = hashlib.sha256()
    with time_phase("writing"), NewFile(path, exclusive=exclusive) as file:
        for chunk in chunks:
            digest.update(memoryview(chunk).cast("B"))
            file.write(chunk)
    count_bytes("written", file.size)
    return Written(file.size, digest.hexdigest())


@final
class NewFile:
    """A file in the making, under a name of its own: whole, fsynced and in place when the context ends well, else gone.

    Every method raises as `write_durably` does.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        self._path, self._exclusive = path, exclusive
        self._temporary = temporary_path(path)
        self.size = 0
        """Bytes written so far."""

    def __enter__(self) -> "NewFile":
        with self._explained():
            self._file = self._temporary.open("x+b", buffering=0)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._explained():
                with self._file:
                    if kind is None:
                        os.fsync(self._file.fileno())
                if kind is None:
                    _publish(self._temporary, self._path, self._exclusive)
                    sync(self._path.parent)
        finally:
            # On a disk that is read-only there is none, and even that is an error.
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def write(self, chunk: bytes | memoryview, start: int | None = None) -> None:
        """Write a chunk from byte `start` on; not given: behind the last one."""
        view = memoryview(chunk).cast("B")
        with self._explained():
            if start is not None:
                self._file.seek(start)
            # An unbuffered write may take a part only, for instance just before the disk is full.
            while len(view):
                written = self._file.write(view)
                self.size, view = self.size + written, view[written:]

    def sha256(self) -> str:
        """Return the sha256 of everything that is in the file."""
        with self._explained():
            self._file.seek(0)
            return hashlib.file_digest(self._file, "sha256").hexdigest()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise write_error(error, self._path, self.size) from error


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path` to write under; `remove_strays` knows it, and whether its writer still lives."""
    return path.with_name(f"{path.name}.tmp.{this_host()}.{os.getpid()}.{_ATTEMPT}.{next(_COUNTER)}")


def remove_durably(path: Path) -> None:
    """Remove the file, also after a power cut; one that was not there is no error."""
    path.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Make the folder so that it exists also after a power cut; raise `UserError` where it cannot be made."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync(path.parent)
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


def sync(path: Path) -> None:
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
