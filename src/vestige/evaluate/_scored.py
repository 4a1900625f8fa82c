"""Whose scores are judged: finished runs, and runs that are made now and kept beside the result."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vestige.data import load_records
from vestige.errors import IndexMismatch, SpecError, UserError
from vestige.evaluate._aligned import Aligned, Ids, aligned
from vestige.indexes import Index
from vestige.methods import METHODS, attribute
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.runs import Scores, check_target as check_run_target, is_run, open_dense
from vestige.settings import ReadingSettings, ScoredSettings, Settings
from vestige.storage import make_folder, sha256_of, write_durably

OPPONENTS = ("random", "bm25", "rep-sim", "grad-cos")
"""What a method has to beat to be worth its cost."""

_WEIGHTS = (".safetensors", ".bin", ".json", ".gguf")


@dataclass(frozen=True)
class Scored:
    """One method's scores."""

    name: str
    """Of the method; of the folder too where two runs are of one method."""
    run: Scores
    opponent: bool = False
    """Whether it was not requested."""

    @property
    def seconds(self) -> float:
        """The seconds that the scores took."""
        return self.run.run.seconds

    @property
    def memory_bytes(self) -> int:
        """The most memory of the process that made them."""
        return self.run.run.peak_memory_bytes


@dataclass(frozen=True)
class Judged:
    """All scores of an evaluation, and notes about what is missing."""

    scored: tuple[Scored, ...]
    notes: tuple[str, ...] = ()


def judged(settings: ScoredSettings, kind: str, *, self_influence: bool = False) -> Judged:
    """Return the runs that were given, those of the methods requested, and the baselines', for the evaluation `kind`.

    Raises:
        SpecError: A method needs a model, data or queries that were not given.
        UserError: A run is not one, or was made with other settings than the ones of now.
    """
    require_own_files(settings, kind)
    given = [Scores.open(folder) for folder in settings.run]
    known = {run.run.method for run in given}
    wanted = list(dict.fromkeys(settings.methods))
    opponents, notes = _opponents(settings, known | set(wanted)) if settings.opponents else ([], [])
    if self_influence:
        opponents = []
    for name in wanted:
        METHODS.find(name)
    made = [_run_of(settings, name, self_influence) for name in [*wanted, *opponents]]
    names = _names([*given, *made])
    flags = [False] * (len(given) + len(wanted)) + [True] * len(opponents)
    scored = [Scored(name, run, flag) for name, run, flag in zip(names, [*given, *made], flags, strict=True)]
    return Judged(tuple(scored), tuple(notes))


def require_own_files(settings: Settings, kind: str) -> None:
    """Raise if a file that the evaluation `kind` writes is there and not an earlier one's; call it before the work.

    Raises:
        UserError: One is; nothing was changed.
    """
    out = Path(settings.arguments()["out"])
    try:
        found = json.loads((out / f"{kind}.json").read_bytes())
    except FileNotFoundError:
        found = None
    except (OSError, ValueError, RecursionError):
        found = False
    ours = isinstance(found, dict) and found.get("kind") == kind
    files = [out / f"{kind}.{ending}" for ending in ("json", "pdf", "png")]
    if not ours and (taken := [path for path in files if path.exists()]):
        raise UserError(
            f"{taken[0]} is there already, and not by `vestige evaluate {kind}`; nothing was changed. Choose another "
            "--out."
        )


def reading_of(settings: ReadingSettings) -> dict[str, Any]:
    """Return the settings of how text is read and the model runs, as arguments."""
    return {name: getattr(settings, name) for name in ReadingSettings.model_fields}


def run_of(
    settings: ScoredSettings,
    method: str,
    folder: Path,
    *,
    changes: dict[str, Any],
    self_influence: bool = False,
    live: dict[str, Any] | None = None,
) -> Scores:
    """Return the run of a method in `folder`: the one that is there, if it was made from the same, or a new one.

    Args:
        settings: Of the evaluation.
        method: Its name.
        folder: Of the run.
        changes: Arguments of `vestige attribute` that differ from the evaluation's.
        self_influence: Whether the run must hold self-influence.
        live: Objects to use in place of what settings and changes name; they follow from those.

    Raises:
        IndexMismatch: The run in the folder was made with other settings or from other files.
    """
    arguments = _arguments(settings, method, changes, self_influence)
    identity = _identity(arguments)
    marker = folder.with_name(f"{folder.name}.json")
    if is_run(folder):
        if not marker.exists() or not _holds(marker, identity):
            raise IndexMismatch(
                f"{folder} was made with other settings or from other files; nothing was changed. Give another --out."
            )
        return Scores.open(folder)
    check_run_target(folder)
    make_folder(folder.parent)
    announce(f"Scoring with {method}")
    write_durably(marker, [json.dumps(identity, indent=1).encode()])
    return attribute(**(arguments | (live or {})), out=folder)


