"""The folder of a run: what kind of run it holds, its record read and checked, and the digests of its files."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vestige.errors import CorruptFile, UserError
from vestige.parsing import first_problem, parse_finite_json, parse_json
from vestige.runs._record import DENSE_FILE, RECORD_FILE, RUN_FORMAT, Part, RunRecord
from vestige.storage import sha256_of, sha256_once

Record = TypeVar("Record", bound=BaseModel)


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run."""
    return (folder / RECORD_FILE).is_file()


def require_run(folder: str | Path) -> None:
    """Raise if a folder holds no run.

    Raises:
        UserError: It has no record.
    """
    if not is_run(Path(folder)):
        raise UserError(
            f"{folder} is not a run: it has no {RECORD_FILE}.\n"
            "Give the folder that `vestige attribute ... --out RUN` wrote."
        )


def kind_of(folder: Path) -> str | None:
    """Return the `kind` in the record of a folder, "scores" where it has or reads none; None without a record."""
    try:
        stat = (folder / RECORD_FILE).stat()
    except OSError:
        return None
    return _read_kind(folder, stat.st_mtime_ns, stat.st_size)


@lru_cache(4096)
def _read_kind(folder: Path, *_: int) -> str:
    try:
        return _Tag.model_validate_json((folder / RECORD_FILE).read_bytes()).kind
    except (OSError, ValueError):
        return _Tag().kind


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a run of any kind that lacks none of its parts."""
    try:
        content = parse_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not content.get("missing")


def read_record(folder: str | Path, *, checked: bool = True) -> RunRecord:
    """Read and check the `run.json` of a run directory.

    Args:
        folder: The run.
        checked: Compare the run's tables with their digests; `open_dense` does so with the scores of all examples.

    Raises:
        UserError: there is no run, or a newer Vestige wrote it.
        CorruptFile: the file, or a table of the run, is not what Vestige wrote.
    """
    path = Path(folder) / RECORD_FILE
    require_run(folder)
    kind = kind_of(path.parent)
    if kind == "audit":
        raise UserError(f"{folder} is an audit and holds no scores. In Python: vestige.Audit.open({str(folder)!r})")
    if kind == "training":
        raise UserError(f"{folder} is a training and holds no scores. Type: vestige status {folder}")
    record = read_known(RunRecord, path, RUN_FORMAT)
    if checked:
        require_unaltered(path.parent, record.files, *(name for name in record.files if name != DENSE_FILE))
    return record


def read_known(kind: type[Record], path: Path, newest: int, *, whole: bool = True) -> Record:
    """Return the record in a file of JSON, of a format up to `newest`.

    Args:
        kind: Of the record; it may name some of the fields alone.
        path: Of the file.
        newest: The last format that this version reads.
        whole: Check the numbers of all fields; without, reading a few of them takes a twentieth of the time.

    Raises:
        UserError: A newer Vestige wrote it.
        CorruptFile: It is missing, or not what Vestige writes: no number is NaN or infinite there, for example.
    """
    try:
        content = path.read_bytes()
        header = _Header.model_validate_json(content)
        if header.format <= newest:
            if whole:
                parse_finite_json(content)
            return kind.model_validate_json(content)
    except (OSError, ValueError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise CorruptFile(
            f"{path} is not a {path.stem} record: {reason}. Run the command that made it again."
        ) from error
    raise UserError(
        f"{path.parent} was written by Vestige {header.vestige} in {path.stem} format {header.format}; "
        f"this version reads up to format {newest}.\nUpdate with `pip install --upgrade vestige`."
    )


class _Tag(Part):
    kind: str = "scores"


class _Header(_Tag):
    """The fields that must be readable in every format, past and future."""

    format: int
    vestige: str = "of a later version"


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
