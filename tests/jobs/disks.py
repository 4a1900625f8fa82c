"""A disk of a few megabytes, where this machine lets a test mount one."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)):
        pytest.skip("no disk can be mounted here: that needs root (CAP_SYS_ADMIN)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    assert _mount("-o", f"remount,{options}", str(folder))


def fill(folder: Path, leave: int) -> None:
    """Somebody else's file takes all but `leave` bytes."""
    with (folder / "somebody-elses").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - leave))


def _mount(*words: str) -> bool:
    try:
        return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
