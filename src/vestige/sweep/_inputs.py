"""What the files that a cell reads were like: a cell that is done with other content is not this cell."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from vestige.files import is_temporary, sha256_of

_READ_BYTES = 64 * 2**20
"""Files up to this size are told apart by their content, larger ones by size and time of change."""
_PRODUCTS = (".html",)
"""What reading a folder may leave in it."""


def fingerprints(settings: dict[str, Any]) -> dict[str, str]:
    """A digest of every file and folder that a setting names, by its path; of a folder, of the files right in it."""
    paths = {path for value in settings.values() for path in _paths(value)}
    return {path: found for path in sorted(paths) if (found := _fingerprint(Path(path))) is not None}


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [path for each in value.values() for path in _paths(each)]
    if isinstance(value, list):
        return [path for each in value for path in _paths(each)]
    # A question is no path, though it may be as long as one must not be.
    return [value] if isinstance(value, str) and value and "\n" not in value and len(value) < 1024 else []


def _fingerprint(path: Path) -> str | None:
    try:
        if path.is_file():
            return _of_file(path)
        if not path.is_dir():
            return None
        names = sorted(each.name for each in os.scandir(path) if each.is_file())
    except OSError:
        return None
    kept = [name for name in names if not name.startswith(".") and not name.endswith(_PRODUCTS)]
    lines = [f"{name} {_of_file(path / name)}" for name in kept if not is_temporary(path / name)]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _of_file(path: Path) -> str:
    state = path.stat()
    if state.st_size > _READ_BYTES:
        return f"{state.st_size} bytes of {state.st_mtime_ns}"
    return _content(str(path.resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _content(path: str, size: int, changed: int) -> str:  # noqa: ARG001
    return sha256_of(Path(path))
