"""The top of the page in words: what was run, what a score means, how far it was checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vestige.report._read import RunFiles

VERDICTS = {"good": ("good", "✓"), "warn": ("look closer", "!"), "unknown": ("unknown", "?")}
"""Word and sign of each verdict: colour is never the only carrier."""


class Fact(NamedTuple):
    """A labelled line of the header; `code` is set in a monospaced face, `note` is muted."""

    label: str
    value: str
    code: str | None = None
    note: str | None = None


class Check(NamedTuple):
    """One chip of the trust strip."""

    name: str
    value: str
    reading: str
    verdict: str
    word: str
    sign: str


class Skipped(NamedTuple):
    """A component that the run did not cover."""

    name: str
    parameters: str
    reason: str


@dataclass(frozen=True)
class Header:
    """Everything on the page that stands there without its script."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    command: tuple[str, ...]
    """Cut before each option, so that a line breaks between options."""
    sign: str
    estimates: str
    meaning: tuple[Fact, ...]
    """Unit, target and normalisation."""
    limits: str
    validated: bool
    checks: tuple[Check, ...]
    skipped: tuple[Skipped, ...]
    versions: str
    vestige: str


def header_of(run: RunFiles) -> Header:
    """Return the header of `run`; a part that run.json lacks is left out or called unknown."""
    info = run.info
    model, data = info.get("model") or {}, info.get("data") or {}
    meaning, trust = info.get("meaning") or {}, info.get("trust") or {}
    count = len(run.queries)
    answers = "1 answer" if count == 1 else f"{count} answers"
    owner = f" of {short_name(model['name'])}" if model.get("name") else ""
    return Header(
        title=f"The training data behind {answers}{owner}",
        subtitle=f"{info.get('method', 'unknown method')} · {short_name(data.get('name'))}",
        facts=_facts(run, model, data),
        command=tuple(re.split(r" (?=--)", str(info.get("command") or "").strip())) if info.get("command") else (),
        sign=_sentence(meaning.get("sign")),
        estimates=_sentence(meaning.get("estimates")),
        meaning=_meaning(meaning),
        limits=_sentence(meaning.get("limits")),
        validated=bool(trust.get("validated")),
        checks=tuple(_check(check) for check in trust.get("checks") or ()),
        skipped=tuple(_skipped(entry) for entry in (info.get("coverage") or {}).get("skipped") or ()),
        versions=" · ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items()),
        vestige=str(info.get("vestige", "")),
    )


def short_name(name: Any) -> str:
    """Return the last part of a path or hub id: what a reader calls the thing."""
    return str(name or "unknown").rstrip("/").rsplit("/", 1)[-1]


def _facts(run: RunFiles, model: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[Fact, ...]:
    info = run.info
    facts = []
    if model:
        facts.append(Fact("Model", short_name(model.get("name")), _fingerprint(model), _count(model, "parameters")))
    facts += [
        Fact("Training data", short_name(data.get("name")), _fingerprint(data), _count(data, "examples")),
        Fact("Method", str(info.get("method", "unknown"))),
        Fact("Run", run.folder.resolve().name, note=str(info.get("created") or "")[:16].replace("T", " ")),
    ]
    coverage = info.get("coverage") or {}
    if coverage.get("total"):
        selected, total = compact(coverage["selected"]), compact(coverage["total"])
        facts.append(Fact("Parameters covered", _percent(coverage), note=f"{selected} of {total}"))
    if info.get("seconds") is not None:
        memory = info.get("peak_memory_bytes")
        note = f"{memory / 2**30:.1f} GiB at most" if memory else None
        facts.append(Fact("Took", duration(float(info["seconds"])), note=note))
    return tuple(facts)


def _percent(coverage: Mapping[str, Any]) -> str:
    share = coverage["selected"] / coverage["total"]
    return "100%" if share == 1 else f"{100 * share:.1f}%"


def _fingerprint(thing: Mapping[str, Any]) -> str | None:
    return str(thing["fingerprint"]).removeprefix("sha256:")[:8] if thing.get("fingerprint") else None


def _count(thing: Mapping[str, Any], what: str) -> str | None:
    return f"{compact(thing[what])} {what}" if thing.get(what) is not None else None


def compact(count: float) -> str:
    """Return a count as a reader says it: 912, 12,480, 134.5 M, 7.2 B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    """Return a time as a reader says it: 8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _meaning(meaning: Mapping[str, Any]) -> tuple[Fact, ...]:
    names = {"unit": "Unit", "target": "About", "normalisation": "Divided by"}
    return tuple(Fact(label, str(meaning[key])) for key, label in names.items() if meaning.get(key))


def _sentence(text: Any) -> str:
    """Return `text` with a capital and a full stop, or nothing for nothing."""
    words = str(text or "").strip()
    if not words:
        return ""
    return words[0].upper() + words[1:] + ("" if words[-1] in ".!?" else ".")


def _check(check: Mapping[str, Any]) -> Check:
    verdict = check.get("verdict") if check.get("verdict") in VERDICTS else "unknown"
    word, sign = VERDICTS[str(verdict)]
    value = check.get("value")
    shown = "–" if value is None else f"{value:.2f}".replace("-", "−")
    return Check(str(check.get("name", "")), shown, str(check.get("reading") or ""), str(verdict), word, sign)


def _skipped(entry: Mapping[str, Any]) -> Skipped:
    return Skipped(str(entry.get("name")), compact(entry.get("parameters") or 0), str(entry.get("reason") or ""))
