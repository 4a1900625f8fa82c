"""Figures of a component search: costs, accuracy and agreement by component and depth, paths, single queries."""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vestige.evaluate._component_findings import OBJECTIVES, ComponentFinding, Findings, most_divergent
from vestige.evaluate._component_judge import FULL
from vestige.evaluate._figures import _COLOURS, _finish, _written

_MOST_NAMES = 40
"""Up to this number of components, each name is written out."""
_SHOWN_CANDIDATES = 5


def component_figures(findings: Findings, suffix: str) -> dict[str, bytes]:
    """Draw all figures as PDF and PNG, by file name."""
    parts = findings.components
    return {
        **_bars(f"parameters_per_component{suffix}", parts, lambda one: one.parameters, "parameters", log=True),
        **_accuracy(f"accuracy_per_component{suffix}", findings),
        **_depths(f"by_depth{suffix}", findings),
        **_bars(
            f"agreement_with_full_gradient{suffix}",
            parts,
            lambda one: one.agreement,
            "agreement with the full gradient",
        ),
        **_self_similarity(f"self_similarity{suffix}", findings),
        **path_figure(f"greedy_paths{suffix}", findings),
    }


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _types(parts: Sequence[ComponentFinding]) -> list[str]:
    return list(dict.fromkeys(one.type for one in parts))


def _colours(parts: Sequence[ComponentFinding]) -> dict[str, str]:
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(_types(parts))}


def _draw_bars(
    axes: Any,
    parts: Sequence[ComponentFinding],
    value: Callable[[ComponentFinding], float],
    label: str,
    *,
    log: bool = False,
) -> None:
    colours = _colours(parts)
    for name, colour in colours.items():
        places = [number for number, one in enumerate(parts) if one.type == name]
        axes.bar(places, [value(parts[place]) for place in places], color=colour, label=name, width=0.85)
    if len(parts) <= _MOST_NAMES:
        axes.set_xticks(range(len(parts)), _short_names(parts), rotation=90, fontsize=6)
    else:
        axes.set_xlabel("component, in the order of the model")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    _finish(axes, "y")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def _short_names(parts: Sequence[ComponentFinding]) -> list[str]:
    """Return the names without their common beginning and end, so that those of an adapter leave space for the bars."""
    names = [one.name.removesuffix(".weight").removesuffix(".default") for one in parts]
    shared = commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (cut at a dot)
    return [name.removeprefix(f"{shared}.") if shared and len(names) > 1 else name for name in names]


def _bars(
    name: str,
    parts: Sequence[ComponentFinding],
    value: Callable[[ComponentFinding], float],
    label: str,
    *,
    log: bool = False,
) -> dict[str, bytes]:
    figure = _figure(9.5, 3.8)
    _draw_bars(figure.add_subplot(), parts, value, label, log=log)
    return _written(figure, name)


