"""The drawings of a component search's page, each with what it says."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from vestige.reports._component_charts import BROAD, Bar, Course, Mark, bars, boxes, courses, size_bars
from vestige.reports._curves import Line, curves
from vestige.reports._drawing import Tick
from vestige.reports._header import compact

Part = Mapping[str, Any]
"""One component, as components.json has it."""


class Key(NamedTuple):
    """A line of a legend."""

    name: str
    tone: int
    dashed: bool = False


class Panel(NamedTuple):
    """A drawing with its title, what it says and its legend."""

    title: str
    note: str
    svg: str
    legend: tuple[Key, ...] = ()
    broad: bool = False
    """Whether it needs the whole width."""


KINDS = {"attention": ("attn", "attention"), "feed-forward": ("mlp", "fc", "ffn", "feed_forward"), "others": ("",)}
"""Kinds of components and the words in their types; the first that fits."""
_VARIANTS = (".lora_A", ".lora_B", ".bias")
_MOST_TICKS = 16
_ASIDE = 9
"""Tone of what is there for comparison."""


def kind_of(part: Part) -> str:
    """Return attention, feed-forward or neither."""
    name = part["type"].lower()
    if "norm" in name:
        return "others"
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def parameters_chart(parts: Sequence[Part]) -> Panel:
    """Draw the sizes of all components."""
    drawn = [Bar(f"{one['name']}: {one['parameters']:,}", one["parameters"], _tone(one)) for one in parts]
    note = "Logarithmic. Point at a bar for its name."
    svg = size_bars(drawn, "parameters", _blocks(parts))
    return Panel("Parameters of every component", note, svg, _kind_keys(parts), True)


def charts_of(found: Mapping[str, Any], rows: Mapping[str, Part]) -> list[Panel]:
    """Draw every chart of one choice of candidates."""
    parts: list[Part] = found["components"]
    full, chance = rows["full gradient"]["accuracy"]["value"], rows["random"]["accuracy"]["value"]
    ticks = _blocks(parts)
    accuracy = [Bar(f"{one['name']}: {_accuracy(one):.3f}", _accuracy(one), _tone(one)) for one in parts]
    agreement = [Bar(f"{one['name']}: {_agreement(one):.3f}", _agreement(one), _tone(one)) for one in parts]
    levels = f"Line: full gradient, {full:.3f}. Dashed: chance, {chance:.3f}."
    return [
        *_path_charts(found, rows, full),
        Panel(
            "Accuracy of every component",
            levels,
            bars(accuracy, "accuracy", ticks, full=full, chance=chance),
            _kind_keys(parts),
            True,
        ),
        Panel(
            "Agreement of every component with the full gradient",
            "Uncentred cosine of all similarities; it is near 1 for anything whose similarities are all positive.",
            bars(agreement, "agreement", ticks),
            _kind_keys(parts),
            True,
        ),
        *_depth_charts(parts, full),
        _sizes_chart(parts, full),
    ]


def types_of(parts: Sequence[Part]) -> tuple[tuple[str, ...], ...]:
    """Return type, number of components, and the means of accuracy, agreement and accuracy of layer outputs."""
    found = []
    for name in dict.fromkeys(one["type"] for one in parts):
        own = [one for one in parts if one["type"] == name]
        values = [_accuracy(one) for one in own]
        outputs = [one["output_accuracy"] for one in own if one["output_accuracy"] is not None]
        found.append(
            (
                name,
                str(len(own)),
                f"{np.mean(values):.3f}",
                f"{min(values):.3f} … {max(values):.3f}",
                f"{np.mean([_agreement(one) for one in own]):.3f}",
                f"{np.mean(outputs):.3f}" if outputs else "",
            )
        )
    return tuple(found)


def similarity_charts(rows: Iterable[Mapping[str, str]], parts: Sequence[Part]) -> list[Panel]:
    """Draw cosines over the components with each candidate, for the queries where components differ most."""
    charts = []
    number = {one["name"]: place for place, one in enumerate(parts)}
    for query, of_query in groupby(rows, key=lambda row: row["query"]):
        lines = []
        for (_, right), cells in groupby(of_query, key=lambda row: (row["candidate"], row["right"])):
            points = [(number[row["component"]], float(row["cosine"])) for row in cells]
            x, y = zip(*points, strict=True)
            lines.append(Line("its original" if right == "1" else "other", x, y, tone=1 if right == "1" else _ASIDE))
        lines.sort(key=lambda line: line.tone == 1)
        svg = curves(lines, "block", side="cosine", ticks=_blocks(parts), width=BROAD, height=200, dots=False)
        note = "Cosine of each component with the first candidates. Orange: the original; grey: the others."
        charts.append(Panel(f"Over the layers: {query}", note, svg, (), True))
    return charts


def _path_charts(found: Mapping[str, Any], rows: Mapping[str, Part], full: float) -> list[Panel]:
    note = "Line: full gradient. Paths are chosen on the queries they are judged on; ring: sets judged on others."
    charts = []
    for objective, level in (("accuracy", full), ("agreement", 1.0)):
        lines, marks = [], []
        for tone, (of, search) in enumerate(found["searches"].items()):
            counts = search["parameters_along_path"]
            shares = [100 * count / counts[-1] for count in counts]
            lines.append(
                Course(f"greedy for {of}", shares, [_number(y) for y in search[f"{objective}_along_path"]], tone)
            )
            held = f"greedy for {of}, held out"
            if held in rows and rows[held][objective] is not None:
                share = 25 * rows[held]["bytes"] / counts[-1]
                marks.append(Mark(held, share, _number(rows[held][objective]["value"]), "star", tone))
        total = next(iter(found["searches"].values()))["parameters_along_path"][-1]
        for name, row in rows.items():
            if name.startswith("projection") and row[objective] is not None:
                published = name.endswith("published")
                label = "" if published else name.removeprefix("projection ")
                shape = "cross" if published else "diamond"
                value = _number(row[objective]["value"])
                marks.append(Mark(name, 25 * row["bytes"] / total, value, shape, 2, label))
        title = f"Greedy paths: {objective}"
        svg = courses(lines, marks, objective, level)
        legend = (*(Key(line.name, line.tone) for line in lines), Key("projections: ◆ right, × as published", 2))
        charts.append(Panel(title, note, svg, legend))
    return charts


def _depth_charts(parts: Sequence[Part], full: float) -> list[Panel]:
    """Draw lines over the blocks: accuracy of each type, of kinds on average, and agreement of each type."""
    inside = [one for one in parts if one["layer"] is not None]
    kinds = [kind for kind in KINDS if any(kind_of(one) == kind for one in inside)]
    if len({one["layer"] for one in inside}) < 2:
        return []
    charts = []
    for name, value in (("Accuracy", _accuracy), ("Agreement", _agreement)):
        for kind in kinds:
            own = [one for one in inside if kind_of(one) == kind]
            lines = _type_lines(own, value)
            level = full if name == "Accuracy" else None
            svg = curves(lines, "block", ticks=_depths(own), rule=level, dots=len(_depths(own)) <= _MOST_TICKS)
            note = f"Each type over the blocks.{' Dashed line: full gradient.' if level is not None else ''}"
            charts.append(Panel(f"{name} by depth: {kind}", note, svg, _keys(lines)))
    means = [_mean_line(kind, [one for one in inside if kind_of(one) == kind]) for kind in kinds]
    svg = curves(means, "block", ticks=_depths(inside), rule=full)
    charts.append(Panel("Mean accuracy by depth", "Dashed line: full gradient.", svg, _keys(means)))
    return charts


def _type_lines(parts: Sequence[Part], value: Callable[[Part], float]) -> list[Line]:
    """Return a line for each type; variants of one module share its colour, the later ones dashed."""
    stems: dict[str, list[str]] = {}
    for one in parts:
        stem = next((one["type"].removesuffix(end) for end in _VARIANTS if one["type"].endswith(end)), one["type"])
        if one["type"] not in stems.setdefault(stem, []):
            stems[stem].append(one["type"])
    lines = []
    for tone, kinds in enumerate(stems.values()):
        for place, kind in enumerate(kinds):
            own = sorted((one for one in parts if one["type"] == kind), key=lambda one: one["layer"])
            x, y = [one["layer"] for one in own], [value(one) for one in own]
            lines.append(Line(kind, x, y, tone=tone % 6, dashed=place > 0))
    return lines


def _mean_line(kind: str, parts: Sequence[Part]) -> Line:
    layers = sorted({one["layer"] for one in parts})
    means = [float(np.mean([_accuracy(one) for one in parts if one["layer"] == layer])) for layer in layers]
    return Line(kind, layers, means, tone=list(KINDS).index(kind))


def _sizes_chart(parts: Sequence[Part], full: float) -> Panel:
    sizes = sorted({one["parameters"] for one in parts})
    groups = [(compact(size), [_accuracy(one) for one in parts if one["parameters"] == size]) for size in sizes]
    note = "Quartiles of the components of each size, with all of them. Line: full gradient."
    return Panel("Accuracy by number of parameters", note, boxes(groups, "parameters", "accuracy", full))


def _keys(lines: Sequence[Line]) -> tuple[Key, ...]:
    return tuple(
        Key(line.name, place if line.tone is None else line.tone, line.dashed) for place, line in enumerate(lines)
    )


def _kind_keys(parts: Sequence[Part]) -> tuple[Key, ...]:
    found = {kind_of(one) for one in parts}
    return tuple(Key(kind, tone) for tone, kind in enumerate(KINDS) if kind in found)


def _accuracy(part: Part) -> float:
    return _number(part["accuracy"]["value"])


def _agreement(part: Part) -> float:
    return _number(part["agreement"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tone(part: Part) -> int:
    return list(KINDS).index(kind_of(part))


def _blocks(parts: Sequence[Part]) -> list[Tick]:
    """Return the ticks where each block begins on the axis of components, thinned out."""
    first: dict[int, int] = {}
    for place, one in enumerate(parts):
        if one["layer"] is not None:
            first.setdefault(one["layer"], place)
    step = math.ceil(len(first) / _MOST_TICKS) or 1
    return [(float(place), str(layer)) for layer, place in list(first.items())[::step]]


def _depths(parts: Sequence[Part]) -> list[Tick]:
    layers = sorted({one["layer"] for one in parts})
    return [float(layer) for layer in layers[:: math.ceil(len(layers) / 8) or 1]]
