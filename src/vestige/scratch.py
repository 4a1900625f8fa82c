"""Bytes that are put aside for a while, in files without a name: they are gone with the process, however that ends."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, final

from vestige.errors import UserError
from vestige.storage import write_error
from vestige.timing import time_phase

_CHUNK = 2**20
"""Bytes read at once of what was put aside."""


@final
class Scratch:
    """Bytes put aside before the file that they belong to can be begun: the first in memory, further ones beside it.

    What lies on the disk has no name there, so it is gone with the process, however that ends.
    """

    def __init__(self, path: Path, held_bytes: int) -> None:
        """Start with nothing put aside.

        Args:
            path: The file that the bytes are for; its folder must exist.
            held_bytes: Most bytes in memory.
        """
        self._path, self._size = path, 0
        self._file = tempfile.SpooledTemporaryFile(max_size=held_bytes, dir=str(path.parent))  # noqa: SIM115

    @classmethod
    def temporary(cls, held_bytes: int) -> Self:
        """Return the same for bytes that belong to no file: they are put aside in the folder for temporary files.

        Raises:
            UserError: There is no such folder.
        """
        return cls(temporary_folder() / "vestige", held_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the bytes."""
        # What did not fit on the disk would be tried again, and is no longer needed.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, chunk: bytes | memoryview) -> None:
        """Put a chunk behind the others.

        Raises:
            DiskSpaceError: The disk is full.
            UserError: The folder cannot be written to.
        """
        try:
            with time_phase("writing"):
                self._size += self._file.write(memoryview(chunk).cast("B"))
        except OSError as error:
            raise write_error(error, self._path, self._size) from error

    def read(self, begin: int, size: int) -> bytes:
        """Return the `size` bytes behind the first `begin` ones; several threads may read at once."""
        try:
            self._file.flush()
            return os.pread(self._file.fileno(), size, begin)
        except OSError as error:
            raise write_error(error, self._path, self._size) from error

    def chunks(self) -> Iterator[bytes]:
        """Yield everything again, in order."""
        self._file.flush()
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            yield chunk


def temporary_folder() -> Path:
    """Return the folder in which files without a name are made.

    Raises:
        UserError: There is no folder that could be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise UserError(
            f"There is no folder for temporary files: {error.strerror}. Name one: TMPDIR=FOLDER."
        ) from error
