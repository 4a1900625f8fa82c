"""The items of a benchmark under the model: which stand in the training data, and what that does to its answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from vestige.errors import DataError
from vestige.measures._attack import Interval, share
from vestige.measures._contamination import Match, find_matches
from vestige.measures._evidence import gather, span
from vestige.measures._job import AuditJob
from vestige.progress import announce
from vestige.runs import ContaminationRecord, InflationRecord, Scores
from vestige.settings import AuditSettings, LaunchSettings
from vestige.storage import partial_folder

_NOT_OF_ITEMS = (
    *("against", "against_scores", "bank", "bank_subset", "canaries", "checkpoints", "flag", "holdout", "limit"),
    *("pair_field", "where", *LaunchSettings.model_fields),
)
"""Settings that say nothing about a benchmark; its items are measured without them, in this process."""
LEADING = 10
"""Rows of a list of scores among which the matching row counts as one that the answer rests on."""


Ranks = list[int | None]
Benchmark = tuple[ContaminationRecord | None, pa.Table | None]
"""What was found of a benchmark, and the table of its items."""


def measure_benchmark(job: AuditJob) -> Benchmark:
    """Find the items of `--against` in the training data, and measure the model's answers to them; none without it.

    Raises:
        DataError: The scores are of other items or other training data.
    """
    settings = job.settings
    if settings.against is None:
        return None, None
    held = job.models.of(job.main.source)
    measured = ("loss", "answer_loss", "accuracy", *(("perplexity_ratio",) if settings.reference_model else ()))
    defaults = {name: AuditSettings.model_fields[name].default for name in _NOT_OF_ITEMS}
    of_items = defaults | {
        "data": settings.against,
        "model": held.model,
        "tokenizer": job.tokenizer,
        "measures": measured,
        "out": partial_folder(settings.out) / "against",
    }
    items = AuditJob(settings.model_copy(update=of_items))
    announce(
        f"Looking for {len(items.data):,} items of {items.data.name} among {int((~job.held_out).sum()):,} examples."
    )
    rows = np.flatnonzero(~job.held_out)
    texts = [job.texts[row] for row in rows]
    matches = find_matches(items.texts, texts, span=settings.against_span, near=settings.against_near)
    ids = [job.data.examples[int(row)].id for row in rows]
    ranks = _find_ranks(job, items, matches, ids)
    columns = gather(items).last.measures
    table = _make_table(items, matches, ids, columns, ranks)
    return _make_record(items, matches, columns, ranks), table


def _find_ranks(job: AuditJob, items: AuditJob, matches: list[Match], ids: list[str]) -> Ranks | None:
    """Return the rank of the matching row in each item's list of scores, 1 the highest, None where it is not listed.

    None without scores.
    """
    given = job.settings.against_scores
    if given is None:
        return None
    scores, found = Scores.open(given), Ranks([None] * len(matches))
    for number, (match, example) in enumerate(zip(matches, items.data.examples, strict=True)):
        if match.row is None:
            continue
        if example.id not in scores.queries:
            raise DataError(
                f"--against-scores {given}: no query is called {example.id!r}. Make it with --queries "
                f"{job.settings.against}, so that every item is a query."
            )
        listed = [row.example_id for row in scores.listed(example.id, "proponent")]
        found[number] = listed.index(ids[match.row]) + 1 if ids[match.row] in listed else None
    return found


def _make_table(
    items: AuditJob,
    matches: list[Match],
    ids: list[str],
    columns: dict[str, np.ndarray],
    ranks: Ranks | None,
) -> pa.Table:
    def column(name: str) -> pa.Array:
        values = columns.get(name, np.full(len(matches), np.nan))
        return pa.array(np.asarray(values, dtype=np.float64), pa.float64(), from_pandas=True)

    return pa.table(
        {
            "item_id": pa.array([example.id for example in items.data.examples], pa.string()),
            "kind": pa.array([match.kind for match in matches], pa.string()),
            "example_id": pa.array([None if m.row is None else ids[m.row] for m in matches], pa.string()),
            "words": pa.array([match.words for match in matches], pa.int64()),
            "share": pa.array([match.share for match in matches], pa.float64()),
            "span": pa.array([match.text for match in matches], pa.string()),
            "similarity": pa.array([match.similarity for match in matches], pa.float64()),
            "most_similar": pa.array([ids[match.similar] for match in matches], pa.string()),
            **{name: column(name) for name in ("loss", "answer_loss", "accuracy", "perplexity_ratio")},
            "score_rank": pa.array(ranks or [None] * len(matches), pa.int64()),
            "text": pa.array(items.texts, pa.string()),
        }
    )


def _make_record(
    items: AuditJob, matches: list[Match], columns: dict[str, np.ndarray], ranks: Ranks | None
) -> ContaminationRecord:
    kinds = np.array([match.kind for match in matches])
    dirty, clean = np.isin(kinds, ("verbatim", "near copy")), kinds == "clean"
    listed = None
    if ranks is not None:
        leading = sum(rank is not None and rank <= LEADING for rank in ranks)
        listed = span(share(leading, int(dirty.sum())))
    return ContaminationRecord(
        name=items.data.name,
        fingerprint=items.data.fingerprint,
        items=len(matches),
        verbatim=int((kinds == "verbatim").sum()),
        near_copies=int((kinds == "near copy").sum()),
        too_short=int((kinds == "too short").sum()),
        leading=listed,
        inflation=[
            found
            for name in ("accuracy", "answer_loss", "loss", "perplexity_ratio")
            if name in columns and (found := _measure_inflation(name, columns[name], dirty, clean)) is not None
        ],
    )


def _measure_inflation(name: str, values: np.ndarray, dirty: np.ndarray, others: np.ndarray) -> InflationRecord | None:
    """Return the difference between items in the training data and clean ones; None without two of each."""
    from scipy.stats import ttest_ind

    known = ~np.isnan(values)
    inside, clean = values[known & dirty], values[known & others]
    if min(len(inside), len(clean)) < 2:
        return None
    difference = float(inside.mean() - clean.mean())
    ends = (np.nan, np.nan)
    if np.ptp(inside) > 0 or np.ptp(clean) > 0:
        interval: Any = ttest_ind(inside, clean, equal_var=False).confidence_interval()  # pyright: ignore[reportAttributeAccessIssue]
        ends = float(interval.low), float(interval.high)
    return InflationRecord(
        measure=name,
        inside=float(inside.mean()),
        clean=float(clean.mean()),
        difference=span(Interval(difference, *ends)),
        whole=float(values[known].mean()),
        items_inside=len(inside),
        items_clean=len(clean),
    )


def describe_contamination(found: ContaminationRecord) -> list[str]:
    """Return what was found, in words."""
    dirty = found.verbatim + found.near_copies
    notes = [
        f"Contamination of {found.name}: {dirty:,} of {found.items:,} items stand in the training data, "
        f"{found.verbatim:,} verbatim and {found.near_copies:,} as near copies; {found.too_short:,} are "
        "too short to say (contamination.parquet)."
    ]
    if found.leading is not None and found.leading[0] is not None:
        value, low, high = found.leading
        notes.append(
            f"Of these, the matching row is among the {LEADING} with the highest scores for {value:.1%} "
            f"[{low or 0:.1%}, {high or 0:.1%}]: their answers rest on it."
        )
    for each in found.inflation:
        value, low, high = each.difference
        ends = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
        notes.append(
            f"{each.measure}: {each.inside:.3f} on the items found, {each.clean:.3f} on the clean ones, difference "
            f"{value or 0:+.3f}{ends}; {each.whole:.3f} on all. Items that are easier by themselves differ too: "
            "--reference-model compares with a model that has not seen them."
        )
    return notes
