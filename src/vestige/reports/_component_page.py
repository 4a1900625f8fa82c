"""The page of a component search: what each representation is worth, every component, greedy paths, wrong decisions."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vestige.errors import UserError
from vestige.figures import COLOURS
from vestige.parsing import parse_json
from vestige.progress import format_bytes
from vestige.reports._charts import BROAD, SMALL, TIP, Panel, make_panel, new_axes, place_interval, write_plainly
from vestige.reports._header import (
    Chip,
    Fact,
    cut_command,
    format_count,
    format_duration,
    format_percent,
    format_span,
    format_value,
    shorten_name,
)
from vestige.reports._read import COMPONENTS

SIMILARITY = "self_similarity.csv"
FULL, CHANCE, BM25 = "full gradient", "random", "bm25 of the prompts"
SHOWN_WRONG = 50
_COMPARED = ("best component, held out", "greedy for accuracy, held out", "greedy for agreement, held out", BM25)
KINDS = {"attention": ("attn", "attention"), "feed-forward": ("mlp", "fc", "ffn", "feed_forward"), "others": ("",)}
"""Kinds of components and the words in their types; the first that fits."""
_VARIANTS = (".lora_A", ".lora_B", ".bias")
_MOST_TICKS = 16
_GREY, _INK = "#AAAAAA", "#555555"
Part = Mapping[str, Any]  # one component, as components.json has it
Value = Callable[[Part], float]


def make_component_page(folder: Path) -> dict[str, Any]:
    """Return everything that is on the page of the result in the folder, as its template takes it.

    Raises:
        UserError: A file of it is damaged.
    """
    try:
        found = parse_json((folder / COMPONENTS).read_text(encoding="utf-8"))
        choices = [_make_choice(words, each) for words, each in found["candidates"].items()]
        parts = next(iter(found["candidates"].values()))["components"]
        title, note = "Parameters of every component", "Logarithmic. Point at a bar for its name."
        sizes = _draw_bars(title, note, parts, lambda one: one["parameters"], "parameters", log=True)
        return {
            "title": "Which components distinguish originals from other examples?",
            "subtitle": "components",
            "facts": _list_facts(found, parts),
            "command": cut_command(found["command"]),
            "choices": choices,
            "charts": [*sizes, *_draw_similarity(folder / SIMILARITY, parts)],
            "notes": found["notes"],
            "vestige": version("vestige"),
        }
    except (ArithmeticError, AttributeError, LookupError, OSError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / COMPONENTS} or {SIMILARITY} beside it cannot be read ({type(error).__name__}: {error}).\n"
            f"The command that made it writes both again from what it keeps in {folder / 'products'}."
        ) from error


def kind_of(part: Part) -> str:
    """Return attention, feed-forward or neither."""
    name = part["type"].lower()
    fitting = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return "others" if "norm" in name else next(fitting)


def _list_facts(found: Part, parts: Sequence[Part]) -> list[Fact]:
    passes = found["passes"]
    times = f"{passes['published_to_ours']:.1f} times as many in the published protocol"
    return [
        Fact("Model", shorten_name(found["model"])),
        Fact("Compared", found["title"].partition(" (")[0]),
        Fact("Candidates", ", ".join(found["candidates"])),
        Fact("Components", str(len(parts)), note=f"{format_count(sum(one['parameters'] for one in parts))} parameters"),
        Fact("Gradients computed", format_count(passes["backward_passes"]), note=times),
        Fact("Passes took", format_duration(passes["gradient_seconds"])),
    ]


def _make_choice(words: str, found: Part) -> dict[str, Any]:
    """Return everything about one choice of candidates."""
    rows, parts = {row["name"]: row for row in found["representations"]}, found["components"]
    spans = [_span(row["accuracy"]) for row in rows.values() if not row["opponent"] or row["name"] == BM25]
    known = [end for span in spans for end in span if math.isfinite(end)]
    ends, full = (min(known), max(known)), _span(rows[FULL]["accuracy"])[0]
    return {
        "words": words,
        "listed": _describe_ranks(found),
        "chips": _make_chips(rows),
        "rows": [_make_row(row, ends, full) for row in rows.values()],
        "charts": [*_draw_paths(found, rows, full), *_draw_components(parts, full, rows[CHANCE]["accuracy"]["value"])],
        "types": _average_types(parts),
        "components": list(map(_describe_component, sorted(parts, key=lambda one: -_span(one["accuracy"])[0]))),
        "wrong": list(map(_describe_wrong, found["wrong"][:SHOWN_WRONG])),
        "wrong_count": len(found["wrong"]),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _span(estimate: Part) -> tuple[float, float, float]:
    value, low, high = map(_number, (estimate["value"], *estimate["interval"]))
    return value, low, high


def _accuracy(part: Part) -> float:
    return _number(part["accuracy"]["value"])


def _agreement(part: Part) -> float:
    return _number(part["agreement"])


def _average(values: Iterable[float | None]) -> str:
    """Return the mean of what is known; nothing without any."""
    known = [value for value in map(_number, values) if math.isfinite(value)]
    return format_value(float(np.mean(known))) if known else ""


def _describe_ranks(found: Part) -> str:
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


def _make_chips(rows: Mapping[str, Part]) -> list[Chip]:
    """Return chips of the full gradient, of what was chosen on other queries, and of words alone."""
    full = format_span(_span(rows[FULL]["accuracy"]))
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


def _make_row(row: Part, ends: tuple[float, float], full: float) -> dict[str, Any]:
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


def _average_types(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """Return type, number of components, and the means of accuracy, agreement and accuracy of layer outputs."""
    found = []
    for name in dict.fromkeys(one["type"] for one in parts):
        own = [one for one in parts if one["type"] == name]
        values = [_accuracy(one) for one in own if math.isfinite(_accuracy(one))]
        spread = f"{min(values):.3f} … {max(values):.3f}" if values else ""
        means = [_average(each) for each in (values, map(_agreement, own), (one["output_accuracy"] for one in own))]
        found.append((name, str(len(own)), means[0], spread, *means[1:]))
    return found


def _describe_component(one: Part) -> tuple[str, ...]:
    more = (format_value(one[name]) for name in ("agreement", "centred", "output_accuracy", "self_similarity"))
    size, backward = f"{one['parameters']:,}", f"{one['backward']:.0%}"
    return (one["name"], size, backward, format_span(_span(one["accuracy"])), *more)


def _describe_wrong(one: Part) -> tuple[str, ...]:
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


def _draw_components(parts: Sequence[Part], full: float, chance: float) -> list[Panel]:
    """Draw accuracy and agreement of every component: as bars, over the blocks, and by size."""
    title, levels = "Accuracy of every component", ((full, "-"), (chance, "--"))
    note = f"Line: full gradient, {full:.3f}. Dashed: chance, {chance:.3f}."
    caution = "Uncentred cosine of all similarities; it is near 1 for anything whose similarities are all positive."
    return [
        *_draw_bars(title, note, parts, _accuracy, "accuracy", levels=levels),
        *_draw_bars("Agreement of every component with the full gradient", caution, parts, _agreement, "agreement"),
        *_draw_depths([one for one in parts if one["layer"] is not None], full),
        _draw_boxes(parts, full),
    ]


def _draw_bars(
    title: str,
    note: str,
    parts: Sequence[Part],
    value: Value,
    label: str,
    *,
    levels: Iterable[tuple[float, str]] = (),
    log: bool = False,
) -> list[Panel]:
    """Draw a bar for each component in the order of the model, in the colour of its kind; nothing without values."""
    axes = new_axes(BROAD)
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        own = [(place, one) for place, one in enumerate(parts) if kind_of(one) == kind and math.isfinite(value(one))]
        if own:
            heights = [value(one) for _, one in own]
            bars = axes.bar([place for place, _ in own], heights, width=0.84, color=colour, label=kind)
            for bar, (_, one), height in zip(bars, own, heights, strict=True):
                bar.set_gid(f"{TIP}{one['name']}: {f'{height:,}' if log else f'{height:.3f}'}")
    if not axes.containers:
        return []
    for level, style in levels:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=style)
    axes.set(xlabel="block", ylabel=label, xlim=(-0.7, len(parts) - 0.3))
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=10 ** math.floor(math.log10(min(max(value(one), 1) for one in parts))))
        write_plainly(axes.yaxis, "{x:,.0f}")
    _mark_blocks(axes, parts)
    return [make_panel(title, note, axes, broad=True)]


def _mark_blocks(axes: Axes, parts: Sequence[Part]) -> None:
    """Mark where each block begins on the axis of components, thinned out."""
    first: dict[int, int] = {}
    for place, one in enumerate(parts):
        if one["layer"] is not None:
            first.setdefault(one["layer"], place)
    step = math.ceil(len(first) / _MOST_TICKS) or 1
    axes.set_xticks(list(first.values())[::step], list(map(str, first))[::step])


def _draw_depths(parts: Sequence[Part], full: float) -> list[Panel]:
    """Draw lines over the blocks: accuracy and agreement of each type, and accuracy of kinds on average."""
    if len({one["layer"] for one in parts}) < 2:
        return []
    kinds = {kind: [one for one in parts if kind_of(one) == kind] for kind in KINDS}
    kinds, panels = {kind: own for kind, own in kinds.items() if own}, list[Panel]()
    for name, value, level in (("Accuracy", _accuracy, full), ("Agreement", _agreement, None)):
        for kind, own in kinds.items():
            lines = _type_lines(own)
            note = f"Each type over the blocks.{' Grey line: full gradient.' if level is not None else ''}"
            panels.append(_draw_lines(f"{name} by depth: {kind}", note, lines, value, level))
    lines = [(kind, COLOURS[list(KINDS).index(kind)], "-", own) for kind, own in kinds.items()]
    panels.append(_draw_lines("Mean accuracy by depth", "Grey line: full gradient.", lines, _accuracy, full))
    return panels


def _type_lines(parts: Sequence[Part]) -> list[tuple[str, str, str, list[Part]]]:
    """Return name, colour, style and components of each type; variants of a module share its colour, some dashed."""
    stems: dict[str, dict[str, list[Part]]] = {}
    for one in parts:
        stem = next((one["type"].removesuffix(end) for end in _VARIANTS if one["type"].endswith(end)), one["type"])
        stems.setdefault(stem, {}).setdefault(one["type"], []).append(one)
    return [
        (name, COLOURS[number % len(COLOURS)], "--" if place else "-", own)
        for number, types in enumerate(stems.values())
        for place, (name, own) in enumerate(types.items())
    ]


def _draw_lines(
    title: str, note: str, lines: Sequence[tuple[str, str, str, list[Part]]], value: Value, level: float | None
) -> Panel:
    """Draw the mean of each line's components over the blocks."""
    axes = new_axes(SMALL)
    for name, colour, style, own in lines:
        layers = sorted({one["layer"] for one in own})
        means = [float(np.mean([value(one) for one in own if one["layer"] == layer])) for layer in layers]
        marker = "o" if len(layers) <= _MOST_TICKS else ""
        axes.plot(layers, means, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
    if level is not None:
        axes.axhline(level, color=_GREY, linewidth=1)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return make_panel(title, note, axes)


def _draw_boxes(parts: Sequence[Part], full: float) -> Panel:
    axes, sizes = new_axes(SMALL), sorted({one["parameters"] for one in parts})
    known = [one for one in parts if math.isfinite(_accuracy(one))]
    groups = [[_accuracy(one) for one in known if one["parameters"] == size] for size in sizes]
    line = {"color": COLOURS[0]}
    axes.boxplot(groups, whis=0, showcaps=False, showfliers=False, widths=0.6, boxprops=line, medianprops=line)
    for place, values in enumerate(groups, 1):
        axes.plot([place] * len(values), values, "o", color=COLOURS[0], markersize=4, alpha=0.4)
    axes.axhline(full, color=_INK, linewidth=1)
    axes.set_xticks(range(1, len(sizes) + 1), list(map(format_count, sizes)))
    axes.set(xlabel="parameters", ylabel="accuracy")
    note = "Quartiles of the components of each size, with all of them. Line: full gradient."
    return make_panel("Accuracy by number of parameters", note, axes)


def _draw_similarity(path: Path, parts: Sequence[Part]) -> list[Panel]:
    """Draw cosines over the components with each candidate, for the queries where components differ most."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    panels, number = [], {one["name"]: place for place, one in enumerate(parts)}
    for query, of_query in groupby(rows, key=lambda row: row["query"]):
        axes = new_axes(BROAD)
        for (_, right), cells in groupby(of_query, key=lambda row: (row["candidate"], row["right"])):
            x, y = zip(*((number[row["component"]], float(row["cosine"])) for row in cells), strict=True)
            axes.plot(x, y, color=COLOURS[1] if right == "1" else _GREY, linewidth=1.5, zorder=2 + int(right))
        axes.set(xlabel="block", ylabel="cosine")
        _mark_blocks(axes, parts)
        note = "Cosine of each component with the first candidates. Orange: the original; grey: the others."
        panels.append(make_panel(f"Over the layers: {query}", note, axes, broad=True))
    return panels


def _draw_paths(found: Part, rows: Mapping[str, Part], full: float) -> list[Panel]:
    """Draw what greedy paths reach over the share of parameters; beside them held-out sets and projections."""
    note = "Line: full gradient. Paths are chosen on the queries they are judged on; ring: sets judged on others."
    panels = []
    for objective, level in (("accuracy", full), ("agreement", 1.0)):
        axes = new_axes((6.6, 3.8))
        for colour, (name, search) in zip(COLOURS, found["searches"].items(), strict=False):
            counts = search["parameters_along_path"]
            shares = [100 * count / counts[-1] for count in counts]
            values = list(map(_number, search[f"{objective}_along_path"]))
            axes.plot(shares, values, color=colour, label=f"greedy for {name}")
            held = rows.get(f"greedy for {name}, held out")
            if held is not None:
                _draw_mark(axes, held, objective, counts[-1], {"marker": "o", "color": colour, "fillstyle": "none"})
        total = next(iter(found["searches"].values()))["parameters_along_path"][-1]
        for row in rows.values():
            if row["name"].startswith("projection"):
                marker = "x" if row["name"].endswith("published") else "D"
                _draw_mark(axes, row, objective, total, {"marker": marker, "color": COLOURS[2]})
        axes.plot([], [], "D", color=COLOURS[2], label="projections: ◆ right, × as published")
        axes.axhline(level, color=_INK, linewidth=1)
        axes.set(xscale="log", xlabel="% of the parameters (of projections: numbers kept)", ylabel=objective)
        write_plainly(axes.xaxis, "{x:g}")
        panels.append(make_panel(f"Greedy paths: {objective}", note, axes))
    return panels


def _draw_mark(axes: Axes, row: Part, objective: str, total: int, style: Mapping[str, Any]) -> None:
    """Mark a set of components by its share of the numbers; names of projections stand beside them."""
    if row[objective] is None:
        return
    share, value = 25 * row["bytes"] / total, _number(row[objective]["value"])
    if share > 0 and math.isfinite(value):
        (line,) = axes.plot([share], [value], markersize=7, linestyle="", **style)
        line.set_gid(f"{TIP}{row['name']}: {value:.3f} at {share:.2g} %")
        if style["marker"] == "D":
            name = row["name"].removeprefix("projection ")
            axes.annotate(name, (share, value), (6, 3), textcoords="offset points", fontsize="small")
