"""Files of a component search: the chosen set, Markdown, and figures, which pages show too.

Figures are drawn from what `components.json` and `self_similarity.csv` hold.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import StringIO
from itertools import groupby
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vestige.evaluate._result import Evaluation, format_value, make_cells
from vestige.figures import (
    BROAD,
    COLOURS,
    SMALL,
    TIP,
    choose_colours,
    finish_axes,
    make_figure,
    render_figure,
    write_plainly,
)
from vestige.progress import format_count

FULL, CHANCE = "full gradient", "random"
PATHS, PARAMETERS, SIMILARITY = "greedy_paths", "parameters_per_component", "self_similarity"
"""Files; the last two are alike for every choice of candidates."""
KINDS = {"attention": ("attn", "attention"), "feed-forward": ("mlp", "fc", "ffn", "feed_forward"), "others": ("",)}
"""Kinds of components and the words in their types; the first that fits."""
_VARIANTS = (".lora_A", ".lora_B", ".bias")
_MOST_TICKS, _MOST_NAMES = 16, 40
"""Blocks that an axis names, and components up to which a file names each; a page shows names at the pointer."""
_WRONG_LISTED = 50
_GREY, _INK = "#AAAAAA", "#555555"
Part = Mapping[str, Any]
"""One component, or one representation, as `components.json` has it."""
Value = Callable[[Part], float]


class Drawing(NamedTuple):
    """One set of axes: a part of a file, a figure of a page."""

    file: str
    """Of the file, without its ending."""
    title: str
    note: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = BROAD
    """On a page, in inches."""


class _Line(NamedTuple):
    """Components over the blocks, averaged block by block."""

    name: str
    colour: str
    style: str
    parts: Sequence[Part]


def number_of(value: float | None) -> float:
    """Return a number of a file, NaN where it is unknown."""
    return math.nan if value is None else float(value)


def accuracy_of(part: Part) -> float:
    """Return the accuracy of a component or a representation."""
    return number_of(part["accuracy"]["value"])


def agreement_of(part: Part) -> float:
    """Return the agreement of a component with the full gradient."""
    return number_of(part["agreement"])


def kind_of(part: Part) -> str:
    """Return attention, feed-forward or neither."""
    name = part["type"].lower()
    fitting = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return "others" if "norm" in name else next(fitting)


def _draw_bars(
    axes: Axes,
    parts: Sequence[Part],
    value: Value,
    label: str,
    levels: Iterable[tuple[float, str]] = (),
) -> None:
    """Draw a bar for each component in the order of the model, in the colour of its kind; `levels` are lines across."""
    log = label == "parameters"
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        own = [(place, one) for place, one in enumerate(parts) if kind_of(one) == kind and math.isfinite(value(one))]
        if own:
            heights = [value(one) for _, one in own]
            bars = axes.bar([place for place, _ in own], heights, width=0.84, color=colour, label=kind)
            for bar, (_, one), height in zip(bars, own, heights, strict=True):
                bar.set_gid(f"{TIP}{one['name']}: {f'{height:,}' if log else f'{height:.3f}'}")
    for level, style in levels:
        axes.axhline(level, color=_INK, linewidth=1, linestyle=style)
    axes.set(xlabel="block", ylabel=label, xlim=(-0.7, len(parts) - 0.3))
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=10 ** math.floor(math.log10(min(max(value(one), 1) for one in parts))))
        write_plainly(axes.yaxis, "{x:,.0f}")
    _mark_blocks(axes, parts)


def _mark_blocks(axes: Axes, parts: Sequence[Part]) -> None:
    """Mark where each block begins on the axis of components, thinned out."""
    first: dict[int, int] = {}
    for place, one in enumerate(parts):
        if one["layer"] is not None:
            first.setdefault(one["layer"], place)
    step = math.ceil(len(first) / _MOST_TICKS) or 1
    axes.set_xticks(list(first.values())[::step], list(map(str, first))[::step])


def _type_lines(parts: Sequence[Part]) -> list[_Line]:
    """Return a line for each type; variants of a module share its colour, some dashed. No two modules share one."""
    stems: dict[str, dict[str, list[Part]]] = {}
    for one in parts:
        stem = next((one["type"].removesuffix(end) for end in _VARIANTS if one["type"].endswith(end)), one["type"])
        stems.setdefault(stem, {}).setdefault(one["type"], []).append(one)
    return [
        _Line(name, colour, "--" if place else "-", own)
        for colour, types in zip(choose_colours(len(stems)), stems.values(), strict=True)
        for place, (name, own) in enumerate(types.items())
    ]


def _draw_lines(axes: Axes, lines: Sequence[_Line], value: Value, level: float | None) -> None:
    """Draw the mean of each line's components over the blocks, and a line across at the level."""
    for name, colour, style, own in lines:
        layers = sorted({one["layer"] for one in own})
        means = [float(np.mean([value(one) for one in own if one["layer"] == layer])) for layer in layers]
        marker = "o" if len(layers) <= _MOST_TICKS else ""
        axes.plot(layers, means, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
    if level is not None:
        axes.axhline(level, color=_GREY, linewidth=1)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_boxes(axes: Axes, parts: Sequence[Part], full: float) -> None:
    """Draw quartiles of accuracy by number of parameters, with all components, and the full gradient as a line."""
    known = [one for one in parts if math.isfinite(accuracy_of(one))]
    sizes = sorted({one["parameters"] for one in parts})
    groups = [[accuracy_of(one) for one in known if one["parameters"] == size] for size in sizes]
    line = {"color": COLOURS[0]}
    axes.boxplot(groups, whis=0, showcaps=False, showfliers=False, widths=0.6, boxprops=line, medianprops=line)
    for place, values in enumerate(groups, 1):
        axes.plot([place] * len(values), values, "o", color=COLOURS[0], markersize=4, alpha=0.4)
    axes.axhline(full, color=_INK, linewidth=1)
    axes.set_xticks(range(1, len(sizes) + 1), list(map(format_count, sizes)))
    axes.set(xlabel="parameters", ylabel="accuracy")


def _draw_similarity(axes: Axes, rows: Iterable[Mapping[str, str]], parts: Sequence[Part]) -> None:
    """Draw cosines of every component with each candidate of one query; its originals stand out."""
    number = {one["name"]: place for place, one in enumerate(parts)}
    for (_, right), cells in groupby(rows, key=lambda row: (row["candidate"], row["right"])):
        x, y = zip(*((number[row["component"]], float(row["cosine"])) for row in cells), strict=True)
        axes.plot(x, y, color=COLOURS[1] if right == "1" else _GREY, linewidth=1.5, zorder=2 + int(right))
    axes.set(xlabel="block", ylabel="cosine")
    _mark_blocks(axes, parts)


def _draw_path(axes: Axes, found: Part, objective: str) -> None:
    """Draw what greedy paths reach over the share of parameters; beside them held-out sets, projections, the full."""
    rows = {row["name"]: row for row in found["representations"]}
    for colour, (name, search) in zip(COLOURS, found["searches"].items(), strict=False):
        counts = search["parameters_along_path"]
        shares = [100 * count / counts[-1] for count in counts]
        values = list(map(number_of, search[f"{objective}_along_path"]))
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
    axes.axhline(accuracy_of(rows[FULL]) if objective == "accuracy" else 1.0, color=_INK, linewidth=1)
    axes.set(xscale="log", xlabel="% of the parameters (of projections: numbers kept)", ylabel=objective)
    write_plainly(axes.xaxis, "{x:g}")


def _draw_mark(axes: Axes, row: Part, objective: str, total: int, style: Mapping[str, Any]) -> None:
    """Mark a set of components by its share of the numbers; names of projections stand beside them."""
    if row[objective] is None:
        return
    share, value = 25 * row["bytes"] / total, number_of(row[objective]["value"])
    if share > 0 and math.isfinite(value):
        (line,) = axes.plot([share], [value], markersize=7, linestyle="", **style)
        line.set_gid(f"{TIP}{row['name']}: {value:.3f} at {share:.2g} %")
        if style["marker"] == "D":
            name = row["name"].removeprefix("projection ")
            axes.annotate(name, (share, value), (6, 3), textcoords="offset points", fontsize="small")


def list_drawings(found: Part, similarity: str = "") -> Iterator[Drawing]:
    """Yield everything that is drawn of one choice of candidates; `similarity` is the CSV of cosines."""
    parts, rows = found["components"], {row["name"]: row for row in found["representations"]}
    full, chance = accuracy_of(rows[FULL]), accuracy_of(rows[CHANCE])
    note = "Line: full gradient. Paths are chosen on the queries they are judged on; ring: sets judged on others."
    for objective in ("accuracy", "agreement"):
        path = partial(_draw_path, found=found, objective=objective)
        yield Drawing(PATHS, f"Greedy paths: {objective}", note, path, (6.6, 3.8))
    bars, title = partial(_draw_bars, parts=parts), "Accuracy of every component"
    note = f"Line: full gradient, {full:.3f}. Dashed: chance, {chance:.3f}."
    levels = ((full, "-"), (chance, "--"))
    accuracy = partial(bars, value=accuracy_of, label="accuracy", levels=levels)
    yield Drawing("accuracy_per_component", title, note, accuracy)
    if any(math.isfinite(agreement_of(one)) for one in parts):
        title = "Agreement of every component with the full gradient"
        note = "Uncentred cosine of all similarities; it is near 1 for anything whose similarities are all positive."
        agreement = partial(bars, value=agreement_of, label="agreement")
        yield Drawing("agreement_with_full_gradient", title, note, agreement)
    yield from _list_depths(parts, full)
    note = "Quartiles of the components of each size, with all of them. Line: full gradient."
    boxes = partial(_draw_boxes, parts=parts, full=full)
    yield Drawing("accuracy_per_component", "Accuracy by number of parameters", note, boxes, SMALL)
    title, note = "Parameters of every component", "Logarithmic."
    yield Drawing(PARAMETERS, title, note, partial(bars, value=lambda one: one["parameters"], label="parameters"))
    note = "Cosine of each component with the first candidates. Orange: the original; grey: the others."
    for query, cells in groupby(csv.DictReader(StringIO(similarity, newline="")), key=lambda row: row["query"]):
        cosines = partial(_draw_similarity, rows=list(cells), parts=parts)
        yield Drawing(SIMILARITY, f"Over the layers: {query}", note, cosines)


def _list_depths(parts: Sequence[Part], full: float) -> Iterator[Drawing]:
    """Yield what is drawn over the blocks: each type of a kind, and kinds on average."""
    inside = [one for one in parts if one["layer"] is not None]
    kinds = {kind: [one for one in inside if kind_of(one) == kind] for kind in KINDS}
    kinds = {kind: own for kind, own in kinds.items() if own}
    every = _type_lines(inside)
    line = "Grey line: full gradient."
    for name, value, level in (("Accuracy", accuracy_of, full), ("Agreement", agreement_of, None)):
        for kind in kinds:
            note = f"Each type over the blocks.{'' if level is None else f' {line}'}"
            lines = [one for one in every if kind_of(one.parts[0]) == kind]
            types = partial(_draw_lines, lines=lines, value=value, level=level)
            yield Drawing("by_depth", f"{name} by depth: {kind}", note, types, SMALL)
    lines = [_Line(kind, COLOURS[list(KINDS).index(kind)], "-", own) for kind, own in kinds.items()]
    means = partial(_draw_lines, lines=lines, value=accuracy_of, level=full)
    yield Drawing("by_depth", "Mean accuracy by depth", line, means, SMALL)


def draw_files(drawings: Iterable[Drawing], parts: Sequence[Part], suffix: str = "") -> dict[str, bytes]:
    """Draw figures as PDF and PNG, by file name, with the components named where there is space for it."""
    files: dict[str, list[Drawing]] = {}
    for one in drawings:
        files.setdefault(one.file, []).append(one)
    names = [one["name"].removesuffix(".weight").removesuffix(".default") for one in parts]
    shared = commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (cut at a dot)
    if shared and len(names) > 1:
        names = [name.removeprefix(f"{shared}.") for name in names]
    content: dict[str, bytes] = {}
    for file, panels in files.items():
        figure, axes_of = make_figure(9.5, 3.8 * len(panels), len(panels))
        for axes, one in zip(axes_of, panels, strict=True):
            one.draw(axes)
            if one.size == BROAD and file != SIMILARITY and len(names) <= _MOST_NAMES:
                axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6, parse_math=False)
                axes.set_xlabel("")
            axes.set_title(f"{one.title}\n{one.note}", fontsize="small", loc="left", parse_math=False)
            legend = bool(axes.get_legend_handles_labels()[0])
            finish_axes(axes, axes.get_xlabel(), axes.get_ylabel(), "y" if one.size == BROAD else "both", legend=legend)
        content |= render_figure(figure, f"{file}{suffix}")
    return content


