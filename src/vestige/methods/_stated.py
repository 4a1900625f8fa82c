"""Where an answer stands word for word in the training data, and whether the model has memorized these rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vestige import indexes, models
from vestige.data import TokenizedData, TokenSearch, TokenSpan, space_twins
from vestige.methods import Job
from vestige.registry import import_object
from vestige.runs import token_texts
from vestige.storage import partial_folder

_MEASURE = "vestige.measures:measure_memorized"
"""Measures stand above methods, and are found by name, as commands find their functions."""
MEASURED = 5
"""Rows of a query that are measured: those listed first for its rarest spans."""
_AROUND = 16
"""Tokens of a row that are shown before a span, and behind it."""


def find_stated(job: Job) -> list[dict[str, Any]]:
    """Return the rows of the table `verbatim`: for each query its spans, the rarest first, and the rows of each.

    A span is a run of tokens of the answer that stands in a training row and cannot be made longer. Special tokens and
    the question are no part of the answer, and a text is one as a whole.
    """
    loaded = job.model_for("verbatim")
    kept = job.settings.index  # that of several checkpoints is a list
    folder = Path(kept) if isinstance(kept, str | Path) else partial_folder(job.settings.out)
    search = indexes.open_search(folder / indexes.VERBATIM, job.train, loaded.vocabulary)
    found = [entry for query in range(len(job.queries)) for entry in _find_spans(job, loaded, search, query)]
    wanted = [entry for entry in found if entry.pop("measured")]
    places = [(entry["row"], entry["position"], entry["tokens"]) for entry in wanted]
    options: dict[str, Any] = {"bank": job.settings.bank, "token_budget": job.token_budget}
    measured = import_object(_MEASURE)(loaded.model, job.train, places, **options)
    for entry, values in zip(wanted, measured, strict=True):
        entry.update(values)
    return found


def _find_spans(job: Job, loaded: models.LoadedModel, search: TokenSearch, query: int) -> Iterator[dict[str, Any]]:
    ids, tokenizer = job.queries.input_ids[query], loaded.tokenizer
    texts, twins = token_texts(ids, tokenizer) or [f"{token} " for token in ids], space_twins(tokenizer, ids)
    spans = [
        span._replace(start=span.start + run.start, stop=span.stop + run.start)
        for run in _answer_runs(job.queries, query, getattr(tokenizer, "all_special_ids", ()))
        for span in search.find(ids[run.start : run.stop].tolist(), job.settings.verbatim_tokens, twins)
    ]
    measured: set[int] = set()
    for number, span in enumerate(sorted(spans, key=lambda one: (-one.rarity, one.start)), 1):
        for row, position in span.places:
            is_new = row not in measured and len(measured) < MEASURED
            measured |= {row} if is_new else set()
            yield {
                "query_id": job.queries.examples[query].id,
                "span": number,
                "text": "".join(texts[span.start : span.stop]).strip(),
                "tokens": span.stop - span.start,
                **{name: getattr(span, name) for name in ("start", "rarity", "occurrences", "rows")},
                **_describe_row(job.train, row, position, span, tokenizer),
                "measured": is_new,
            }


def _answer_runs(queries: TokenizedData, query: int, special: Sequence[int]) -> list[range]:
    """Return the runs of positions that hold the answer of a query, without special tokens."""
    ids, wanted = queries.input_ids[query], queries.targets[query].copy()
    if queries.examples[query].text is not None and len(wanted) > 1:
        # Nothing predicts the first token of a text, and it is one of its words.
        wanted[0] = wanted[1]
    wanted &= ~np.isin(ids, list(special))
    borders = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
    return [range(start, stop) for start, stop in borders.reshape(-1, 2).tolist()]


def _describe_row(train: TokenizedData, row: int, position: int, span: TokenSpan, tokenizer: Any) -> dict[str, Any]:
    example, ids = train.examples[row], train.input_ids[row]
    stop = position + span.stop - span.start
    first = max(0, position - _AROUND)
    shown = token_texts(ids[first : stop + _AROUND], tokenizer)
    return {
        "example_id": example.id,
        "row": row,
        "position": position,
        "source": example.source,
        "before": "".join(shown[: position - first]),
        "after": "".join(shown[stop - first :]),
    }
