"""What tests of whole studies share: packages found as if they were installed, and when files were written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def installed(folder: Path, lay_out: Callable[[Path], None]) -> Iterator[Path]:
    """The packages that `lay_out` puts into the folder are found while the context lasts."""
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def written(folder: Path, *patterns: str) -> dict[Path, int]:
    """When each of the files was last written; there has to be one at least."""
    found = {path: path.stat().st_mtime_ns for each in patterns for path in folder.rglob(each) if path.is_file()}
    assert found
    return found
