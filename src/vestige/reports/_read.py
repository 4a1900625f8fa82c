"""A run as its page needs it: opened and checked, what stands above the ranking, and numbers as a reader says them."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vestige.errors import CorruptFile, UserError
from vestige.progress import format_count, format_memory
from vestige.runs import PARTS, Check, RunRecord, Scores, is_run

COMPONENTS = "components.json"
"""The result of `vestige evaluate components`."""
VERDICTS = {"good": ("good", "✓"), "warn": ("look closer", "!"), "unknown": ("unknown", "?")}
"""Word and sign of each verdict: colour is never the only carrier."""


def read_run(run: str | Path) -> Scores:
    """Open the run directory `run`, everything that its page shows read and checked.

    Raises:
        UserError: `run` is no run directory, or one of its files cannot be read; the message says what to type.
    """
    folder = Path(run)
    if not is_run(folder):
        raise UserError(_describe_no_run(folder))
    advice = (
        f"The run is damaged or still being written. Attribute again with --out {folder}, then: vestige report {folder}"
    )
    try:
        scores = Scores.open(folder)
        for name in ("queries", "examples", "scores"):
            if not (folder / f"{name}.parquet").is_file():
                raise UserError(f"{folder} has run.json but no {name}.parquet.\n{advice}")
        scores.all_listed()
        for part in ("components", "tokens"):
            scores.tables.parts(part)
    except CorruptFile as error:
        raise UserError(f"{error}\n{advice}") from error
    return scores


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


def make_header(scores: Scores) -> dict[str, Any]:
    """Return what stands on the page of a run without its script; what does not apply to its method is left out."""
    record = scores.run
    count = len(scores.queries)
    answers = "1 answer" if count == 1 else f"{count} answers"
    owner = f" of {shorten_name(record.model.name)}" if record.model else ""
    skipped = record.coverage.skipped if record.coverage else ()
    missing = [PARTS.get(name, name) for name in record.missing]
    return {
        "title": f"The training data behind {answers}{owner}",
        "subtitle": f"{record.method} · {shorten_name(record.data.name)}",
        "facts": _list_facts(scores),
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
        "missing": ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + "".join(missing[-1:]),
        "trust": _summarise_trust(record),
        "validated": record.trust.validated,
        "checks": [_make_chip(check) for check in record.trust.checks],
        "skipped": [each.model_dump() | {"parameters": format_count(each.parameters)} for each in skipped],
        "versions": join_versions(record.versions),
        "vestige": record.vestige,
    }


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


def _list_facts(scores: Scores) -> tuple[Fact, ...]:
    record = scores.run
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
        Fact("Run", scores.folder.resolve().name, note=record.created[:16].replace("T", " ")),
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
