"""What stands on a page without its script: title, facts and trust; and numbers as a reader says them."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vestige.progress import format_memory
from vestige.reports._read import RunFiles
from vestige.runs import PARTS, Check, RunRecord

VERDICTS = {"good": ("good", "✓"), "warn": ("look closer", "!"), "unknown": ("unknown", "?")}
"""Word and sign of each verdict: colour is never the only carrier."""


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
    return (*facts, describe_cost(record.seconds, record.peak_memory_bytes, record.peak_gpu_memory_bytes))


def _shorten_fingerprint(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:8]


def format_count(count: float) -> str:
    """Return a count as a reader says it: 912, 12,480, 134.5 M, 7.2 B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


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