def as_component_list(words: str, found: Part, objective: str) -> str:
    """Return the chosen set: one parameter a line, and facts about it in lines that begin with #."""
    search, count = found["searches"][objective], len(found["searches"][objective]["chosen"])
    share = search["parameters_along_path"][count - 1] / sum(one["parameters"] for one in found["components"])
    lines = [
        f"# Chosen by `vestige evaluate components` for {objective} among {words} candidates.",
        f"# {count} of {len(found['components'])} components, {share:.2%} of their parameters.",
        f"# {objective} on the queries it was chosen on: {search['chosen_value']:.4f}.",
        f"# Accuracy of sets chosen alike, on queries they were not chosen on: {search['held_out_accuracy']:.4f}.",
        *dict.fromkeys(name.partition("[")[0] for name in search["chosen"]),
    ]
    return "\n".join(lines) + "\n"


def as_markdown(evaluation: Evaluation, choices: Mapping[str, Part]) -> str:
    """Return the whole result as Markdown."""
    head, rows = make_cells(evaluation.rows)
    lines = [f"# {evaluation.title}", "", *_markdown_table(["representation", *head[1:]], rows), ""]
    lines += [f"- {note}" for note in evaluation.notes]
    for words, found in choices.items():
        head = ["component", "parameters", "backward", "accuracy", "agreement", "centred", "layer output"]
        rows = [
            [
                one["name"],
                f"{one['parameters']:,}",
                "" if one["backward"] is None else f"{one['backward']:.0%}",
                format_value(one["accuracy"]),
                *(_round(one[name]) for name in ("agreement", "centred", "output_accuracy")),
            ]
            for one in found["components"]
        ]
        wrong = found["wrong"]
        lines += ["", f"## Components, {words} candidates", "", *_markdown_table(head, rows), ""]
        lines += [f"## Wrong decisions of the full gradient, {words} candidates: {len(wrong)}", ""]
        head = ["query", "picked", "its similarity", "originals", "their similarity", "rank by BM25", "tokens"]
        lines += _markdown_table(head, list(map(_wrong_cells, wrong[:_WRONG_LISTED]))) if wrong else ["None."]
        if len(wrong) > _WRONG_LISTED:
            lines += ["", f"{len(wrong) - _WRONG_LISTED} more are in components.json."]
    return "\n".join(lines) + "\n"


def _wrong_cells(one: Part) -> list[str]:
    originals = ", ".join(one["originals"]) or "not listed"
    cells = [one["query"], one["picked"], _round(one["similarity"]), originals, _round(one["original_similarity"])]
    tokens = map(str, [one["query_tokens"], one["picked_tokens"], *one["original_tokens"]])
    return [*cells, str(one["rank_by_bm25"]), ", ".join(tokens)]


def _round(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
