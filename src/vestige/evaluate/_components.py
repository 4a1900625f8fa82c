"""`vestige evaluate components`: which components of the gradient distinguish an original from other examples?"""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from vestige.evaluate._components_findings import (
    FULL,
    ComponentFinding,
    Findings,
    OnePassResult,
    Representation,
    SearchFinding,
    find,
    one_pass_result,
)
from vestige.evaluate._components_search import OBJECTIVES
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, format_value, write_evaluation
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure
from vestige.launch import is_follower
from vestige.progress import format_bytes, format_seconds
from vestige.settings import ComponentsSettings, with_settings

_MOST_NAMES = 40
"""Up to this number of components, each name is written out."""
_CANDIDATES_DRAWN = 5
_WRONG_LISTED = 50
_ACCURACY: Callable[[ComponentFinding], float] = lambda one: one.accuracy.value  # noqa: E731
_AGREEMENT: Callable[[ComponentFinding], float] = lambda one: one.agreement  # noqa: E731


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
    findings = [find(settings, result, words) for words in settings.candidates]
    several = len(findings) > 1
    rows = [_row(one, f" ({each.words})" if several else "") for each in findings for one in each.representations]
    inputs, passes = result.inputs, _count_passes(settings, result)
    evaluation = Evaluation(
        "components",
        f"Originals of {len(inputs.queries)} queries among {len(inputs.train)} examples "
        f"({', '.join(settings.candidates)} candidates), {len(inputs.compared.components)} components",
        tuple(sorted(rows, key=lambda row: row.opponent)) if several else tuple(rows),
        tuple(_notes(settings, result, passes, findings)),
        {
            "command": settings.command_line("evaluate components"),
            "model": inputs.compared.loaded.name,
            "passes": passes,
            "seconds_of": result.seconds,
            "candidates": {each.words: _details(each) for each in findings},
        },
    )
    if is_follower():
        return evaluation
    files = {"components.md": _as_markdown(evaluation, findings).encode()}
    for place, each in enumerate(findings):
        suffix = f"_{each.words}" if place else ""
        for objective, search in each.searches.items():
            files[f"{objective}{suffix}.components"] = _as_component_list(each, objective, search).encode()
        if place and settings.figures:
            files |= draw_paths(f"greedy_paths{suffix}", each)
    names = [one.id for one in inputs.queries.examples]
    files["self_similarity.csv"] = _self_similarity_csv(findings[0], names).encode()
    return write_evaluation(evaluation, settings.out, files | (_draw_all(findings[0]) if settings.figures else {}))


def _row(one: Representation, suffix: str) -> EvaluationRow:
    values: dict[str, Value] = {
        "accuracy": one.accuracy,
        "minus full": one.against_full,
        "agreement": one.agreement.value if one.agreement else None,
        "centred": one.centred.value if one.centred else None,
        "parameters": None if one.parameters is None else f"{one.parameters:.2%}",
        "backward": None if one.backward is None else f"{one.backward:.0%}",
        "bytes": None if one.bytes is None else format_bytes(one.bytes),
    }
    return EvaluationRow(f"{one.name}{suffix}", values, one.seconds, None, one.opponent)


