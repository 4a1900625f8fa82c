"""Arrays with an entry for each example that lie on the disk: only the pages in use are in memory.

Such an array is a NumPy array like any other. Its pages come into memory when they are read and stay until `let_go`, so
a loop over one calls that now and then, or loops over its `parts`.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vestige.errors import DiskSpaceError, UserError
from vestige.progress import format_bytes
from vestige.scratch import temporary_folder

IN_MEMORY_BYTES = 2**18
"""A smaller array is not worth a file."""


def zeros(shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Return an array of zeros, in a file without a name if it is large; the file goes with its last user.

    Raises:
        DiskSpaceError: It does not fit on the disk for temporary files.
        UserError: No file can be made there.
    """
    shape, dtype = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= IN_MEMORY_BYTES:
        return np.zeros(shape, dtype)
    folder = temporary_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            return np.ndarray(shape, dtype, buffer=mmap.mmap(file.fileno(), size))
    except OSError as error:
        raise _explained(error, folder, size) from error


def let_go(*arrays: np.ndarray | mmap.mmap) -> None:
    """Drop the pages of arrays on the disk, also of views of them, until they are read again; leave others alone.

    The same goes for a file that is mapped.
    """
    for array in arrays:
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
            owner.madvise(mmap.MADV_DONTNEED)


def parts(array: np.ndarray, size: int = 2**16) -> Iterator[np.ndarray]:
    """Yield consecutive entries, at most `size` of them at a time; a part's pages are dropped before the next one."""
    for first in range(0, len(array), size):
        yield array[first : first + size]
        let_go(array)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the file's bytes on the disk: writing to a page without would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _explained(error: OSError, folder: Path, size: int) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskSpaceError(
            f"{format_bytes(size)} do not fit on the disk of {folder}, the folder for temporary files. "
            "Free space on it, or name another: TMPDIR=FOLDER."
        )
    return UserError(f"No file could be made in {folder} ({error.strerror}). Name another folder: TMPDIR=FOLDER.")
