"""A finished part of a study is read back, as long as it is made of the same things and its files are whole."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vestige.files import is_temporary, sha256_of, write_durably
from vestige.launch import is_follower
from vestige_recipes.common.registry import Gate
from vestige_recipes.select_or_project.texts import package_folder

_RECORD = "part.json"
_NO_RESULTS = ("launch", "__pycache__")
"""Folders that hold no result."""


class Part(NamedTuple):
    """What one part of a study found."""

    rows: Sequence[Sequence[Any]]
    gates: Sequence[Gate]
    details: Mapping[str, Any]


def kept_part(folder: Path, made_of: Mapping[str, Any], work: Callable[[], Part]) -> Part:
    """What `work` returns, or returned when it was last done for this folder.

    It is done again when anything in `made_of` is another, when this is another version of vestige, or when a file in
    the folder is missing, new or does not hold what it held; `work` itself finds what is finished inside it.

    Args:
        folder: Where `work` leaves all its files.
        made_of: Everything that decides the result, in JSON terms.
        work: Does the work.
    """
    path = folder / _RECORD
    fingerprint = _digest({**made_of, "vestige": version("vestige")})
    if (found := _read(path, fingerprint)) is not None and found["files"] == _files(folder):
        gates = [Gate(**gate) for gate in found["gates"]]
        return Part([tuple(row) for row in found["rows"]], gates, found["details"])
    done = work()
    if not is_follower():
        content = {
            "made_of": fingerprint,
            "files": _files(folder),
            "rows": [list(row) for row in done.rows],
            "gates": [asdict(gate) for gate in done.gates],
            "details": done.details,
        }
        written = json.dumps(content)
        write_durably(path, [json.dumps({"sha256": _digest(json.loads(written)), "part": content}, indent=1).encode()])
    return done


def package_digest(modules: Sequence[str]) -> str:
    """sha256 over the files of installed packages.

    Raises:
        MissingExtra: One is not installed.
    """
    return _digest({module: _files(package_folder(module)) for module in modules})


def _read(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The record, if it is whole and of this fingerprint."""
    try:
        record = json.loads(path.read_bytes())
        part = record["part"]
        whole = record["sha256"] == _digest(part) and part["made_of"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return part if whole else None


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file by its place, but for the record and what holds no result."""
    found = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_result = place.name != _RECORD and not set(place.parts) & set(_NO_RESULTS)
        if is_result and path.is_file() and not is_temporary(path):
            found[place.as_posix()] = sha256_of(path)
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