def _count_passes(settings: ComponentsSettings, result: OnePassResult) -> dict[str, Any]:
    """Return the number of gradients computed, and the number that the published protocol needs for the same table."""
    # Similarities and products by parameter run each query and each of its candidates again, projections twice.
    tables = {words: 4 * int((1 + one.listed.sum(1)).sum()) for words, one in result.gradients.items()}
    published, seconds = tables[settings.candidates[0]], result.seconds.get("gradients", 0.0)
    computed = max(result.computed, 1)
    return {
        "distinct_gradients": len(result.inputs.compared.data),
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


def _details(each: Findings) -> dict[str, Any]:
    ranks, names = each.candidates.rank, each.products.names
    return {
        "original_listed": float(each.right.any(1).mean()),
        "original_put_there": int(each.candidates.forced.sum()),
        "rank_of_original_by_bm25": {str(rank): int((ranks == rank).sum()) for rank in np.unique(ranks).tolist()},
        "representations": [one._asdict() for one in each.representations],
        "components": [one._asdict() for one in each.components],
        "searches": {
            objective: {
                "path": [names[number] for number in search.path.order],
                **{f"{name}_along_path": list(values) for name, values in search.along.items()},
                "parameters_along_path": np.cumsum(each.products.parameters[list(search.path.order)]).tolist(),
                "chosen": [names[number] for number in search.chosen],
                "chosen_by_fold": [[names[number] for number in fold] for fold in search.held_out.chosen],
                "train": search.held_out.train,
                "held_out_accuracy": float(search.held_out.credit.mean()),
            }
            for objective, search in each.searches.items()
        },
        "wrong": list(each.wrong),
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
    if truncated := int(result.inputs.compared.data.truncated.sum()):
        notes.append(f"{truncated} of the compared examples were cut at the context.")
    return notes


def _as_component_list(each: Findings, objective: str, search: SearchFinding) -> str:
    """Return the chosen set: one parameter a line, and facts about it in lines that begin with #."""
    sizes, chosen = each.products.parameters, list(search.chosen)
    lines = [
        f"# Chosen by `vestige evaluate components` for {objective} among {each.words} candidates.",
        f"# {len(chosen)} of {len(sizes)} components, {sizes[chosen].sum() / sizes.sum():.2%} of their parameters.",
        f"# {objective} on the queries it was chosen on: {search.path.values[len(chosen) - 1]:.4f}.",
        f"# Accuracy of sets chosen alike, on queries they were not chosen on: {search.held_out.credit.mean():.4f}.",
        *dict.fromkeys(each.products.names[number].partition("[")[0] for number in chosen),
    ]
    return "\n".join(lines) + "\n"


def _self_similarity_csv(findings: Findings, names: Sequence[str]) -> str:
    """Return cosines of each component for some queries, as CSV: query, candidate, right, component, cosine."""
    lines = ["query,candidate,right,component,cosine"]
    for query in _most_divergent(findings):
        cosine = findings.products.of([query]).each()[:, 0]
        quoted = '"' + names[query].replace('"', '""') + '"'
        for candidate in range(min(_CANDIDATES_DRAWN, cosine.shape[1])):
            start = f"{quoted},{candidate},{int(findings.right[query, candidate])}"
            pairs = zip(findings.products.names, cosine[:, candidate], strict=True)
            lines += [f"{start},{name},{value:.6g}" for name, value in pairs]
    return "\n".join(lines) + "\n"


def _most_divergent(findings: Findings) -> list[int]:
    """Return the three queries with the lowest cosine between the lists of the best component and the full gradient."""
    best = int(np.argmax([one.accuracy.value for one in findings.components]))
    cosine, full = findings.products.each([best])[0], findings.full
    lengths = np.sqrt((cosine**2).sum(1) * (full**2).sum(1))
    alike = np.where(lengths > 0, (cosine * full).sum(1) / np.maximum(lengths, 1e-300), 1.0)
    return np.argsort(alike, kind="stable")[:3].tolist()


def _as_markdown(evaluation: Evaluation, findings: Sequence[Findings]) -> str:
    """Return the whole result as Markdown."""
    columns = list(evaluation.rows[0].values)
    rows = [
        [
            row.method,
            *(format_value(row.values.get(name)) for name in columns),
            "" if row.seconds is None else format_seconds(row.seconds),
        ]
        for row in evaluation.rows
    ]
    lines = [f"# {evaluation.title}", "", *_markdown_table(["representation", *columns, "seconds"], rows)]
    lines += ["", *(f"- {note}" for note in evaluation.notes)]
    for each in findings:
        head = ["component", "parameters", "backward", "accuracy", "agreement", "centred", "layer output"]
        rows = [
            [
                one.name,
                f"{one.parameters:,}",
                f"{one.backward:.0%}",
                format_value(one.accuracy),
                f"{one.agreement:.3f}",
                f"{one.centred:.3f}",
                "" if one.output_accuracy is None else f"{one.output_accuracy:.3f}",
            ]
            for one in each.components
        ]
        lines += ["", f"## Components, {each.words} candidates", "", *_markdown_table(head, rows), ""]
        lines += [f"## Wrong decisions of the full gradient, {each.words} candidates: {len(each.wrong)}", ""]
        lines += _wrong_lines(each)
    return "\n".join(lines) + "\n"


def _wrong_lines(each: Findings) -> list[str]:
    if not each.wrong:
        return ["None."]
    rows = []
    for one in each.wrong[:_WRONG_LISTED]:
        known, originals = one["original_similarity"], ", ".join(one["originals"]) or "not listed"
        tokens = f"{one['query_tokens']}, {one['picked_tokens']}, {', '.join(map(str, one['original_tokens']))}"
        cells = [one["query"], one["picked"], f"{one['similarity']:.3f}", originals]
        rows.append([*cells, "" if known is None else f"{known:.3f}", str(one["rank_by_bm25"]), tokens])
    head = ["query", "picked", "its similarity", "originals", "their similarity", "rank by BM25", "tokens"]
    left = len(each.wrong) - _WRONG_LISTED
    return [*_markdown_table(head, rows), *(["", f"{left} more are in components.json."] if left > 0 else [])]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def _draw_all(findings: Findings) -> dict[str, bytes]:
    """Draw all figures as PDF and PNG, by file name."""
    return {
        **_draw_values("parameters_per_component", findings, lambda one: one.parameters, "parameters", log=True),
        **_draw_accuracy(findings),
        **_draw_depths(findings),
        **_draw_values("agreement_with_full_gradient", findings, _AGREEMENT, "agreement with the full gradient"),
        **_draw_self_similarity(findings),
        **draw_paths("greedy_paths", findings),
    }


def _draw_values(
    name: str, findings: Findings, value: Callable[[ComponentFinding], float], label: str, *, log: bool = False
) -> dict[str, bytes]:
    figure, (axes,) = make_figure(9.5, 3.8)
    _draw_bars(axes, findings.components, value, label, log=log)
    return render_figure(figure, name)


def _colours(parts: Sequence[ComponentFinding]) -> dict[str, str]:
    """Return a colour for each type of component."""
    types = dict.fromkeys(one.type for one in parts)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(types)}


def _draw_bars(
    axes: Axes,
    parts: Sequence[ComponentFinding],
    value: Callable[[ComponentFinding], float],
    label: str,
    *,
    log: bool = False,
) -> None:
    for name, colour in _colours(parts).items():
        places = [number for number, one in enumerate(parts) if one.type == name]
        axes.bar(places, [value(parts[place]) for place in places], color=colour, label=name, width=0.85)
    if named := len(parts) <= _MOST_NAMES:
        axes.set_xticks(range(len(parts)), _shorten_names(parts), rotation=90, fontsize=6)
    if log:
        axes.set_yscale("log")
    finish_axes(axes, "" if named else "component, in the order of the model", label, "y", legend=True)


def _shorten_names(parts: Sequence[ComponentFinding]) -> list[str]:
    """Return the names without their common beginning and end, so that those of an adapter leave space for the bars."""
    names = [one.name.removesuffix(".weight").removesuffix(".default") for one in parts]
    shared = commonprefix(names).rpartition(".")[0]  # noqa: RUF071 (cut at a dot)
    return [name.removeprefix(f"{shared}.") if shared and len(names) > 1 else name for name in names]


def _draw_accuracy(findings: Findings) -> dict[str, bytes]:
    """Draw bars with the full gradient and chance as lines, and boxes by the number of parameters."""
    parts = findings.components
    figure, (axes, boxes) = make_figure(9.5, 7.2, 2)
    _draw_bars(axes, parts, _ACCURACY, "accuracy")
    for method, style in ((FULL, "-"), ("random", ":")):
        axes.axhline(_row_of(findings, method).accuracy.value, color="#333333", linestyle=style, linewidth=1.1)
    axes.set_title("line: full gradient; dotted: chance", fontsize="small", loc="right")
    sizes = sorted({one.parameters for one in parts})
    boxes.boxplot([[one.accuracy.value for one in parts if one.parameters == size] for size in sizes])
    boxes.set_xticks(range(1, len(sizes) + 1), [f"{size:,}" for size in sizes], fontsize=7)
    finish_axes(boxes, "parameters of the component", "accuracy", "y")
    return render_figure(figure, "accuracy_per_component")


def _row_of(findings: Findings, name: str) -> Representation:
    return next(one for one in findings.representations if one.name == name)


def _draw_depths(findings: Findings) -> dict[str, bytes]:
    """Draw a line for every type over the blocks: accuracy, agreement, and the mean of attention and of MLP."""
    parts = [one for one in findings.components if one.layer is not None]
    figure, (*panels, means) = make_figure(9.5, 8.6, 3)
    for axes, label, value in zip(panels, ("accuracy", "agreement"), (_ACCURACY, _AGREEMENT), strict=True):
        for kind, colour in _colours(parts).items():
            own = sorted((one for one in parts if one.type == kind), key=lambda one: one.layer or 0)
            layers, values = [one.layer or 0 for one in own], [value(one) for one in own]
            axes.plot(layers, values, "o-", color=colour, label=kind, markersize=3)
        finish_axes(axes, "", label, legend=True)
    kinds = (("attention", ("attn", "attention")), ("feed-forward", ("mlp", "fc", "ffn")))
    for colour, (label, words) in zip(COLOURS[:2], kinds, strict=True):
        own = [one for one in parts if any(word in one.type.lower() for word in words)]
        layers = sorted({one.layer or 0 for one in own})
        values = [np.mean([one.accuracy.value for one in own if one.layer == layer]) for layer in layers]
        means.plot(layers, values, "o-", color=colour, label=label, markersize=3)
    finish_axes(means, "block", "mean accuracy", legend=True)
    return render_figure(figure, "by_depth")


def _draw_self_similarity(findings: Findings) -> dict[str, bytes]:
    """Draw cosines of each component with the first candidates, for the queries where components differ most."""
    queries = _most_divergent(findings)
    figure, panels = make_figure(9.5, 2.6 * len(queries), len(queries))
    for axes, query in zip(panels, queries, strict=True):
        values = findings.products.of([query]).each()[:, 0]
        for candidate in range(min(_CANDIDATES_DRAWN, values.shape[1])):
            style: dict[str, Any] = {"color": "#8A8A8A", "linewidth": 0.9, "alpha": 0.7}
            if findings.right[query, candidate]:
                style = {"color": "#D55E00", "linewidth": 1.8, "alpha": 1}
            axes.plot(values[:, candidate], **style)
        axes.set_title(f"query number {query}; orange: its original", fontsize="small", loc="right")
        finish_axes(axes, "component, in the order of the model" if axes is panels[-1] else "", "cosine", "y")
    return render_figure(figure, "self_similarity")


def draw_paths(name: str, findings: Findings) -> dict[str, bytes]:
    """Draw agreement and accuracy along greedy paths by share of parameters; held-out sets, projections, the full."""
    figure, panels = make_figure(9.5, 3.9, 1, 2)
    total = findings.products.parameters.sum()
    projections = [one for one in findings.representations if one.name.startswith("projection")]
    for axes, objective in zip(panels, ("agreement", "accuracy"), strict=True):
        for colour, of in zip(COLOURS[:2], OBJECTIVES, strict=True):
            search = findings.searches[of]
            share = 100 * np.cumsum(findings.products.parameters[list(search.path.order)]) / total
            axes.plot(share, search.along[objective], color=colour, label=f"greedy for {of}, all queries")
        for one in projections:
            estimate = one.agreement if objective == "agreement" else one.accuracy
            place = (100 * (one.bytes or 0) / (4 * total), estimate.value if estimate else np.nan)
            mark = "x" if one.name.endswith("published") else "D"
            axes.plot([place[0]], [place[1]], mark, color="#333333", markersize=6)
            axes.annotate(one.name.removeprefix("projection "), place, fontsize=6)
        for colour, of in zip(COLOURS[:2], OBJECTIVES, strict=True):
            one = _row_of(findings, f"greedy for {of}, held out")
            if estimate := one.agreement if objective == "agreement" else one.accuracy:
                axes.plot([25 * (one.bytes or 0) / total], [estimate.value], "*", color=colour, markersize=11)
        full = 1.0 if objective == "agreement" else _row_of(findings, FULL).accuracy.value
        axes.axhline(full, color="#333333", linestyle="--", linewidth=1, label=FULL)
        finish_axes(axes, "% of the parameters (of projections: numbers kept)", objective)
        axes.legend(frameon=False, fontsize="x-small")
    return render_figure(figure, name)
