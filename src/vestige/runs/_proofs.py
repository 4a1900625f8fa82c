"""Three proofs of an answer, side by side: what moved the model to it, where it stands, and whether it is memorized."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vestige import runs
from vestige.runs._listed import ScoreTable
from vestige.terminal import shorten

_NAMED = 3
_TEXT = 160


class StatedRow(NamedTuple):
    """A training row that holds a span."""

    example_id: str
    row: int
    """Position in the training data."""
    position: int
    """Tokens of the row before the span."""
    source: str | None
    before: str
    """The end of what stands before the span."""
    after: str
    """The beginning of what stands behind it."""
    extraction: float | None
    """Share of the span that the model gives back after what stands before it: 1 is word for word. None where nothing
    does, or the row was not measured."""
    loss: float | None
    """Of the row, nats per target token; None where it was not measured."""
    counterfactual: float | None
    """Mean margin of the models of a bank that were trained on the row minus that of the others."""


class VerbatimSpan(NamedTuple):
    """A run of tokens of an answer that stands in training rows, and is part of no longer one."""

    text: str
    tokens: int
    occurrences: int
    """In all training rows."""
    rows: int
    """That hold it."""
    rarity: float
    """Sum over its tokens of log(all training tokens / those equal to it), nats."""
    listed: tuple[StatedRow, ...]
    """The first of these rows."""


class Proofs(NamedTuple):
    """What is known of an answer, in words; none of the three follows from another."""

    moved_it: str
    """What the ranking says: which rows moved the model towards the answer."""
    states_it: str
    """Where the answer, or a part of it, stands word for word."""
    memorized: str
    """Whether the model goes on with these words as the rows do."""


def list_spans(rows: Sequence[dict[str, Any]], query: str, least: int) -> ScoreTable[VerbatimSpan]:
    """Return the spans of a query out of the rows of `verbatim`; `least` tokens were searched for, or more."""
    spans = []
    for _, same in groupby((row for row in rows if row["query_id"] == query), key=lambda row: row["span"]):
        listed = list(same)
        places = tuple(StatedRow(*(row[name] for name in StatedRow._fields)) for row in listed)
        spans.append(VerbatimSpan(**{name: listed[0][name] for name in VerbatimSpan._fields[:-1]}, listed=places))
    headings = ("tokens", "occurrences", "rows", "text")
    note = "" if spans else f"(no training row has {least} tokens of the answer in a row)"
    return ScoreTable(spans, headings, _cells, f"Verbatim spans of query {shorten(query)}", note)


def _cells(span: VerbatimSpan) -> tuple[str, ...]:
    return str(span.tokens), f"{span.occurrences:,}", _name_rows(span), span.text


def prove(scores: "runs.Scores", query: int | str) -> Proofs:
    """Return what the ranking, the spans and the rows that hold them say of an answer.

    Args:
        scores: A run with `verbatim`.
        query: Position or id of the query.

    Raises:
        UserError: There is no such query, or the run has no spans.
    """
    spans, moved = scores.verbatim(query), _describe_moved(scores, query)
    if not spans:
        return Proofs(moved, f"Nothing states it: {spans.note[1:-1]}.", "Not tested: no row has words of the answer.")
    first, whole = spans[0], scores.query(query).answer
    is_whole = " ".join(first.text.split()) == " ".join(whole.split())
    what = "The whole answer" if is_whole else f"A part of the answer, “{shorten(first.text, _TEXT)}”,"
    others = len(spans) - 1
    more = f" {_count(others, 'other part')} of it stand{'s' if others == 1 else ''} in rows, too." if others else ""
    stated = f"{what} stands word for word in {_name_rows(first)}.{more}"
    return Proofs(moved, stated, _describe_memorized(spans))


def _describe_moved(scores: "runs.Scores", query: int | str) -> str:
    if not scores.meaning.causal:
        return f"Not known: {scores.run.method} says how alike rows are to the query, not what training on them does."
    found = runs.conclude(scores, query)
    if found.kind not in ("one", "several"):
        return found.sentences[0]
    names = ", ".join(map(shorten, found.rows[:_NAMED]))
    return f"{names}{', ...' if len(found.rows) > _NAMED else ''}: far ahead of all other rows."


def _name_rows(span: VerbatimSpan) -> str:
    names = ", ".join(shorten(row.example_id) for row in span.listed[:_NAMED])
    more = f" and {span.rows - _NAMED:,} more" if span.rows > _NAMED else ""
    return f"{_count(span.rows, 'row')}: {names}{more}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _describe_memorized(spans: Sequence[VerbatimSpan]) -> str:
    measured = [(span, row) for span in spans for row in span.listed if row.extraction is not None]
    if not measured:
        return "Not tested: nothing stands before these words in their rows."
    back = [(span, row) for span, row in measured if row.extraction == 1]
    if back:
        span, row = back[0]
        given = f"given what stands before it in {shorten(row.example_id)}"
        others = f", as in {len(back)} of {len(measured)} tested rows" if len(measured) > 1 else ""
        words = f"the model goes on with “{shorten(span.text, _TEXT)}” word for word"
        return f"Memorized: {given}, {words}{others}.{_add_numbers(row)}"
    span, row = max(measured, key=lambda one: one[1].extraction or 0.0)
    tested = _count(len(measured), "tested row")
    words = f"after what stands before them in {tested}, the model goes on with other words"
    return f"Not given back: {words}; closest to {shorten(row.example_id)}.{_add_numbers(row)}"


def _add_numbers(row: StatedRow) -> str:
    loss = "" if row.loss is None else f" The loss of this row is {row.loss:.2f} nats a token."
    if row.counterfactual is None:
        return loss
    better = "better" if row.counterfactual > 0 else "no better"
    return f"{loss} Models of the bank that were trained on it know it {better} (margin {row.counterfactual:+.2f})."
