"""`vestige evaluate components`: which components of the gradient distinguish an original from other examples?"""

from collections.abc import Sequence
from typing import Any

from vestige.evaluate._component_figures import CANDIDATES_DRAWN, draw_components, draw_paths
from vestige.evaluate._component_findings import Finding, Findings
from vestige.evaluate._component_pass import OnePassResult, one_pass_result
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, format_value, write_evaluation
from vestige.jobs import is_follower
from vestige.progress import format_bytes, format_seconds
from vestige.settings import ComponentsSettings, with_settings

_WRONG_LISTED = 50


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
            files |= draw_paths(f"greedy_paths{suffix}", each)
    files["self_similarity.csv"] = _as_csv(findings[0], [one.id for one in inputs.queries.examples]).encode()
    return write_evaluation(
        evaluation, settings.out, files | (draw_components(findings[0]) if settings.figures else {})
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
        cosine = findings.products.of([query]).each()[:, 0, :CANDIDATES_DRAWN]
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