def _run_of(settings: ScoredSettings, name: str, self_influence: bool) -> Scores:
    if settings.data is None and settings.index is None:
        raise SpecError(f"--methods {name} needs --data (with --model) or --index.")
    changes: dict[str, Any] = {}
    if settings.queries is None:
        if not self_influence:
            raise SpecError(f"--methods {name} needs --queries: the file, or the questions themselves.")
        # A run has a query; what an example is to itself does not depend on it.
        first = next(example for example, _ in load_records(settings.data, on_bad_text=settings.on_bad_text))
        ids = first.extra.get("input_ids")
        changes["queries"] = [{"text": first.display} if ids is None else {"input_ids": ids.tolist()}]
    return run_of(settings, name, settings.out / "runs" / name, changes=changes, self_influence=self_influence)


def _holds(marker: Path, identity: dict[str, Any]) -> bool:
    try:
        return parse_json(marker.read_bytes()) == identity
    except (OSError, ValueError):
        return False


def _arguments(settings: ScoredSettings, method: str, changes: dict[str, Any], self_influence: bool) -> dict[str, Any]:
    arguments = {
        **reading_of(settings),
        "model": settings.model,
        "queries": settings.queries,
        "damping": settings.damping,
        "seed": settings.seed,
        "method": method,
        "dense": True,
        "trust": False,
        "k": 50,
        "self_influence": self_influence,
    }
    if settings.index is not None:
        # The index holds how it was made.
        decided = ("loss", "max_length", "limit", *(["chat"] if settings.chat is None else []))
        for name in decided:
            del arguments[name]
        arguments["index"] = settings.index
    else:
        arguments |= {"data": settings.data, "components": settings.components}
    return arguments | changes


def _identity(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a run must share to be used again: settings, and the content of files."""
    words = {name: str(value) if _is_plain(value) else f"<{type(value).__name__}>" for name, value in arguments.items()}
    if words.get("chat") == "None":  # what earlier versions wrote where nothing was typed
        words["chat"] = "False"
    content = {name: _content(arguments.get(name)) for name in ("model", "data", "queries", "index")}
    return {"settings": words, "content": content}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Path | tuple | list | dict)


def _content(source: Any) -> str | None:
    if not isinstance(source, str | Path):
        return None
    try:
        path = Path(source)
        if path.is_file():
            return sha256_of(path)
        files = sorted(each for each in path.iterdir() if each.suffix in _WEIGHTS) if path.is_dir() else []
    except OSError:  # a question, not a path
        return None
    return hashlib.sha256("".join(each.name + sha256_of(each) for each in files).encode()).hexdigest()


def _opponents(settings: ScoredSettings, known: set[str]) -> tuple[list[str], list[str]]:
    """Return the baselines that can be computed here, and notes about the others."""
    missing = [name for name in OPPONENTS if name not in known]
    data = settings.queries is not None and (settings.data is not None or settings.index is not None)
    model = settings.model is not None or settings.index is not None
    possible = [name for name in missing if data and (model or not METHODS.find(name).needs_model)]
    left = [name for name in missing if name not in possible]
    words = "--model, --data and --queries" if not data else "--model"
    notes = [f"Without the baselines {', '.join(left)}: give {words} to have them judged too."] if left else []
    if "bm25" in possible and not _has_words(settings):
        possible.remove("bm25")
        notes.append("Without the baseline bm25: the training data are rows of tokens, which have no words.")
    return possible, notes


def _has_words(settings: ScoredSettings) -> bool:
    """Return whether the first training example has a text."""
    if settings.data is not None:
        return any(
            example.display for example, _ in islice(load_records(settings.data, on_bad_text=settings.on_bad_text), 1)
        )
    return bool(Index.open(settings.index).examples()[0].display)


def _names(runs: Sequence[Scores]) -> list[str]:
    methods = [run.run.method for run in runs]
    names = [
        method if methods.count(method) == 1 else f"{method} ({run.folder.name})"
        for method, run in zip(methods, runs, strict=True)
    ]
    # Two folders of one name: the whole path distinguishes them.
    return [
        name if names.count(name) == 1 else f"{run.run.method} ({run.folder})"
        for name, run in zip(names, runs, strict=True)
    ]


class Together(NamedTuple):
    """The scores of several runs under the same ids, in the order of the first."""

    queries: list[str]
    examples: Ids
    tables: list[Aligned]


def together(scored: Sequence[Scored]) -> Together:
    """Return all scores of several runs; where examples are in the same order, nothing of them is in memory.

    Raises:
        UserError: A run is of other queries or other examples.
    """
    first = open_dense(scored[0].run.folder)
    queries, examples = first.query_ids(), first.example_ids()
    tables = [Aligned(first, np.arange(len(queries)), len(examples), None)]
    for other in scored[1:]:
        try:
            table = aligned(other.run, queries, examples)
        except IndexMismatch:
            table = None
        if table is None or table.file.shape != first.shape:
            raise UserError(
                f"{scored[0].run.folder} and {other.run.folder} are of different queries or examples, so they cannot "
                "be compared. Judge them one by one."
            )
        tables.append(table)
    return Together(queries, examples, tables)
