"""`vestige evaluate components`: which components of the gradient distinguish an original from other examples?"""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vestige.evaluate._component_findings import FULL, Finding, Findings
from vestige.evaluate._component_pass import OnePassResult, one_pass_result
from vestige.evaluate._component_sets import OBJECTIVES
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, format_value, write_evaluation
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure
from vestige.jobs import is_follower
from vestige.progress import format_bytes, format_seconds
from vestige.settings import ComponentsSettings, with_settings

_WRONG_LISTED = 50
_CANDIDATES_DRAWN = 5
_MOST_NAMES = 40
"""Up to this number of components, each name is written out."""
_Value = Callable[[Finding], float]
_ACCURACY: _Value = lambda one: one["accuracy"].value  # noqa: E731
_AGREEMENT: _Value = lambda one: one["agreement"]  # noqa: E731
_KINDS = {"attention": ("attn", "attention"), "feed-forward": ("mlp", "fc", "ffn")}


@with_settings(ComponentsSettings)
def components(settings: ComponentsSettings) -> Evaluation:
    """Measure accuracy, agreement with the full gradient and cost of components, of sets of them, and of baselines.

    In `settings.out`: `components.json`, `components.md`, the figures, `accuracy.components` and
    `agreement.components`, which `vestige index --components @FILE` takes, and the products that all follows from.

    Raises:
        IndexMismatch: The folder holds products of something else; nothing was changed.
        WorkElsewhere: This was a share of the work (`shard`), and the rest is not done yet.
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    result = one_pass_result(settings)
    findings = [Findings(settings, result, words) for words in settings.candidates]
    several = len(findings) > 1
    rows = [_row(one, f" ({each.words})" if several else "") for each in findings for one in each.representations]
    inputs, passes = result.inputs, _count_passes(settings, result)
    evaluation = Evaluation(
        "components",
        f"Originals of {len(inputs.queries)} queries among {len(inputs.train)} examples "
        f"({', '.join(settings.candidates)} candidates), {len(inputs.components)} components",
        tuple(sorted(rows, key=lambda row: row.opponent)) if several else tuple(rows),
        tuple(_notes(settings, result, passes, findings)),
        {
            "command": settings.command_line("evaluate components"),
            "model": inputs.loaded.name,
            "passes": passes,
            "seconds_of": result.seconds,
            "candidates": {each.words: each.to_json() for each in findings},
        },
    )
    if is_follower():
        return evaluation
    files = {"components.md": _as_markdown(evaluation, findings).encode()}
    for place, each in enumerate(findings):
        suffix = f"_{each.words}" if place else ""
        for objective in each.searches:
            files[f"{objective}{suffix}.components"] = _as_component_list(each, objective).encode()
        if settings.figures:
            files |= _draw_paths(f"greedy_paths{suffix}", each)
    files["self_similarity.csv"] = _as_csv(findings[0], [one.id for one in inputs.queries.examples]).encode()
    return write_evaluation(
        evaluation, settings.out, files | (_draw_components(findings[0]) if settings.figures else {})
    )


def _row(one: Finding, suffix: str) -> EvaluationRow:
    values: dict[str, Value] = {
        "accuracy": one["accuracy"],
        "minus full": one["against_full"],
        "agreement": one["agreement"] and one["agreement"].value,
        "centred": one["centred"] and one["centred"].value,
        "parameters": None if one["parameters"] is None else f"{one['parameters']:.2%}",
        "backward": None if one["backward"] is None else f"{one['backward']:.0%}",
        "bytes": None if one["bytes"] is None else format_bytes(one["bytes"]),
    }
    return EvaluationRow(f"{one['name']}{suffix}", values, one["seconds"], None, one["opponent"])


def _count_passes(settings: ComponentsSettings, result: OnePassResult) -> dict[str, Any]:
    """Return the number of gradients computed, and the number that the published protocol needs for the same table."""
    # Similarities and products by parameter run each query and each of its candidates again, projections twice.
    tables = {words: 4 * int((1 + one.listed.sum(1)).sum()) for words, one in result.gradients.items()}
    published, seconds = tables[settings.candidates[0]], result.seconds.get("gradients", 0.0)
    computed = max(result.computed, 1)
    return {
        "distinct_gradients": len(result.inputs.data),
        "backward_passes": result.computed,
        "published_protocol": published,
        "published_to_ours": published / computed,
        "published_protocol_by_candidates": tables,
        "published_protocol_all_tables": sum(tables.values()),
        "all_tables_to_ours": sum(tables.values()) / computed,
        "gradient_seconds": seconds,
        "published_seconds_estimated": seconds * published / computed,
        "first_candidates": settings.candidates[0],
    }


def _notes(
    settings: ComponentsSettings, result: OnePassResult, passes: dict[str, Any], findings: Sequence[Findings]
) -> list[str]:
    tables = f" for {settings.candidates[0]} candidates" if len(findings) > 1 else ""
    all_tables = f", {passes['published_protocol_all_tables']:,} for all of them" if tables else ""
    notes = [
        f"Each distinct gradient was computed once: {passes['backward_passes']:,} of {passes['distinct_gradients']:,}; "
        f"the published protocol would have computed {passes['published_protocol']:,}{tables} "
        f"({passes['published_to_ours']:.1f} times as many){all_tables}. "
        f"Passes took {format_seconds(passes['gradient_seconds'])}.",
        f"Held out: sets chosen on the other of {settings.folds} parts of the queries. Intervals: 95 %, "
        f"{settings.draws} bootstrap draws of originals. 'minus full': difference from the full gradient, in pairs.",
        "Agreement is the uncentred cosine of all similarities with the full gradient's; centred: each list around its "
        "own mean. Seconds of sets, layer outputs and rep-sim are parts of the measured pass, by their share of it.",
    ]
    for each in findings:
        put = int(each.candidates.forced.sum())
        notes.append(
            f"{each.words} candidates: the original is among them for {each.right.any(1).mean():.1%} of the queries"
            + (f", put there for {put}." if put else "; where it is not, the query counts as wrong.")
        )
    if truncated := int(result.inputs.data.truncated.sum()):
        notes.append(f"{truncated} of the compared examples were cut at the context.")
    return notes


def _as_component_list(each: Findings, objective: str) -> str:
    """Return the chosen set: one parameter a line, and facts about it in lines that begin with #."""
    search, sizes = each.searches[objective], each.products.parameters
    count = len(search["chosen"])
    share = search["parameters_along_path"][count - 1] / sizes.sum()
    lines = [
        f"# Chosen by `vestige evaluate components` for {objective} among {each.words} candidates.",
        f"# {count} of {len(sizes)} components, {share:.2%} of their parameters.",
        f"# {objective} on the queries it was chosen on: {search['chosen_value']:.4f}.",
        f"# Accuracy of sets chosen alike, on queries they were not chosen on: {search['held_out_accuracy']:.4f}.",
        *dict.fromkeys(name.partition("[")[0] for name in search["chosen"]),
    ]
    return "\n".join(lines) + "\n"