def _accuracy(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw bars with the full gradient and chance as lines, and boxes by the number of parameters."""
    parts = findings.components
    figure = _figure(9.5, 7.2)
    axes = figure.add_subplot(2, 1, 1)
    _draw_bars(axes, parts, lambda one: one.accuracy.value, "accuracy")
    for method, style in ((FULL, "-"), ("random", ":")):
        axes.axhline(_accuracy_of(findings, method), color="#333333", linestyle=style, linewidth=1.1)
    axes.set_title("line: full gradient; dotted: chance", fontsize="small", loc="right")
    boxes = figure.add_subplot(2, 1, 2)
    sizes = sorted({one.parameters for one in parts})
    boxes.boxplot([[one.accuracy.value for one in parts if one.parameters == size] for size in sizes])
    boxes.set_xticks(range(1, len(sizes) + 1), [f"{size:,}" for size in sizes], fontsize=7)
    boxes.set_xlabel("parameters of the component")
    boxes.set_ylabel("accuracy")
    _finish(boxes, "y")
    return _written(figure, name)


def _accuracy_of(findings: Findings, method: str) -> float:
    return next(one.accuracy.value for one in findings.representations if one.name == method)


def _depths(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw a line for every type over the blocks: accuracy, agreement, and the mean of attention and of MLP."""
    parts = [one for one in findings.components if one.layer is not None]
    figure = _figure(9.5, 8.6)
    panels: list[tuple[str, Callable[[ComponentFinding], float]]] = [
        ("accuracy", lambda one: one.accuracy.value),
        ("agreement", lambda one: one.agreement),
    ]
    colours = _colours(parts)
    for place, (label, value) in enumerate(panels):
        axes = figure.add_subplot(3, 1, place + 1)
        for kind in _types(parts):
            own = sorted((one for one in parts if one.type == kind), key=lambda one: one.layer or 0)
            layers = [one.layer or 0 for one in own]
            axes.plot(
                layers,
                [value(one) for one in own],
                "o-",
                color=colours[kind],
                label=kind,
                markersize=3,
            )
        axes.set_ylabel(label)
        _finish(axes, "both")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    axes = figure.add_subplot(3, 1, 3)
    for number, (label, words) in enumerate(
        (("attention", ("attn", "attention")), ("feed-forward", ("mlp", "fc", "ffn")))
    ):
        own = [one for one in parts if any(word in one.type.lower() for word in words)]
        layers = sorted({one.layer for one in own if one.layer is not None})
        means = [np.mean([one.accuracy.value for one in own if one.layer == layer]) for layer in layers]
        axes.plot(layers, means, "o-", color=_COLOURS[number], label=label, markersize=3)
    axes.set_xlabel("block")
    axes.set_ylabel("mean accuracy")
    _finish(axes, "both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return _written(figure, name)


def _self_similarity(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw cosines of each component with the first candidates, for the queries where components differ most."""
    queries = most_divergent(findings)
    figure = _figure(9.5, 2.6 * len(queries))
    for place, query in enumerate(queries):
        axes = figure.add_subplot(len(queries), 1, place + 1)
        values = findings.products.of([query]).each()[:, 0]
        for candidate in range(min(_SHOWN_CANDIDATES, values.shape[1])):
            right = bool(findings.right[query, candidate])
            colour = "#D55E00" if right else "#8A8A8A"
            axes.plot(values[:, candidate], color=colour, linewidth=1.8 if right else 0.9, alpha=1 if right else 0.7)
        axes.set_ylabel("cosine")
        axes.set_title(f"query number {query}; orange: its original", fontsize="small", loc="right")
        _finish(axes, "y")
        if place == len(queries) - 1:
            axes.set_xlabel("component, in the order of the model")
    return _written(figure, name)


def path_figure(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw agreement and accuracy along greedy paths by share of parameters; held-out sets, projections, the full."""
    figure = _figure(9.5, 3.9)
    total = findings.products.parameters.sum()
    rows = [one for one in findings.representations if one.name.startswith("projection")]
    for place, objective in enumerate(("agreement", "accuracy")):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, of in enumerate(OBJECTIVES):
            search = findings.searches[of]
            share = 100 * np.cumsum(findings.products.parameters[list(search.path.order)]) / total
            axes.plot(share, search.along[objective], color=_COLOURS[number], label=f"greedy for {of}, all queries")
        for one in rows:
            estimate = one.agreement if objective == "agreement" else one.accuracy
            kept = 100 * (one.bytes or 0) / (4 * total)
            mark = "x" if one.name.endswith("published") else "D"
            axes.plot([kept], [estimate.value if estimate else np.nan], mark, color="#333333", markersize=6)
            axes.annotate(
                one.name.removeprefix("projection "), (kept, estimate.value if estimate else np.nan), fontsize=6
            )
        for number, of in enumerate(OBJECTIVES):
            one = next(row for row in findings.representations if row.name == f"greedy for {of}, held out")
            estimate = one.agreement if objective == "agreement" else one.accuracy
            known = [estimate.value] if estimate else []
            axes.plot([25 * (one.bytes or 0) / total] * len(known), known, "*", color=_COLOURS[number], markersize=11)
        full = 1.0 if objective == "agreement" else _accuracy_of(findings, FULL)
        axes.axhline(full, color="#333333", linestyle="--", linewidth=1, label=FULL)
        axes.set_xlabel("% of the parameters (of projections: numbers kept)")
        axes.set_ylabel(objective)
        _finish(axes, "both")
        axes.legend(frameon=False, fontsize="x-small")
    return _written(figure, name)
