"""`vestige evaluate components`: which components of the gradient distinguish an original from other examples?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vestige.evaluate._component_figures import component_figures, path_figure
from vestige.evaluate._component_findings import Findings, find, most_divergent
from vestige.evaluate._component_judge import Representation
from vestige.evaluate._component_run import OnePassResult, one_pass_result
from vestige.evaluate._component_write import component_table, markdown_of, selection_file, self_similarity_table
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, write_evaluation
from vestige.launch import is_follower
from vestige.progress import format_bytes, format_seconds
from vestige.settings import ComponentsSettings, verb


@verb(ComponentsSettings)
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
    evaluation = Evaluation(
        "components",
        _title(result, settings),
        tuple(sorted(rows, key=lambda row: row.opponent)) if several else tuple(rows),
        tuple(_notes(settings, result, findings)),
        {
            "command": settings.command_line("evaluate components"),
            "model": result.inputs.compared.loaded.name,
            "passes": _passes(settings, result),
            "seconds_of": result.seconds,
            "candidates": {each.words: _candidate_details(each) for each in findings},
        },
    )
    if is_follower():
        return evaluation
    return write_evaluation(evaluation, settings.out, _files(settings, result, evaluation, findings))


def _files(
    settings: ComponentsSettings, result: OnePassResult, evaluation: Evaluation, findings: Sequence[Findings]
) -> dict[str, bytes]:
    """Return every file but the JSON file, by name; the first choice of candidates has the plain names."""
    first = findings[0]
    files = {"components.md": markdown_of(evaluation, findings).encode()}
    for place, each in enumerate(findings):
        suffix = f"_{each.words}" if place else ""
        for objective, search in each.searches.items():
            files[f"{objective}{suffix}.components"] = selection_file(each, objective, search).encode()
        if place and settings.figures:
            files |= path_figure(f"greedy_paths{suffix}", each)
    queries = [one.id for one in result.inputs.queries.examples]
    files["self_similarity.csv"] = self_similarity_table(first, most_divergent(first), queries).encode()
    return files | (component_figures(first, "") if settings.figures else {})


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


def _title(result: OnePassResult, settings: ComponentsSettings) -> str:
    inputs = result.inputs
    return (
        f"Originals of {len(inputs.queries)} queries among {len(inputs.train)} examples "
        f"({', '.join(settings.candidates)} candidates), {len(inputs.compared.components)} components"
    )


def _passes(settings: ComponentsSettings, result: OnePassResult) -> dict[str, Any]:
    """Return the number of gradients computed, and the number that the published protocol needs for the same table."""
    # Similarities and products by parameter run each query and each of its candidates again, projections twice.
    tables = {words: 4 * int((1 + one.listed.sum(1)).sum()) for words, one in result.gradients.items()}
    published = tables[settings.candidates[0]]
    return {
        "distinct_gradients": len(result.inputs.compared.data),
        "backward_passes": result.computed,
        "published_protocol": published,
        "published_to_ours": published / max(result.computed, 1),
        "published_protocol_by_candidates": tables,
        "published_protocol_all_tables": sum(tables.values()),
        "all_tables_to_ours": sum(tables.values()) / max(result.computed, 1),
        "gradient_seconds": result.seconds.get("gradients", 0.0),
        "published_seconds_estimated": result.seconds.get("gradients", 0.0) * published / max(result.computed, 1),
        "first_candidates": settings.candidates[0],
    }


def _candidate_details(each: Findings) -> dict[str, Any]:
    ranks = each.candidates.rank
    return {
        "original_listed": float(each.right.any(1).mean()),
        "original_put_there": int(each.candidates.forced.sum()),
        "rank_of_original_by_bm25": {str(rank): int((ranks == rank).sum()) for rank in np.unique(ranks).tolist()},
        "representations": [one._asdict() for one in each.representations],
        "components": component_table(each),
        "searches": {
            objective: {
                "path": [each.products.names[number] for number in search.path.order],
                **{f"{name}_along_path": list(values) for name, values in search.along.items()},
                "parameters_along_path": np.cumsum(each.products.parameters[list(search.path.order)]).tolist(),
                "chosen": [each.products.names[number] for number in search.chosen],
                "chosen_by_fold": [[each.products.names[number] for number in fold] for fold in search.held_out.chosen],
                "train": search.held_out.train,
                "held_out_accuracy": float(search.held_out.credit.mean()),
            }
            for objective, search in each.searches.items()
        },
        "wrong": list(each.wrong),
    }


def _notes(settings: ComponentsSettings, result: OnePassResult, findings: Sequence[Findings]) -> list[str]:
    passes = _passes(settings, result)
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
    truncated = int(result.inputs.compared.data.truncated.sum())
    if truncated:
        notes.append(f"{truncated} of the compared examples were cut at the context.")
    return notes
