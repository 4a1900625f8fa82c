"""The table of a component search as rows of a study, and what was expected of it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from vestige.evaluate import Estimate, Evaluation
from vestige.launch import is_follower
from vestige.storage import is_temporary, sha256_of, write_durably
from vestige_recipes.common.packages import package_folder
from vestige_recipes.common.registry import Gate
from vestige_recipes.common.steps import shown_interval

_RECORD = "part.json"
_NO_RESULTS = ("launch", "__pycache__")
"""Folders that hold no result."""


class Part(NamedTuple):
    """What one part of a study found."""

    rows: Sequence[Sequence[Any]]
    gates: Sequence[Gate]
    details: Mapping[str, Any]


def kept_part(folder: Path, made_of: Mapping[str, Any], work: Callable[[], Part]) -> Part:
    """Return what `work` returns, or returned when it was last done for this folder.

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
    """Return the record, if it is whole and of this fingerprint."""
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


FULL = "full gradient"
COLUMNS = (
    "data",
    "candidates",
    "representation",
    "accuracy",
    "95 % interval",
    "minus full",
    "95 % interval",
    "agreement",
    "centred",
    "parameters",
    "backward",
    "bytes",
    "seconds",
)


def component_rows(part: str, found: Evaluation) -> list[tuple[Any, ...]]:
    """Every representation, and the best and the median component by itself."""
    rows = []
    for words, each in found.details["candidates"].items():
        rows += [(part, words, *_cells(one)) for one in each["representations"]]
        single = sorted(each["components"], key=lambda one: one["accuracy"].value)
        # Shares are of all parameters of the model, also of those that no component holds.
        total = sum(one["parameters"] for one in single) / _representation(found, words, FULL)["parameters"]
        for label, one in (("best", single[-1]), ("median", single[len(single) // 2]), ("worst", single[0])):
            name = f"{label} component, all queries: {one['name'].removesuffix('.weight')}"
            size = one["parameters"]
            known = {"name": name, "parameters": size / total, "bytes": 4 * size, "seconds": None, "against_full": None}
            rows.append((part, words, *_cells(one | known)))
    return rows


def _cells(one: Mapping[str, Any]) -> tuple[Any, ...]:
    against = one["against_full"]
    shares = [one["parameters"], one["backward"]]
    return (
        one["name"],
        one["accuracy"].value,
        shown_interval(one["accuracy"]),
        "" if against is None else against.value,
        "" if against is None else shown_interval(against),
        *("" if one[name] is None else _number(one[name]) for name in ("agreement", "centred")),
        *("" if share is None else f"{share:.2%}" for share in shares),
        "" if one["bytes"] is None else one["bytes"],
        "" if one["seconds"] is None else f"{one['seconds']:.1f}",
    )


def _number(value: Estimate | float) -> float:
    return float(value.value if isinstance(value, Estimate) else value)


def gates_of_sets(part: str, found: Evaluation, words: str, tolerance: float) -> list[Gate]:
    """Return what was published: a few components do as well as all; here they were chosen on other queries."""
    names = ("best component, held out", "greedy for accuracy, held out")
    gains = [(name, ahead_of(found, words, name, FULL)) for name in names]
    agreeing = _representation(found, words, "greedy for agreement, held out")
    # Of those that take part: LoRA's are a few hundredths of all.
    share = agreeing["parameters"] / _representation(found, words, FULL)["parameters"]
    return [
        *(Gate(f"{part}, {words}: {name}, minus full", gain, ">=", -tolerance) for name, gain in gains),
        Gate(f"{part}, {words}: parameters of the set that agrees", share, "<=", 0.1),
        Gate(f"{part}, {words}: agreement of that set, held out", agreeing["agreement"].value, ">=", 0.99),
    ]


def ahead_of(found: Evaluation, words: str, name: str, other: str) -> float:
    """Accuracy of one representation minus that of another one."""
    one, opponent = (_representation(found, words, each)["accuracy"].value for each in (name, other))
    return one - opponent


def _representation(found: Evaluation, words: str, name: str) -> Mapping[str, Any]:
    each = found.details["candidates"][words]["representations"]
    return next(one for one in each if one["name"] == name)
