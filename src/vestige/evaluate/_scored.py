"""Whose scores are judged: finished runs, and runs that are made now; and their scores, a block at a time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.compute as compute
from jaxtyping import Bool, Float, Int

from vestige.data import find_focus, load_queries, load_records
from vestige.errors import IndexMismatch, SpecError, UserError
from vestige.indexes import Index
from vestige.methods import METHODS, Method, attribute
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.runs import DenseFile, Scores, check_target, id_array, is_complete, is_run, open_dense
from vestige.settings import ReadingSettings, ScoredSettings, Settings
from vestige.storage import make_folder, sha256_of, write_durably

_WEIGHTS = (".safetensors", ".bin", ".json", ".gguf")
_BLOCK_SCORES = 2**20
"""Scores that are read at once, for many queries."""
_BLOCK_EXAMPLES = 2**16
"""Examples of a block, at most."""


class Ids(Protocol):
    """Ids that can be gone through several times."""

    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class AlignedScores:
    """All scores of a run in the order of other ids, read a block of examples at a time."""

    file: DenseFile
    queries: Int[np.ndarray, "query"]
    """Row of the file that each of them is."""
    examples: int
    """How many were requested."""
    places: Int[np.ndarray, "stored"] | None = None
    """For each example of the file, which of those it is, and -1 for none; None where all are the same."""

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and examples."""
        return len(self.queries), self.examples

    def blocks(self) -> Iterator[tuple[Any, Float[np.ndarray, "query column"]]]:
        """Yield all scores with the positions of their examples among the requested, in the order of the file."""
        queries, examples = self.file.shape
        step = max(1, min(_BLOCK_EXAMPLES, _BLOCK_SCORES // max(queries, 1)))
        for start in range(0, examples, step):
            columns = slice(start, min(start + step, examples))
            scores = self.file.read(examples=columns)[self.queries]
            if self.places is None:
                yield columns, scores
            else:
                places = self.places[columns]
                yield places[places >= 0], scores[:, places >= 0]

    def of_query(self, query: int) -> Float[np.ndarray, "example"]:
        """Return one query's scores, in the order that was requested."""
        row = int(self.queries[query])
        scores = self.file.read(queries=slice(row, row + 1))[0]
        if self.places is None:
            return scores
        found = np.empty(self.examples, dtype=scores.dtype)
        found[self.places[self.places >= 0]] = scores[self.places >= 0]
        return found


def align_scores(run: Scores, queries: Sequence[str], examples: Ids) -> AlignedScores:
    """Return the scores of a run for these queries and examples, in this order.

    Raises:
        IndexMismatch: The run lacks some.
    """
    file = open_dense(run.folder)
    row = {name: number for number, name in enumerate(file.query_ids())}
    _require_none([name for name in queries if name not in row], "queries", len(queries), run)
    rows, stored = np.array([row[name] for name in queries], dtype=np.int64), file.example_ids()
    if len(stored) == len(examples) and all(map(eq, stored, examples)):
        return AlignedScores(file, rows, len(examples))
    # Arrow keeps ids in a few bytes each, a dictionary of them does not.
    wanted = id_array(examples)
    found = compute.index_in(id_array(stored), value_set=wanted)  # pyright: ignore[reportAttributeAccessIssue]
    places = np.concatenate([part.fill_null(-1).to_numpy(zero_copy_only=False) for part in found.chunks])
    absent = np.ones(len(examples), dtype=bool)
    absent[places[places >= 0]] = False
    _require_none([wanted[row].as_py() for row in np.flatnonzero(absent).tolist()], "examples", len(examples), run)
    return AlignedScores(file, rows, len(examples), places)


def _require_none(absent: list[str], what: str, wanted: int, run: Scores) -> None:
    if absent:
        raise IndexMismatch(
            f"{run.folder} has no scores for {len(absent)} of the {wanted} {what}, such as {absent[0]!r}. It must be "
            f"made with the same {what}, under the same ids."
        )


def sum_over_sets(
    scores: "AlignedScores | Float[np.ndarray, 'query example']", sets: Bool[np.ndarray, "set example"]
) -> Float[np.ndarray, "set query"]:
    """Sum each query's scores over the examples of each set, in float64."""
    blocks = scores.blocks() if isinstance(scores, AlignedScores) else [(slice(None), scores)]
    total = np.zeros((len(sets), scores.shape[0]))
    for places, part in blocks:
        total += sets[:, places].astype(np.float64) @ part.astype(np.float64).T
    return total


@dataclass(frozen=True)
class Scored:
    """One method's scores."""

    name: str
    """Of the method; of the folder too where two runs are of one method."""
    run: Scores
    opponent: bool = False
    """Whether it is a baseline that was not requested."""


class ScoredRuns(NamedTuple):
    """All scores of an evaluation, and notes about what is missing."""

    scored: tuple[Scored, ...]
    notes: tuple[str, ...] = ()


def collect_scores(settings: ScoredSettings, kind: str, *, self_influence: bool = False) -> ScoredRuns:
    """Return the runs that were given, those of the methods requested, and the baselines', for the evaluation `kind`.

    Raises:
        SpecError: A method needs a model, data or queries that were not given.
        UserError: A run is not one, or was made with other settings than the ones of now.
    """
    require_own_files(settings, kind)
    given, wanted = [Scores.open(folder) for folder in settings.run], list(dict.fromkeys(settings.methods))
    baselines, notes = _choose_baselines(settings, {run.run.method for run in given} | {*wanted})
    if self_influence:
        baselines = []
    for name in wanted:
        METHODS.find(name)
    runs = given + [_run_method(settings, name, self_influence) for name in [*wanted, *baselines]]
    first = len(given) + len(wanted)
    scored = [Scored(name, run, row >= first) for row, (name, run) in enumerate(zip(_names(runs), runs, strict=True))]
    return ScoredRuns(tuple(scored), tuple(notes))


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


def keep_run(
    settings: ScoredSettings, folder: Path, arguments: dict[str, Any], live: dict[str, Any] | None = None
) -> Scores:
    """Return the run in `folder`: the one that is there, if it was made from the same, or a new one.

    Args:
        settings: Of the evaluation.
        folder: Of the run.
        arguments: Of `vestige attribute`: the method, and what differs from the evaluation's settings.
        live: Objects to use in place of what settings and arguments name; they follow from those.

    Raises:
        IndexMismatch: The run in the folder was made with other settings or from other files.
    """
    arguments = _attribute_arguments(settings) | arguments
    identity, marker = _identity(arguments), folder.with_name(f"{folder.name}.json")
    if is_run(folder):
        try:
            same = parse_json(marker.read_bytes()) == identity
        except (OSError, ValueError):
            same = False
        if not same:
            raise IndexMismatch(
                f"{folder} was made with other settings or from other files; nothing was changed. Give another --out."
            )
    else:
        check_target(folder)
    if is_complete(folder):
        return Scores.open(folder)
    make_folder(folder.parent)
    announce(f"Scoring with {arguments['method']}")
    write_durably(marker, [json.dumps(identity, indent=1).encode()])
    return attribute(**(arguments | (live or {})), out=folder)


def _run_method(settings: ScoredSettings, name: str, self_influence: bool) -> Scores:
    if settings.data is None and settings.index is None:
        raise SpecError(f"--methods {name} needs --data (with --model) or --index.")
    arguments: dict[str, Any] = {"method": name, "self_influence": self_influence}
    if settings.queries is None:
        if not self_influence:
            raise SpecError(f"--methods {name} needs --queries: the file, or the questions themselves.")
        # A run has a query; what an example is to itself does not depend on it.
        first = next(example for example, _ in load_records(settings.data, **settings.reading))
        ids = first.extra.get("input_ids")
        arguments["queries"] = [{"text": first.display} if ids is None else {"input_ids": ids.tolist()}]
    return keep_run(settings, settings.out / "runs" / name, arguments)


def _attribute_arguments(settings: ScoredSettings) -> dict[str, Any]:
    names = (*ReadingSettings.model_fields, "model", "queries", "damping", "seed")
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in names}
    arguments |= {"dense": True, "trust": False, "k": 50, "self_influence": False}
    if settings.index is None:
        return arguments | {"data": settings.data, "components": settings.components}
    # The index holds how it was made.
    for name in ("loss", "max_length", "limit", "where", *(["chat"] if settings.chat is None else [])):
        del arguments[name]
    return arguments | {"index": settings.index}


def _identity(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a run must share to be used again: settings, and the content of files."""
    plain = (bool, int, float, str, Path, tuple, list, dict, type(None))
    words = {
        name: str(value) if isinstance(value, plain) else f"<{type(value).__name__}>"
        for name, value in arguments.items()
    }
    if words.get("chat") == "None":  # what earlier versions wrote where nothing was typed
        words["chat"] = "False"
    content = {name: _content(arguments.get(name)) for name in ("model", "data", "queries", "index")}
    return {"settings": words, "content": content}


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


def list_baselines() -> list[type[Method]]:
    """Return the methods that every evaluation judges too, cheapest first."""
    return sorted((found for found in METHODS if found.baseline is not None), key=lambda found: found.baseline or 0)


def _choose_baselines(settings: ScoredSettings, known: set[str]) -> tuple[list[str], list[str]]:
    """Return the baselines that can be computed here, and notes about the others."""
    if not settings.opponents:
        return [], []
    data = settings.queries is not None and (settings.data is not None or settings.index is not None)
    model = settings.model is not None or settings.index is not None
    missing = [found for found in list_baselines() if found.name not in known]
    possible = [found for found in missing if data and (model or not found.needs_model)]
    left = [found.name for found in missing if found not in possible]
    words = "--model" if data else "--model, --data and --queries"
    notes = [f"Without the baselines {', '.join(left)}: give {words} to have them judged too."] if left else []
    lexical = [found.name for found in possible if found.searches_words]
    if lexical and not _has_words(settings):
        possible = [found for found in possible if not found.searches_words]
        without = f"Without the baseline {', '.join(lexical)}: "
        notes.append(f"{without}the training data are rows of tokens, which have no words.")
    given = (
        find_focus(load_queries(settings.queries, focus="read", on_bad_text=settings.on_bad_text)) if possible else {}
    )
    if unfit := [found for found in possible if not set(given) <= {*found.reads_focus}]:
        possible = [found for found in possible if found not in unfit]
        names, fields = ", ".join(found.name for found in unfit), " and ".join(f"`{name}`" for name in given)
        notes.append(f"Without the baselines {names}: the queries have {fields}, which they do not take.")
    return [found.name for found in possible], notes


def _has_words(settings: ScoredSettings) -> bool:
    """Return whether the first training example has a text."""
    if settings.data is None:
        return bool(Index.open(settings.index).examples()[0].display)
    records = load_records(settings.data, **settings.reading)
    return any(example.display for example, _ in islice(records, 1))


def _names(runs: Sequence[Scores]) -> list[str]:
    """Return the methods, with the folder's name where several runs are of one, and its path where names are equal."""
    methods = [run.run.method for run in runs]
    pairs = list(zip(methods, runs, strict=True))
    names = [one if methods.count(one) == 1 else f"{one} ({run.folder.name})" for one, run in pairs]
    return [
        name if names.count(name) == 1 else f"{one} ({run.folder})"
        for name, (one, run) in zip(names, pairs, strict=True)
    ]


def read_together(scored: Sequence[Scored]) -> tuple[list[str], Ids, list[AlignedScores]]:
    """Return query ids, example ids, and the scores of several runs under these, in the order of the first.

    Raises:
        UserError: A run is of other queries or other examples.
    """
    first = open_dense(scored[0].run.folder)
    queries, examples = first.query_ids(), first.example_ids()
    tables = [AlignedScores(first, np.arange(len(queries)), len(examples))]
    for other in scored[1:]:
        try:
            table = align_scores(other.run, queries, examples)
        except IndexMismatch:
            table = None
        if table is None or table.file.shape != first.shape:
            raise UserError(
                f"{scored[0].run.folder} and {other.run.folder} are of different queries or examples, so they cannot "
                "be compared. Judge them one by one."
            )
        tables.append(table)
    return queries, examples, tables
