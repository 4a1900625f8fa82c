"""The tables of a component search as text: Markdown, CSV, and the chosen set as a file for `--components @FILE`."""

from collections.abc import Sequence
from typing import Any

from vestige.evaluate._component_findings import Findings, SearchFinding
from vestige.evaluate._component_products import Objective
from vestige.evaluate._result import Evaluation, shown
from vestige.progress import format_seconds

_SHOWN_WRONG = 50


def component_table(findings: Findings) -> list[dict[str, Any]]:
    """Return every component by itself, in JSON terms."""
    return [one._asdict() for one in findings.components]


def selection_file(findings: Findings, objective: Objective, search: SearchFinding) -> str:
    """Return the chosen set: one parameter a line, and facts about it in lines that begin with #."""
    sizes = findings.products.parameters
    chosen = list(search.chosen)
    value = search.path.values[len(chosen) - 1]
    held = search.held_out
    lines = [
        f"# Chosen by `vestige evaluate components` for {objective} among {findings.words} candidates.",
        f"# {len(chosen)} of {len(sizes)} components, {sizes[chosen].sum() / sizes.sum():.2%} of their parameters.",
        f"# {objective} on the queries it was chosen on: {value:.4f}.",
        f"# Accuracy of sets chosen alike, on queries they were not chosen on: {held.credit.mean():.4f}.",
        *dict.fromkeys(findings.products.names[number].partition("[")[0] for number in chosen),
    ]
    return "\n".join(lines) + "\n"


def self_similarity_table(findings: Findings, queries: Sequence[int], names: Sequence[str]) -> str:
    """Return cosines of each component for some queries, as CSV: query, candidate, right, component, cosine."""
    lines = ["query,candidate,right,component,cosine"]
    for query in queries:
        cosine = findings.products.of([query]).each()[:, 0]
        for candidate in range(min(5, cosine.shape[1])):
            right = int(findings.right[query, candidate])
            quoted = '"' + names[query].replace('"', '""') + '"'
            lines += [
                f"{quoted},{candidate},{right},{name},{value:.6g}"
                for name, value in zip(findings.products.names, cosine[:, candidate], strict=True)
            ]
    return "\n".join(lines) + "\n"


def markdown_of(evaluation: Evaluation, findings: Sequence[Findings]) -> str:
    """Return the whole result as Markdown."""
    columns = list(evaluation.rows[0].values)
    lines = [f"# {evaluation.title}", "", *_head(["representation", *columns, "seconds"])]
    for row in evaluation.rows:
        seconds = "" if row.seconds is None else format_seconds(row.seconds)
        lines.append(_line([row.method, *(shown(row.values.get(name)) for name in columns), seconds]))
    lines += ["", *(f"- {note}" for note in evaluation.notes)]
    for each in findings:
        lines += ["", *_components_of(each), "", *_wrong_of(each)]
    return "\n".join(lines) + "\n"


def _components_of(each: Findings) -> list[str]:
    names = ("component", "parameters", "backward", "accuracy", "agreement", "centred", "layer output")
    lines = [f"## Components, {each.words} candidates", "", *_head(names)]
    for one in each.components:
        output = "" if one.output_accuracy is None else f"{one.output_accuracy:.3f}"
        cells = [one.name, f"{one.parameters:,}", f"{one.backward:.0%}", shown(one.accuracy)]
        lines.append(_line([*cells, f"{one.agreement:.3f}", f"{one.centred:.3f}", output]))
    return lines


def _wrong_of(each: Findings) -> list[str]:
    names = ("query", "picked", "its similarity", "originals", "their similarity", "rank by BM25", "tokens")
    lines = [f"## Wrong decisions of the full gradient, {each.words} candidates: {len(each.wrong)}", ""]
    if not each.wrong:
        return [*lines, "None."]
    lines += _head(names)
    for one in each.wrong[:_SHOWN_WRONG]:
        known = one["original_similarity"]
        cells = [one["query"], one["picked"], f"{one['similarity']:.3f}", ", ".join(one["originals"]) or "not listed"]
        tokens = f"{one['query_tokens']}, {one['picked_tokens']}, {', '.join(map(str, one['original_tokens']))}"
        lines.append(_line([*cells, "" if known is None else f"{known:.3f}", str(one["rank_by_bm25"]), tokens]))
    if len(each.wrong) > _SHOWN_WRONG:
        lines += ["", f"{len(each.wrong) - _SHOWN_WRONG} more are in components.json."]
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
