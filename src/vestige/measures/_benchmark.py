"""The items of a benchmark under the model: which stand in the training data, and what that does to its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vestige.data import SuffixArray, words_of
from vestige.errors import DataError, SpecError
from vestige.measures._attack import Interval, share
from vestige.measures._evidence import as_span, gather
from vestige.measures._job import AuditJob
from vestige.progress import announce
from vestige.runs import ContaminationRecord, InflationRecord, Scores
from vestige.settings import AuditSettings, LaunchSettings
from vestige.storage import partial_folder

SPAN = 13
"""Words in a row that count as verbatim; a shorter item has to stand there whole."""
FEWEST_WORDS = 4
"""An item of fewer words is not searched for: it stands anywhere by chance."""
NEAR = 0.5
"""Similarity from which a row is a near copy."""
_COMMON = 0.05
"""Share of the items in which words of a row are the frame of a task, such as its instruction, and say nothing."""
_BLOCK = 2_000
"""Rows that are compared with all items at once."""

Kind = Literal["verbatim", "near copy", "clean", "too short"]
_NOT_OF_ITEMS = (
    *("against", "against_scores", "bank", "bank_subset", "canaries", "checkpoints", "choose_layer", "flag"),
    *("holdout", "label_field", "limit", "pair_field", "where", *LaunchSettings.model_fields),
)
"""Settings that say nothing about a benchmark; its items are measured without them, in this process."""
LEADING = 10
"""Rows of a list of scores among which the matching row counts as one that the answer rests on."""

Ranks = list[int | None]
Benchmark = tuple[ContaminationRecord | None, pa.Table | None]
"""What was found of a benchmark, and the table of its items."""


class Span(NamedTuple):
    """Words of an item that stand in a row, in the same order without a gap."""

    row: int
    words: int
    begin: int
    """Position of the first of them among the words of the item."""


@dataclass(frozen=True)
class Match:
    """What of the training data is most like one item."""

    kind: Kind
    row: int | None
    """Of the training data; None for an item that is clean or too short."""
    words: int
    """Of the longest span; 0 where none is long enough."""
    share: float
    """Of the item's words that this span has."""
    text: str
    """The span, in lower case."""
    similarity: float
    """Of the most similar row, 0 to 1."""
    similar: int
    """That row."""


def find_matches(items: Sequence[str], rows: Sequence[str], *, span: int = SPAN, near: float = NEAR) -> list[Match]:
    """Return, for each item, where it stands in the rows.

    Verbatim: `span` words in a row (letters and digits in lower case), or a shorter item whole; 13 as in Brown et al.
    2020, "Language models are few-shot learners". Words that more than 5 % of the items share, and two
    at least, are the frame of the task and do not count. A near copy: the cosine of TF-IDF vectors of four letters
    within words is `near` or more, rarity being that of rows and items together. A near copy inside a much longer row
    is not found.

    Args:
        items: Texts of the benchmark, with their answers.
        rows: Texts of the training data.
        span: Words.
        near: Above 0, at most 1.

    Raises:
        SpecError: A span below 1 or a similarity outside (0, 1].
    """
    if span < 1 or not 0 < near <= 1:
        raise SpecError(f"span={span}, near={near}: give 1 or more words, and a similarity above 0 and at most 1.")
    words = [words_of(item) for item in items]
    spans = find_spans(words, map(words_of, rows), span=span)
    similarity, similar = _find_similar(items, rows)
    found = []
    for own, longest, value, other in zip(words, spans, similarity, similar, strict=True):
        kind: Kind = "verbatim" if longest is not None else "near copy" if value >= near else "clean"
        kind = "too short" if len(own) < FEWEST_WORDS else kind
        row = longest.row if longest is not None else int(other) if kind == "near copy" else None
        count, begin = (longest.words, longest.begin) if longest is not None else (0, 0)
        text = " ".join(own[begin : begin + count])
        found.append(Match(kind, row, count, count / max(len(own), 1), text, float(value), int(other)))
    return found


def find_spans(items: Sequence[Sequence[str]], rows: Iterable[Sequence[str]], *, span: int = SPAN) -> list[Span | None]:
    """Return the longest run of words that each item shares with a row, the first row of several; None if too short.

    The words of all rows are sorted once, in memory (`vestige.data.SuffixArray`).
    """
    lengths = [min(span, len(item)) if len(item) >= FEWEST_WORDS else 0 for item in items]
    pieces = [
        [tuple(item[begin : begin + length]) for begin in range(len(item) - length + 1 if length else 0)]
        for item, length in zip(items, lengths, strict=True)
    ]
    holding = Counter(piece for own in pieces for piece in set(own))
    most = max(2, int(_COMMON * len(items)))
    numbers: dict[str, int] = {}
    texts = [[numbers.setdefault(word, len(numbers)) for word in row] for row in rows]
    searched = SuffixArray.build(map(np.array, texts), len(numbers))
    found: list[Span | None] = []
    for item, length, own in zip(items, lengths, pieces, strict=True):
        words = [numbers.get(word, len(numbers)) for word in item]
        begins = [begin for begin, piece in enumerate(own) if holding[piece] <= most]
        counts = {begin: searched.count_common(words[begin:]) for begin in begins}
        longest = max(counts.values(), default=0)
        ends = [(begin, words[begin : begin + longest]) for begin in begins if counts[begin] == longest >= length]
        places = [(int(searched.locate(searched.find(run))[0][0]), begin) for begin, run in ends]
        found.append(Span(min(places)[0], longest, min(places)[1]) if places else None)
    return found


def _find_similar(items: Sequence[str], rows: Sequence[str]) -> tuple[Float[np.ndarray, "item"], np.ndarray]:
    """Return the largest cosine of each item with a row, and that row."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    best, where = np.zeros(len(items)), np.zeros(len(items), dtype=np.int64)
    if not items or not rows:
        return best, where
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 4), sublinear_tf=True, dtype=cast(Any, np.float32))
    try:
        vectors.fit([*rows, *items])
    except ValueError:  # Nothing but white space.
        return best, where
    asked = vectors.transform(items)
    for begin in range(0, len(rows), _BLOCK):
        found = (asked @ vectors.transform(rows[begin : begin + _BLOCK]).T).toarray()
        place = found.argmax(1)
        values = found[np.arange(len(items)), place]
        better = values > best
        best[better], where[better] = values[better], begin + place[better]
    return best, where


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
    announce(f"Looking for {len(items.data):,} items of {items.data.name} among {job.count:,} examples.")
    texts = job.texts[: job.count]
    matches = find_matches(items.texts, texts, span=settings.against_span, near=settings.against_near)
    ids = [example.id for example in job.data.examples[: job.count]]
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
    items: AuditJob, matches: list[Match], ids: list[str], columns: dict[str, np.ndarray], ranks: Ranks | None
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
        listed = as_span(share(leading, int(dirty.sum())))
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
        difference=as_span(Interval(difference, *ends)),
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