def _as_csv(findings: Findings, names: Sequence[str]) -> str:
    """Return cosines of each component for some queries, as CSV: query, candidate, right, component, cosine."""
    lines = ["query,candidate,right,component,cosine"]
    for query in findings.most_divergent():
        cosine = findings.products.of([query]).each()[:, 0, :_CANDIDATES_DRAWN]
        quoted = '"' + names[query].replace('"', '""') + '"'
        for candidate, values in enumerate(cosine.T):
            start = f"{quoted},{candidate},{int(findings.right[query, candidate])}"
            pairs = zip(findings.products.names, values, strict=True)
            lines += [f"{start},{name},{value:.6g}" for name, value in pairs]
    return "\n".join(lines) + "\n"


def _as_markdown(evaluation: Evaluation, findings: Sequence[Findings]) -> str:
    """Return the whole result as Markdown."""
    head = ["representation", *evaluation.rows[0].values, "seconds"]
    rows = [
        [
            row.method,
            *map(format_value, row.values.values()),
            "" if row.seconds is None else format_seconds(row.seconds),
        ]
        for row in evaluation.rows
    ]
    lines = [f"# {evaluation.title}", "", *_markdown_table(head, rows), ""]
    lines += [f"- {note}" for note in evaluation.notes]
    for each in findings:
        head = ["component", "parameters", "backward", "accuracy", "agreement", "centred", "layer output"]
        rows = [
            [
                one["name"],
                f"{one['parameters']:,}",
                f"{one['backward']:.0%}",
                format_value(one["accuracy"]),
                *(_round(one[name]) for name in ("agreement", "centred", "output_accuracy")),
            ]
            for one in each.components
        ]
        lines += ["", f"## Components, {each.words} candidates", "", *_markdown_table(head, rows), ""]
        lines += [f"## Wrong decisions of the full gradient, {each.words} candidates: {len(each.wrong)}", ""]
        head = ["query", "picked", "its similarity", "originals", "their similarity", "rank by BM25", "tokens"]
        lines += _markdown_table(head, list(map(_wrong_cells, each.wrong[:_WRONG_LISTED]))) if each.wrong else ["None."]
        if len(each.wrong) > _WRONG_LISTED:
            lines += ["", f"{len(each.wrong) - _WRONG_LISTED} more are in components.json."]
    return "\n".join(lines) + "\n"


def _wrong_cells(one: Finding) -> list[str]:
    originals = ", ".join(one["originals"]) or "not listed"
    cells = [one["query"], one["picked"], _round(one["similarity"]), originals, _round(one["original_similarity"])]
    tokens = map(str, [one["query_tokens"], one["picked_tokens"], *one["original_tokens"]])
    return [*cells, str(one["rank_by_bm25"]), ", ".join(tokens)]


def _round(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def _draw_components(findings: Findings) -> dict[str, bytes]:
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
        cosine = findings.products.of([query]).each()[:, 0, :_CANDIDATES_DRAWN]
        for values, right in zip(cosine.T, findings.right[query], strict=False):
            style: dict[str, Any] = {"color": "#8A8A8A", "linewidth": 0.9, "alpha": 0.7}
            axes.plot(values, **({"color": "#D55E00", "linewidth": 1.8, "alpha": 1} if right else style))
        axes.set_title(f"query number {query}; orange: its original", fontsize="small", loc="right")
        finish_axes(axes, "component, in the order of the model" if axes is panels[-1] else "", "cosine", "y")
    return render_figure(figure, "self_similarity")


def _draw_paths(name: str, findings: Findings) -> dict[str, bytes]:
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
