"""What the page's script is given: one JSON value per run, small enough to stand inside the file."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from vestige.errors import UserError
from vestige.progress import format_memory
from vestige.reports._read import Query, RunFiles, TrainingExample
from vestige.reports._texts import Pieces, Word, cut, find_overlap, find_rare_words, split_words
from vestige.runs import Check

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
        "limits": _make_sentence(record.meaning.limits),
        "validated": record.trust.validated,
        "checks": [_make_chip(check) for check in record.trust.checks],
        "skipped": [each.model_dump() | {"parameters": format_count(each.parameters)} for each in skipped],
        "versions": join_versions(record.versions),
        "vestige": record.vestige,
    }


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
    if record.missing:
        facts.append(Fact("Not there yet", ", ".join(record.missing), note="the same command adds it"))
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


HUB_DEPTH = 10
"""An example counts as a hit of a query when it stands among the query's first ten proponents."""

_ENDINGS = ("weight", "bias", "default")
"""Last parts of a name that say nothing about where it stands; `default` is PEFT's adapter name."""
_LONGEST_NUMBER = 10
"""Digits of a layer's number; more of them are a part of a name."""

Json = dict[str, Any]


class Place(NamedTuple):
    """Where a component stands: its layer (None outside the layers) and its module within it."""

    layer: int | None
    module: str


def find_place(component: str) -> Place:
    """Return layer and module of a parameter name.

    The first number in the name is its layer, what follows is the module; weight and bias share a cell.

    >>> find_place("model.layers.3.self_attn.q_proj.weight")
    Place(layer=3, module='self_attn.q_proj')
    >>> find_place("transformer.wte.weight")
    Place(layer=None, module='wte')
    """
    parts = component.split(".")
    while len(parts) > 1 and parts[-1] in _ENDINGS:
        parts.pop()
    for number, part in enumerate(parts[:-1]):
        if part.isdecimal() and len(part) < _LONGEST_NUMBER:
            return Place(int(part), ".".join(parts[number + 1 :]))
    return Place(None, parts[-1])


class Grid(NamedTuple):
    """The cells of the heatmap. A cell is (layer number or None, module); order is the model's."""

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    others: tuple[str, ...]
    """Modules outside the layers: embeddings, final norm, output head."""
    cells: tuple[Place, ...]

    def sums(self, scores: Mapping[str, float]) -> list[float]:
        """Return the score of each cell: the sum over the components that stand in it."""
        sums = dict.fromkeys(self.cells, 0.0)
        for component, score in scores.items():
            sums[find_place(component)] += score
        return list(sums.values())


def make_grid(components: Iterable[str]) -> Grid:
    """Return the grid that has a cell for each of `components`."""
    cells = tuple(dict.fromkeys(find_place(component) for component in components))
    return Grid(
        layers=tuple(sorted({cell.layer for cell in cells if cell.layer is not None})),
        modules=tuple(dict.fromkeys(cell.module for cell in cells if cell.layer is not None)),
        others=tuple(cell.module for cell in cells if cell.layer is None),
        cells=cells,
    )


def make_payload(run: RunFiles) -> Json:
    """Return the data of the page, without NaN and with numbers cut to the digits that a reader can use."""
    pieces = {row: cut(example.wording) for row, example in run.examples.items()}
    words = {row: split_words(piece) for row, piece in pieces.items()}
    rare = find_rare_words(words.values())
    grid = _make_run_grid(run)
    hubs = count_hubs(run)
    return {
        "run": run.folder.resolve().name,
        "grid": grid and grid._asdict(),
        "hasTokens": run.tokens is not None,
        "examples": {
            str(row): _describe_example(example, pieces[row], hubs.get(row)) for row, example in run.examples.items()
        },
        "queries": [_describe_query(run, query, words, rare, grid, pieces) for query in run.queries],
    }


