"""The page of a component search: what each representation is worth, every component, greedy paths, wrong decisions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vestige import evaluate
from vestige.errors import UserError
from vestige.figures import BROAD
from vestige.parsing import parse_json
from vestige.progress import format_bytes, format_count
from vestige.reports._charts import Panel, make_panel, new_axes, place_interval
from vestige.reports._read import (
    COMPONENTS,
    Chip,
    Fact,
    cut_command,
    format_duration,
    format_percent,
    format_value,
    shorten_name,
)
from vestige.runs import format_span

_CSV = f"{evaluate.SIMILARITY}.csv"
BM25 = "bm25 of the prompts"
SHOWN_WRONG = 50
_COMPARED = ("best component, held out", "greedy for accuracy, held out", "greedy for agreement, held out", BM25)


def make_component_page(folder: Path) -> dict[str, Any]:
    """Return everything that is on the page of the result in the folder, as its template takes it.

    Raises:
        UserError: A file of it is damaged.
    """
    try:
        found = parse_json((folder / COMPONENTS).read_text(encoding="utf-8"))
        first, *_ = found["candidates"].values()
        cosines = (folder / _CSV).read_bytes().decode() if (folder / _CSV).is_file() else ""
        return {
            "title": "Which components distinguish originals from other examples?",
            "subtitle": "components",
            "facts": _list_facts(found, first["components"]),
            "command": cut_command(found["command"]),
            "choices": [_make_choice(words, each) for words, each in found["candidates"].items()],
            "charts": _make_panels(evaluate.list_drawings(first, cosines), shared=True),
            "notes": found["notes"],
            "vestige": version("vestige"),
        }
    except (ArithmeticError, AttributeError, LookupError, OSError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / COMPONENTS} or {_CSV} beside it cannot be read ({type(error).__name__}: {error}).\n"
            f"The command that made it writes both again from what it keeps in {folder / 'products'}."
        ) from error


def _list_facts(found: evaluate.Part, parts: Sequence[evaluate.Part]) -> list[Fact]:
    facts = [
        Fact("Model", shorten_name(found["model"])),
        Fact("Compared", found["title"].partition(" (")[0]),
        Fact("Candidates", ", ".join(found["candidates"])),
        Fact("Components", str(len(parts)), note=f"{format_count(sum(one['parameters'] for one in parts))} parameters"),
    ]
    if (passes := found["passes"]) is not None:
        times = f"{passes['published_to_ours']:.1f} times as many in the published protocol"
        facts.append(Fact("Gradients computed", format_count(passes["backward_passes"]), note=times))
        facts.append(Fact("Passes took", format_duration(passes["gradient_seconds"])))
    return facts


def _make_choice(words: str, found: evaluate.Part) -> dict[str, Any]:
    """Return everything about one choice of candidates."""
    rows, parts = {row["name"]: row for row in found["representations"]}, found["components"]
    spans = [_span(row["accuracy"]) for row in rows.values() if not row["opponent"] or row["name"] == BM25]
    known = [end for span in spans for end in span if math.isfinite(end)]
    ends, full = (min(known), max(known)), _span(rows[evaluate.FULL]["accuracy"])[0]
    return {
        "words": words,
        "listed": _describe_ranks(found),
        "chips": _make_chips(rows),
        "rows": [_make_row(row, ends, full) for row in rows.values()],
        "charts": _make_panels(evaluate.list_drawings(found), shared=False),
        "types": _average_types(parts),
        "components": list(map(_describe_component, sorted(parts, key=lambda one: -_span(one["accuracy"])[0]))),
        "wrong": list(map(_describe_wrong, found["wrong"][:SHOWN_WRONG])),
        "wrong_count": len(found["wrong"]),
    }


def _span(estimate: evaluate.Part) -> tuple[float, float, float]:
    value, low, high = map(evaluate.number_of, (estimate["value"], *estimate["interval"]))
    return value, low, high


def _average(values: Iterable[float | None]) -> str:
    """Return the mean of what is known; nothing without any."""
    known = [value for value in map(evaluate.number_of, values) if math.isfinite(value)]
    return format_value(float(np.mean(known))) if known else ""


def _describe_ranks(found: evaluate.Part) -> str:
    """Return the ranks that BM25 gives the originals, in words."""
    ranks = {int(rank): count for rank, count in found["rank_of_original_by_bm25"].items()}
    total, put = sum(ranks.values()), found["original_put_there"]
    words = f"The original is among the candidates of {found['original_listed']:.1%} of {total:,} queries"
    words += f", for {put:,} because it was put there. " if put else ". "
    if 0 in ranks:
        return words + "The candidates were given with the queries."
    if ranks.get(1) == total:
        return words + "Among all examples BM25 puts every one first."
    first, second, third = (ranks.get(rank, 0) for rank in (1, 2, 3))
    return words + (
        f"Among all examples BM25 puts it first for {first:,}, second for {second:,}, third for {third:,} and further "
        f"down for {total - first - second - third:,}."
    )


def _make_chips(rows: Mapping[str, evaluate.Part]) -> list[Chip]:
    """Return chips of the full gradient, of what was chosen on other queries, and of words alone."""
    full = format_span(_span(rows[evaluate.FULL]["accuracy"]))
    chips = [Chip("Full gradient", full.partition(" ")[0], f"Accuracy {full}", "unknown", "", "")]
    for name in _COMPARED:
        row = rows.get(name)
        if row is None or row["against_full"] is None:
            continue
        value, low, high = _span(row["against_full"])
        verdict, word, sign = "unknown", "no clear difference", "="
        if low > 0:
            verdict, word, sign = "warn" if name == BM25 else "good", "better", "+"
        elif high < 0:
            verdict, word, sign = "warn", "worse", "−"
        share = "" if row["parameters"] is None else f", from {format_percent(row['parameters'])} of the parameters"
        reading = f"{format_span((value, low, high)).replace('-', '−')} against the full gradient{share}"
        title = name.replace("bm25", "BM25") if name == BM25 else name[:1].upper() + name[1:]
        chips.append(Chip(title, f"{_span(row['accuracy'])[0]:.3f}", reading, verdict, word, sign))
    return chips


def _make_row(row: evaluate.Part, ends: tuple[float, float], full: float) -> dict[str, Any]:
    """Return a line of the table of representations."""
    span = _span(row["accuracy"])
    cells = (
        "" if row["against_full"] is None else format_span(_span(row["against_full"])).replace("-", "−"),
        format_value(row["agreement"] and row["agreement"]["value"]),
        format_value(row["centred"] and row["centred"]["value"]),
        "" if row["parameters"] is None else format_percent(row["parameters"]),
        "" if row["backward"] is None else f"{row['backward']:.0%}",
        "" if row["bytes"] is None else format_bytes(row["bytes"]),
        "" if row["seconds"] is None else format_duration(row["seconds"]),
    )
    return {
        "name": row["name"],
        "accuracy": format_span(span),
        "interval": place_interval(span, ends, full),
        "cells": cells,
        "opponent": row["opponent"],
    }


def _average_types(parts: Sequence[evaluate.Part]) -> list[tuple[str, ...]]:
    """Return type, number of components, and the means of accuracy, agreement and accuracy of layer outputs."""
    found = []
    for name in dict.fromkeys(one["type"] for one in parts):
        own = [one for one in parts if one["type"] == name]
        values = [evaluate.accuracy_of(one) for one in own if math.isfinite(evaluate.accuracy_of(one))]
        spread = f"{min(values):.3f} … {max(values):.3f}" if values else ""
        known = (values, map(evaluate.agreement_of, own), (one["output_accuracy"] for one in own))
        accuracy, *others = map(_average, known)
        found.append((name, str(len(own)), accuracy, spread, *others))
    return found


def _describe_component(one: evaluate.Part) -> tuple[str, ...]:
    more = (format_value(one[name]) for name in ("agreement", "centred", "output_accuracy", "self_similarity"))
    size, backward = f"{one['parameters']:,}", "" if one["backward"] is None else f"{one['backward']:.0%}"
    return (one["name"], size, backward, format_span(_span(one["accuracy"])), *more)


def _describe_wrong(one: evaluate.Part) -> tuple[str, ...]:
    lengths = ", ".join(map(str, one["original_tokens"]))
    return (
        one["query"],
        one["picked"],
        format_value(one["similarity"]),
        ", ".join(one["originals"]) or "not listed",
        format_value(one["original_similarity"]),
        str(one["rank_by_bm25"] or ""),
        f"{one['query_tokens']} / {one['picked_tokens']} / {lengths or '–'}",
    )


def _make_panels(drawings: Iterable[evaluate.Drawing], *, shared: bool) -> list[Panel]:
    """Return what is alike for every choice of candidates, or what is of one."""
    panels = []
    for one in drawings:
        if (one.file in (evaluate.PARAMETERS, evaluate.SIMILARITY)) == shared:
            axes = new_axes(one.size)
            one.draw(axes)
            note = f"{one.note} Point at a bar for its name." if one.file == evaluate.PARAMETERS else one.note
            panels.append(make_panel(one.title, note, axes, broad=one.size == BROAD))
    return panels
