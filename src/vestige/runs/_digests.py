"""Digests of the files of a run: taken when it is written, compared when it is read."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from vestige.errors import CorruptFile
from vestige.storage import sha256_of, sha256_once


def digests_of(folder: Path) -> dict[str, str]:
    """Return sha256 by name of all files in a folder and the folders in it: `figures/roc.png`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def require_unaltered(folder: Path, digests: Mapping[str, str], *names: str) -> None:
    """Compare files with their digests, each once per process; one that has none is of an earlier version.

    Raises:
        CorruptFile: A file is not what was written.
    """
    for name in names:
        if name in digests and (fault := _fault(folder, name, digests[name], sha256_once)):
            raise CorruptFile(
                f"{folder / name} {fault}. Do not trust this run: restore the file from a copy, or make the run again "
                f"with another --out or with --overwrite. All its files: vestige status --verify {folder}"
            )


def file_faults(folder: Path, digests: Mapping[str, str]) -> dict[str, str | None]:
    """Return what is wrong with each file of a run, None where nothing is; reads every byte."""
    return {name: _fault(folder, name, digest, sha256_of) for name, digest in digests.items()}


def _fault(folder: Path, name: str, digest: str, read: Callable[[Path], str]) -> str | None:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        return "lies outside of the run"
    if not (folder / name).is_file():
        return "is missing"
    return None if read(folder / name) == digest else "was altered: its sha256 is not the one in run.json"
