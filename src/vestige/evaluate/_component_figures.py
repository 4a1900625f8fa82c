"""Figures of `vestige evaluate components`."""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vestige.evaluate._component_findings import FULL, Finding, Findings
from vestige.evaluate._component_sets import OBJECTIVES
from vestige.evaluate._figures import COLOURS, finish_axes, make_figure, render_figure

CANDIDATES_DRAWN = 5
_MOST_NAMES = 40
"""Up to this number of components, each name is written out."""
_Value = Callable[[Finding], float]
_ACCURACY: _Value = lambda one: one["accuracy"].value  # noqa: E731
_AGREEMENT: _Value = lambda one: one["agreement"]  # noqa: E731
_KINDS = {"attention": ("attn", "attention"), "feed-forward": ("mlp", "fc", "ffn")}


def draw_components(findings: Findings) -> dict[str, bytes]:
    """Draw the figures of components, as PDF and PNG, by file name."""
    files = {}
    for name, value, label in (
        ("parameters_per_component", lambda one: one["parameters"], "parameters"),
        ("agreement_with_full_gradient", _AGREEMENT, "agreement with the full gradient"),
    ):
        figure, (axes,) = make_figure(9.5, 3.8)
        axes.set_yscale("log" if label == "parameters" else "linear")
        _draw_bars(axes, findings.components, value, label)
        files |= render_figure(figure, name)
    return files | _draw_accuracy(findings) | _draw_depths(findings.components) | _draw_self_similarity(findings)


def _colours(parts: Sequence[Finding]) -> dict[str, str]:
    """Return a colour for each type of component."""
    types = dict.fromkeys(one["type"] for one in parts)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(types)}


def _draw_bars(axes: Axes, parts: Sequence[Finding], value: _Value, label: str) -> None:
    for name, colour in _colours(parts).items():
        places = [number for number, one in enumerate(parts) if one["type"] == name]
        axes.bar(places, [value(parts[place]) for place in places], color=colour, label=name, width=0.85)
    if named := len(parts) <= _MOST_NAMES:
        axes.set_xticks(range(len(parts)), _shorten_names(parts), rotation=90, fontsize=6)
    finish_axes(axes, "" if named else "component, in the order of the model", label, "y", legend=True)


def _shorten_names(parts: Sequence[Finding]) -> list[str]:
    """Return the names without their common beginning and end, so that those of an adapter leave space for the bars."""
    names = [one["name"].removesuffix(".weight").removesuffix(".default") for one in parts]
    shared = commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (cut at a dot)
    return [name.removeprefix(f"{shared}.") if shared and len(names) > 1 else name for name in names]


def _draw_accuracy(findings: Findings) -> dict[str, bytes]:
    """Draw bars with the full gradient and chance as lines, and boxes by the number of parameters."""
    parts = findings.components
    figure, (axes, boxes) = make_figure(9.5, 7.2, 2)
    _draw_bars(axes, parts, _ACCURACY, "accuracy")
    for method, style in ((FULL, "-"), ("random", ":")):
        axes.axhline(_ACCURACY(findings.row(method)), color="#333333", linestyle=style, linewidth=1.1)
    axes.set_title("line: full gradient; dotted: chance", fontsize="small", loc="right")
    sizes = sorted({one["parameters"] for one in parts})
    boxes.boxplot([[_ACCURACY(one) for one in parts if one["parameters"] == size] for size in sizes])
    boxes.set_xticks(range(1, len(sizes) + 1), [f"{size:,}" for size in sizes], fontsize=7)
    finish_axes(boxes, "parameters of the component", "accuracy", "y")
    return render_figure(figure, "accuracy_per_component")


def _draw_depths(components: Sequence[Finding]) -> dict[str, bytes]:
    """Draw a line for every type over the blocks: accuracy, agreement, and the mean of attention and of MLP."""
    parts = sorted((one for one in components if one["layer"] is not None), key=lambda one: one["layer"])
    figure, (*panels, means) = make_figure(9.5, 8.6, 3)

    def draw(axes: Axes, label: str, colour: str, own: Sequence[Finding], value: _Value) -> None:
        layers = sorted({one["layer"] for one in own})
        values = [np.mean([value(one) for one in own if one["layer"] == layer]) for layer in layers]
        axes.plot(layers, values, "o-", color=colour, label=label, markersize=3)

    for axes, label, value in zip(panels, OBJECTIVES, (_ACCURACY, _AGREEMENT), strict=True):
        for kind, colour in _colours(components).items():
            draw(axes, kind, colour, [one for one in parts if one["type"] == kind], value)
        finish_axes(axes, "", label, legend=True)
    for colour, (label, words) in zip(COLOURS, _KINDS.items(), strict=False):
        own = [one for one in parts if any(word in one["type"].lower() for word in words)]
        draw(means, label, colour, own, _ACCURACY)
    finish_axes(means, "block", "mean accuracy", legend=True)
    return render_figure(figure, "by_depth")


def _draw_self_similarity(findings: Findings) -> dict[str, bytes]:
    """Draw cosines of each component with the first candidates, for the queries where components differ most."""
    queries = findings.most_divergent()
    figure, panels = make_figure(9.5, 2.6 * len(queries), len(queries))
    for axes, query in zip(panels, queries, strict=True):
        cosine = findings.products.of([query]).each()[:, 0, :CANDIDATES_DRAWN]
        for values, right in zip(cosine.T, findings.right[query], strict=False):
            style: dict[str, Any] = {"color": "#8A8A8A", "linewidth": 0.9, "alpha": 0.7}
            axes.plot(values, **({"color": "#D55E00", "linewidth": 1.8, "alpha": 1} if right else style))
        axes.set_title(f"query number {query}; orange: its original", fontsize="small", loc="right")
        finish_axes(axes, "component, in the order of the model" if axes is panels[-1] else "", "cosine", "y")
    return render_figure(figure, "self_similarity")


def draw_paths(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw agreement and accuracy along greedy paths by share of parameters; held-out sets, projections, the full."""
    figure, panels = make_figure(9.5, 3.9, 1, 2)
    total = findings.products.parameters.sum()
    for axes, objective in zip(panels, ("agreement", "accuracy"), strict=True):

        def place_of(one: Finding, objective: str = objective) -> tuple[float, float]:
            return 25 * one["bytes"] / total, one[objective].value

        for colour, (of, search) in zip(COLOURS, findings.searches.items(), strict=False):
            share = 100 * np.array(search["parameters_along_path"]) / total
            axes.plot(share, search[f"{objective}_along_path"], color=colour, label=f"greedy for {of}, all queries")
            axes.plot(*place_of(findings.row(f"greedy for {of}, held out")), "*", color=colour, markersize=11)
        for one in findings.representations:
            if one["name"].startswith("projection"):
                mark = "x" if one["name"].endswith("published") else "D"
                axes.plot(*place_of(one), mark, color="#333333", markersize=6)
                axes.annotate(one["name"].removeprefix("projection "), place_of(one), fontsize=6)
        full = findings.row(FULL)[objective].value
        axes.axhline(full, color="#333333", linestyle="--", linewidth=1, label=FULL)
        finish_axes(axes, "% of the parameters (of projections: numbers kept)", objective)
        axes.legend(frameon=False, fontsize="x-small")
    return render_figure(figure, name)
