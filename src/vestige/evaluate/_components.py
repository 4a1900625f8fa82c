"""`vestige evaluate components`: which components of the gradient distinguish an original from other examples?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vestige.errors import UserError
from vestige.evaluate._component_files import (
    PATHS,
    SIMILARITY,
    as_component_list,
    as_markdown,
    draw_files,
    list_drawings,
)
from vestige.evaluate._component_findings import Finding, Findings
from vestige.evaluate._component_pass import OnePassResult, one_pass_result
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, as_plain, write_evaluation
from vestige.jobs import is_follower
from vestige.parsing import parse_json
from vestige.progress import format_bytes, format_seconds
from vestige.settings import ComponentsSettings, with_settings


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
    return write_components(settings, one_pass_result(settings))


def reopen_components(folder: Path) -> OnePassResult:
    """Return the products in the folder of an earlier `components`; its model and data are read again for the ids.

    Raises:
        UserError: There is no such result, its inputs are gone, or were objects of a Python program.
        IndexMismatch: They have changed since.
    """
    path = folder / "components.json"
    try:
        given: dict[str, Any] = dict(parse_json(path.read_bytes())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say what it was made from ({error!r}). Run its command again, which keeps the products."
        ) from None
    for name in ("data", "queries"):
        if isinstance(given[name], list):
            given[name] = [Path(one) for one in given[name]]
    given["out"] = folder
    return one_pass_result(ComponentsSettings(**given))


def write_components(settings: ComponentsSettings, result: OnePassResult, command: str | None = None) -> Evaluation:
    """Write everything that follows from products, computed or read, into `settings.out`, and return it.

    Args:
        settings: How sets are chosen and judged.
        result: The products.
        command: What was typed, if not `vestige evaluate components`.
    """
    findings = [Findings(settings, result, words) for words in settings.candidates]
    several = len(findings) > 1
    rows = [_row(one, f" ({each.words})" if several else "") for each in findings for one in each.representations]
    inputs, passes = result.inputs, None if result.is_read else _count_passes(settings, result)
    choices = {each.words: each.to_json() for each in findings}
    evaluation = Evaluation(
        "components",
        f"Originals of {len(inputs.queries)} queries among {len(inputs.train)} examples "
        f"({', '.join(settings.candidates)} candidates), {len(inputs.components)} components",
        tuple(sorted(rows, key=lambda row: row.opponent)),
        tuple(_notes(settings, result, passes, findings)),
        {
            "command": command or settings.command_line("evaluate components"),
            "settings": settings.record(),
            "model": inputs.loaded.name,
            "passes": passes,
            "seconds_of": result.seconds,
            "candidates": choices,
        },
    )
    if is_follower():
        return evaluation
    similarity = findings[0].similarity()
    files = {"components.md": as_markdown(evaluation, choices).encode(), f"{SIMILARITY}.csv": similarity.encode()}
    for place, each in enumerate(findings):
        suffix = f"_{each.words}" if place else ""
        for objective in each.searches:
            files[f"{objective}{suffix}.components"] = as_component_list(
                each.words, choices[each.words], objective
            ).encode()
        if settings.figures:
            plain = as_plain(choices[each.words])
            drawings = list_drawings(plain, "" if place else similarity)
            wanted = (one for one in drawings if not place or one.file == PATHS)
            files |= draw_files(wanted, plain["components"], suffix)
    return write_evaluation(evaluation, settings.out, files, settings.report_to)


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
    settings: ComponentsSettings, result: OnePassResult, passes: dict[str, Any] | None, findings: Sequence[Findings]
) -> list[str]:
    notes = [
        _describe_passes(passes, settings.candidates)
        if passes is not None
        else "The products were read from files of other software, which say nothing of what they cost.",
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


def _describe_passes(passes: dict[str, Any], candidates: Sequence[str]) -> str:
    tables = f" for {candidates[0]} candidates" if len(candidates) > 1 else ""
    all_tables = f", {passes['published_protocol_all_tables']:,} for all of them" if tables else ""
    return (
        f"Each distinct gradient was computed once: {passes['backward_passes']:,} of {passes['distinct_gradients']:,}; "
        f"the published protocol would have computed {passes['published_protocol']:,}{tables} "
        f"({passes['published_to_ours']:.1f} times as many){all_tables}. "
        f"Passes took {format_seconds(passes['gradient_seconds'])}."
    )