def count_hubs(run: RunFiles) -> dict[int, float]:
    """Return, by row, the share of queries that have the example among their first `HUB_DEPTH` proponents."""
    hits = Counter(
        entry.row
        for ranked in run.ranked.values()
        for entry in ranked
        if entry.end == "proponent" and entry.rank <= HUB_DEPTH
    )
    return {row: count / len(run.queries) for row, count in hits.items()}


def round_number(value: Any, digits: int = 7) -> float | None:
    """Return `value` with `digits` significant digits, or None where it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _make_run_grid(run: RunFiles) -> Grid | None:
    """Return the grid of all components in the run, in the model's order; None without a component table."""
    if run.components is None:
        return None
    known = (component for parts in run.components.values() for component in parts)
    return make_grid([*run.record.components, *known])


def _describe_text(pieces: Pieces) -> Json:
    targets = "".join("1" if target else "0" for target in pieces.targets)
    return {
        "pieces": pieces.texts,
        "roles": pieces.roles,
        "turns": pieces.turns,
        "targets": targets,
        "tokens": pieces.from_tokens,
    }


def _describe_example(example: TrainingExample, pieces: Pieces, hub: float | None) -> Json:
    return {
        "id": example.id,
        "row": example.row,
        "source": example.source,
        "label": example.label,
        "length": example.length,
        "duplicates": example.duplicates,
        "hub": round_number(hub, 3),
        "text": _describe_text(pieces),
    }


def _describe_query(
    run: RunFiles,
    query: Query,
    words: Mapping[int, list[Word]],
    rare: frozenset[str],
    grid: Grid | None,
    pieces: Mapping[int, Pieces],
) -> Json:
    query_pieces = cut(query.wording)
    query_words = split_words(query_pieces)
    ranked = []
    for entry in run.ranked[query.id]:
        shared = find_overlap(query_words, words[entry.row], rare)
        ranked.append(
            {
                "end": entry.end,
                "rank": entry.rank,
                "row": entry.row,
                "score": round_number(entry.score),
                "percentile": round_number(entry.percentile),
                "overlap": round_number(shared.share, 3),
                "match": shared.example,
                "answerMatch": shared.query,
                "cells": _sum_cells(run, query.id, entry.example, grid),
                "tokens": _list_token_scores(run, query.id, entry.example, pieces[entry.row]),
            }
        )
    return {
        "id": query.id,
        "generated": query.generated,
        "loss": round_number(query.loss),
        "text": _describe_text(query_pieces),
        "ranked": ranked,
        "distribution": _drop_nonfinite(run.record.distribution.get(query.id)),
        "groups": _drop_nonfinite(run.record.groups.get(query.id, [])),
    }


def _sum_cells(run: RunFiles, query: str, example: str, grid: Grid | None) -> list[float | None] | None:
    """Return the score of each cell of the grid for one example, or None where it was not taken apart."""
    parts = (run.components or {}).get((query, example))
    if grid is None or parts is None:
        return None
    return [round_number(value, 6) for value in grid.sums(parts)]


def _list_token_scores(run: RunFiles, query: str, example: str, pieces: Pieces) -> list[float | None] | None:
    """Return the score of each token of one example, or None where it was not taken apart."""
    scores = (run.tokens or {}).get((query, example))
    if scores is None:
        return None
    if not pieces.from_tokens or max(scores, default=0) >= len(pieces.texts):
        raise UserError(
            f"tokens.parquet of {run.folder} scores positions of example {example!r} that examples.parquet does not "
            "have: the two files come from different runs.\nAttribute again with --tokens."
        )
    return [round_number(scores.get(position, 0.0), 5) for position in range(len(pieces.texts))]


def _drop_nonfinite(value: Any) -> Any:
    """Return a part of run.json as JSON can carry it: every NaN and infinity replaced by None."""
    if isinstance(value, BaseModel):
        return _drop_nonfinite(value.model_dump())
    if isinstance(value, float):
        return round_number(value)
    if isinstance(value, list | tuple):
        return [_drop_nonfinite(item) for item in value]
    if isinstance(value, dict):
        return {key: _drop_nonfinite(item) for key, item in value.items()}
    return value
