"""A run directory, read into plain frozen values. Nothing here needs a model, or torch."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vestige.errors import CorruptFile, UserError
from vestige.runs import RunRecord, is_run, read_record, read_run_table, turns_of

COMPONENTS = "components.json"
"""The result of `vestige evaluate components`."""
PAIR = tuple[str, str]
"""(query id, example id)."""


@dataclass(frozen=True)
class Wording:
    """The words of a query or an example, and the tokens that the model saw."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn."""
    tokens: tuple[str, ...] | None = None
    targets: tuple[bool, ...] | None = None
    """One per token: True where its prediction enters the loss."""


class Query(NamedTuple):
    """A query of the run."""

    id: str
    wording: Wording
    generated: bool
    loss: float | None


class TrainingExample(NamedTuple):
    """A training example that is listed for at least one query."""

    id: str
    row: int
    wording: Wording
    source: str | None
    label: str | None
    length: int | None
    duplicates: int | None


class RankedScore(NamedTuple):
    """One listed example of one query."""

    end: str
    rank: int
    row: int
    """Position in the training data: ids may repeat, rows do not."""
    example: str
    score: float
    percentile: float | None


@dataclass(frozen=True)
class RunFiles:
    """Everything that the page shows, as the run's files hold it."""

    folder: Path
    record: RunRecord
    """run.json."""
    queries: tuple[Query, ...]
    examples: dict[int, TrainingExample]
    """By row."""
    ranked: dict[str, tuple[RankedScore, ...]]
    """By query id: proponents by rank, then opponents by rank."""
    components: dict[PAIR, dict[str, float]] | None = None
    """Score of each component, by parameter name; None when the run has no component table."""
    tokens: dict[PAIR, dict[int, float]] | None = None
    """Score of each token, by position in the example; None when the run has no token table."""


def read_run(run: str | Path) -> RunFiles:
    """Return the contents of the run directory `run`.

    Raises:
        UserError: `run` is no run directory, or one of its files cannot be read; the message says what to type.
    """
    folder = Path(run)
    if not is_run(folder):
        raise UserError(_describe_no_run(folder))
    try:
        record = read_record(folder)
    except CorruptFile as error:
        raise UserError(f"{error}\n{_advise_rerun(folder)}") from error
    queries = tuple(_make_query(row) for row in _read_rows(folder, "queries"))
    examples = {example.row: example for example in map(_make_example, _read_rows(folder, "examples"))}
    ranked = _read_ranked(folder, queries, examples)
    components, tokens = (
        None if name in record.missing else _read_pairs(folder, name, key, examples)
        for name, key in (("components", "component"), ("tokens", "position"))
    )
    return RunFiles(folder, record, queries, examples, ranked, components, tokens)


def _describe_no_run(folder: Path) -> str:
    """Say what was found instead of a run directory, and what to type next."""
    usage = "A run directory holds run.json and scores.parquet; `vestige attribute ... --out RUN` writes one."
    if not folder.exists():
        return f"{folder} does not exist.\n{usage}\nThen: vestige report RUN"
    if folder.is_file():
        return f"{folder} is a file, not a run directory.\n{usage}\nThen: vestige report {folder.parent}"
    if (folder / "manifest.json").is_file():
        return (
            f"{folder} is an index, not a run: it holds gradients, but no scores yet.\n"
            f"Type: vestige attribute --index {folder} --queries QUERIES --out RUN\nThen: vestige report RUN"
        )
    nearby = sorted(found.parent for found in folder.glob("*/run.json"))
    if nearby:
        return f"{folder} is not a run directory, but {nearby[0]} is.\nType: vestige report {nearby[0]}"
    return f"{folder} is not a run directory: it has no run.json.\n{usage}\nThen: vestige report RUN"


def _advise_rerun(folder: Path) -> str:
    return (
        f"The run is damaged or still being written. Attribute again with --out {folder}, then: vestige report {folder}"
    )


def _read_table(folder: Path, name: str) -> pa.Table:
    """Return the table `name`.parquet with its columns checked."""
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise UserError(f"{folder} has run.json but no {file.name}.\n{_advise_rerun(folder)}")
    try:
        return read_run_table(folder, name)
    except CorruptFile as error:
        raise UserError(f"{error}\n{_advise_rerun(folder)}") from error


def _read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return _read_table(folder, name).to_pylist()


def _read_ranked(
    folder: Path, queries: Iterable[Query], examples: dict[int, TrainingExample]
) -> dict[str, tuple[RankedScore, ...]]:
    """Return the listed examples of each query, proponents first."""
    listed: dict[str, list[RankedScore]] = {query.id: [] for query in queries}
    for row in _read_rows(folder, "scores"):
        query, example = str(row["query_id"]), int(row["row"])
        if query not in listed or example not in examples:
            raise UserError(
                f"{folder / 'scores.parquet'} names query {query!r} and training row {example}, which are not both in "
                f"queries.parquet and examples.parquet.\n{_advise_rerun(folder)}"
            )
        rank, name, score = int(row["rank"]), str(row["example_id"]), float(row["score"])
        listed[query].append(RankedScore(row["end"], rank, example, name, score, row.get("percentile")))
    return {
        query: tuple(sorted(entries, key=lambda entry: (entry.end != "proponent", entry.rank)))
        for query, entries in listed.items()
    }


def _read_pairs(
    folder: Path, name: str, key: str, examples: dict[int, TrainingExample]
) -> dict[PAIR, dict[Any, float]] | None:
    """Return scores by (query, example) and then by `key`, or None when the optional table is absent.

    The table names examples by id. Where several listed examples share an id, its parts cannot be distinguished: they
    are left out rather than shown for the wrong example.
    """
    if not (folder / f"{name}.parquet").is_file():
        return None
    table = _read_table(folder, name)
    columns = (table[column].to_pylist() for column in ("query_id", "example_id", key, "score"))
    uses = Counter(example.id for example in examples.values())
    scores: dict[PAIR, dict[Any, float]] = defaultdict(dict)
    for query, example, part, score in zip(*columns, strict=True):
        if uses[example] == 1:
            scores[query, example][part] = score
    return dict(scores)


def _make_query(row: dict[str, Any]) -> Query:
    return Query(str(row["query_id"]), _make_wording(row), bool(row.get("generated")), row.get("loss"))


def _make_example(row: dict[str, Any]) -> TrainingExample:
    more = {name: row.get(name) for name in ("source", "label", "length", "duplicates")}
    return TrainingExample(str(row["example_id"]), int(row["row"]), _make_wording(row), **more)


def _make_wording(row: dict[str, Any]) -> Wording:
    tokens, targets = row.get("tokens"), row.get("targets")
    return Wording(
        text=row.get("text"),
        prompt=row.get("prompt"),
        completion=row.get("completion"),
        messages=turns_of(row.get("messages")),
        tokens=tuple(tokens) if tokens else None,
        targets=tuple(bool(target) for target in targets) if targets else None,
    )
