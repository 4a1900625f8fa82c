"""A run as its page needs it: what its files hold, what stands above the ranking, and numbers as a reader says them."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from vestige.errors import CorruptFile, UserError
from vestige.progress import format_count, format_memory
from vestige.runs import PARTS, Check, RunRecord, is_run, question_of, read_record, read_run_table, turns_of

COMPONENTS = "components.json"
"""The result of `vestige evaluate components`."""
PAIR = tuple[str, str]
"""(query id, example id)."""
VERDICTS = {"good": ("good", "✓"), "warn": ("look closer", "!"), "unknown": ("unknown", "?")}
"""Word and sign of each verdict: colour is never the only carrier."""


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
    explained: str = ""
    """What of the answer is explained, in words; empty for the whole."""


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


def require_page(folder: Path) -> None:
    """Raise if a path is no folder: there is nothing to show.

    Raises:
        UserError: It is not there, or is a file.
    """
    if not folder.is_dir():
        raise UserError(_describe_no_run(folder))


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
    found = question_of(row)
    return Query(str(row["query_id"]), _make_wording(row), found.generated, found.loss, found.explained)


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


class Fact(NamedTuple):
    """A labelled line of the header; `code` is set in a monospaced face, `note` is muted."""

    label: str
    value: str
    code: str | None = None
    note: str | None = None


class Chip(NamedTuple):
    """One chip of the trust strip."""

    name: str
    value: str
    reading: str
    verdict: str
    word: str
    sign: str


def make_header(run: RunFiles) -> dict[str, Any]:
    """Return what stands on the page of `run` without its script; what does not apply to its method is left out."""
    record = run.record
    count = len(run.queries)
    answers = "1 answer" if count == 1 else f"{count} answers"
    owner = f" of {shorten_name(record.model.name)}" if record.model else ""
    skipped = record.coverage.skipped if record.coverage else ()
    return {
        "title": f"The training data behind {answers}{owner}",
        "subtitle": f"{record.method} · {shorten_name(record.data.name)}",
        "facts": _list_facts(run),
        "command": cut_command(record.command),
        "sign": _make_sentence(record.meaning.sign),
        "estimates": _make_sentence(record.meaning.estimates),
        "meaning": (
            Fact("Unit", record.meaning.unit),
            Fact("About", record.meaning.target),
            Fact("Divided by", record.meaning.normalisation),
        ),
        "causal": record.meaning.causal,
        "limits": _make_sentence(record.meaning.limits),
        "missing": _describe_missing(record),
        "trust": _summarise_trust(record),
        "validated": record.trust.validated,
        "checks": [_make_chip(check) for check in record.trust.checks],
        "skipped": [each.model_dump() | {"parameters": format_count(each.parameters)} for each in skipped],
        "versions": join_versions(record.versions),
        "vestige": record.vestige,
    }


def _describe_missing(record: RunRecord) -> str:
    """Return the parts of a run that were requested and are not there yet, in words; nothing for a complete run."""
    names = [PARTS.get(name, name) for name in record.missing]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _summarise_trust(record: RunRecord) -> str:
    """Return one line: how many checks are fine, whether the scores were compared with retraining, and what is not."""
    checks = record.trust.checks
    count = Counter(check.verdict for check in checks)
    none = "Checks are not there yet" if "checks" in record.missing else "No check was run"
    words = f"{count['good']} of {len(checks)} checks fine" if checks else none
    words += f", {count['unknown']} without a finding" if count["unknown"] else ""
    words += ", validated" if record.trust.validated else ", not validated"
    others = [check.name for check in checks if check.verdict == "warn"]
    return f"{words} · look closer: {', '.join(others)}" if others else words


def cut_command(command: str) -> list[str]:
    """Return a command cut before each option, so that a line breaks between options."""
    return re.split(r" (?=--)", command.strip()) if command else []


def join_versions(versions: Mapping[str, str]) -> str:
    """Return the versions of packages as one line."""
    return " · ".join(f"{name} {version}" for name, version in versions.items())


def describe_cost(seconds: float, peak_memory_bytes: int, peak_gpu_memory_bytes: int) -> "Fact":
    """Return how long a run took, and with how much memory."""
    memory = f"{format_memory(peak_memory_bytes, peak_gpu_memory_bytes)} at most" if peak_memory_bytes else None
    return Fact("Took", format_duration(seconds), note=memory)


def shorten_name(name: str) -> str:
    """Return the last part of a path or hub id: what a reader calls the thing."""
    return name.rstrip("/").rsplit("/", 1)[-1] or "unnamed"


def _list_facts(run: RunFiles) -> tuple[Fact, ...]:
    record = run.record
    facts = []
    if record.model:
        parameters = f"{format_count(record.model.parameters)} parameters"
        facts.append(
            Fact("Model", shorten_name(record.model.name), _shorten_fingerprint(record.model.fingerprint), parameters)
        )
    examples = f"{format_count(record.data.examples)} examples"
    facts += [
        Fact("Training data", shorten_name(record.data.name), _shorten_fingerprint(record.data.fingerprint), examples),
        Fact("Method", record.method),
        Fact("Run", run.folder.resolve().name, note=record.created[:16].replace("T", " ")),
    ]
    if record.coverage and record.coverage.total:
        share = record.coverage.selected / record.coverage.total
        note = f"{format_count(record.coverage.selected)} of {format_count(record.coverage.total)}"
        facts.append(Fact("Parameters covered", "100%" if share == 1 else f"{100 * share:.1f}%", note=note))
    if record.asked:
        facts.append(Fact("Questions", f"put {record.asked}"))
    if record.ladder is not None:
        costs = ", ".join(f"{rung.name} {format_duration(rung.seconds)}" for rung in record.ladder.rungs)
        facts.append(Fact("Scored exactly", f"{len(record.ladder.candidates):,} examples", note=costs))
    if record.explained:
        facts.append(Fact("Explained", record.explained))
    return (*facts, describe_cost(record.seconds, record.peak_memory_bytes, record.peak_gpu_memory_bytes))


def _shorten_fingerprint(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:8]


def format_duration(seconds: float) -> str:
    """Return a time as a reader says it: 8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_span(span: Sequence[float | None]) -> str:
    """Format a value and its interval as the page writes them."""
    value, low, high = span
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def format_percent(share: float) -> str:
    """Return a share as a reader says it: 37.35%, 0.042%."""
    return f"{share:.2%}" if share >= 0.01 or not share else f"{100 * share:.2g}%"


def format_value(value: float | None) -> str:
    """Format a number with three decimals; nothing where it is not known."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "−")


def _make_sentence(text: str) -> str:
    """Return `text` with a capital and a full stop, or nothing for nothing."""
    words = text.strip()
    if not words:
        return ""
    return words[0].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")


def _make_chip(check: Check) -> Chip:
    word, sign = VERDICTS[check.verdict]
    shown = "–" if check.value is None else f"{check.value:.2f}".replace("-", "−")
    return Chip(check.name[:1].upper() + check.name[1:], shown, check.reading, check.verdict, word, sign)
