"""`vestige data candidates`: for every query the training examples that its original could be, judging by words."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import load_examples, load_queries
from vestige.errors import DataError
from vestige.files import write_durably
from vestige.prepare import (
    Prepared,
    check_same_result,
    claim_result,
    fingerprint_of,
    row_of,
    write_prepared,
)
from vestige.progress import announce
from vestige.settings import verb
from vestige.terminal import shorten
from vestige_recipes.data_commands import CandidatesSettings
from vestige_recipes.prepare._candidates import Candidates, find_candidates

KIND, TABLE = "candidates", "candidates.parquet"
_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "rank": pa.int64(),
        "example_id": pa.string(),
        "row": pa.int64(),
        "score": pa.float64(),
        "original": pa.bool_(),
    }
)
_ROWS_AT_ONCE = 2**16


@verb(CandidatesSettings)
def candidates(settings: CandidatesSettings) -> Prepared:
    """The queries with the ids of their `candidates`, best first, and where BM25 ranks the true original.

    Each row of data.jsonl is a query with `candidates`, `original_rank`, `original_ties`, `left_out_ties` and `forced`;
    `vestige evaluate components --candidates given` takes it as its `--queries`. candidates.parquet has a line for each
    pair, with its score.

    Raises:
        DataError: Data or queries are absent or broken, no prompt has a word, or an original is not in the data.
    """
    training = load_examples(settings.data, on_bad_text=settings.on_bad_text)
    queries = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    if settings.limit is not None and settings.limit < len(queries):
        announce(f"Only the first {settings.limit:,} of {len(queries):,} queries are used (limit={settings.limit}).")
    queries = queries[: settings.limit]
    if not queries:
        raise DataError(f"{settings.queries} has no rows. Give the queries, such as the data.jsonl of a paraphrase.")
    default = CandidatesSettings.model_fields["truth"].default
    if settings.truth != default and not any(settings.truth in query.extra for query in queries):
        there = shorten(", ".join(sorted({name for query in queries for name in query.extra})) or "none", 200)
        raise DataError(
            f"--truth {settings.truth}: no query has this column. There are: {there}. Name another, or leave it out."
        )
    fingerprint = hashlib.sha256(f"{fingerprint_of(training)}:{fingerprint_of(queries)}".encode()).hexdigest()
    check_same_result(settings, KIND, fingerprint, frozenset())
    found = find_candidates(
        queries,
        training,
        k=settings.count,
        force_original=settings.include_original,
        variant=settings.variant,
        truth=settings.truth,
    )
    unknown = sum(one.original is None for one in found)
    if settings.include_original and unknown:
        raise DataError(
            f"--include-original: {unknown:,} of {len(found):,} queries name no original, "
            f"such as {_nameless(found)!r}. Name the column that holds its id with --truth."
        )
    claim_result(settings, KIND, fingerprint)
    write_durably(settings.out / TABLE, [_table(found)])
    rows = [row_of(query) | _columns(one) for query, one in zip(queries, found, strict=True)]
    ranks = Counter(one.original_rank for one in found if one.original_rank is not None)
    details = {"training": len(training), "rank_of_original": {str(rank): ranks[rank] for rank in sorted(ranks)}}
    notes = _notes(found, len(training), settings)
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, details=details, notes=notes)


def _nameless(found: Sequence[Candidates]) -> str:
    return next(one.query for one in found if one.original is None)


def _columns(one: Candidates) -> dict[str, object]:
    columns: dict[str, object] = {
        "candidates": [each.id for each in one.listed],
        "left_out_ties": one.left_out_ties,
        "forced": one.forced,
    }
    if one.original is not None:
        columns |= {"original_rank": one.original_rank, "original_ties": one.original_ties}
    return columns


def _table(found: Sequence[Candidates]) -> memoryview:
    """The file with a line for each pair; only so many of them are held as Python values."""
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, _SCHEMA) as writer:
        for lines in _blocks(found):
            writer.write_table(pa.Table.from_pylist(lines, schema=_SCHEMA))
    return memoryview(sink.getvalue())


def _blocks(found: Sequence[Candidates]) -> Iterator[list[dict[str, object]]]:
    """The lines of the table, so many at a time."""
    lines: list[dict[str, object]] = []
    for one in found:
        for rank, each in enumerate(one.listed, 1):
            original = one.original is not None and each.row == one.original.row
            line = {"query_id": one.query, "rank": rank, "example_id": each.id, "row": each.row}
            lines.append(line | {"score": each.score, "original": original})
            if len(lines) == _ROWS_AT_ONCE:
                yield lines
                lines = []
    if lines:
        yield lines


def _notes(found: Sequence[Candidates], training: int, settings: CandidatesSettings) -> list[str]:
    count = training if settings.count is None else min(settings.count, training)
    notes = [f"{count:,} candidates of {training:,} for each of {len(found):,} queries, by BM25 ({settings.variant})."]
    known = [one for one in found if one.original_rank is not None]
    if known:
        listed = sum(one.original_rank <= count for one in known if one.original_rank is not None)
        first = sum(one.original_rank == 1 for one in known)
        notes.append(
            f"The original comes first for {first / len(known):.1%} and is listed by its score for "
            f"{listed / len(known):.1%} of the {len(known):,} queries that name one."
        )
    if put := sum(one.forced for one in found):
        notes.append(f"For {put:,} it was put in the last place without having earned it (--include-original).")
    if len(known) < len(found):
        notes.append(f"{len(found) - len(known):,} queries name no original in {settings.truth!r}.")
    if cut := sum(one.left_out_ties > 0 for one in found):
        notes.append(f"For {cut:,} examples are left out that score as much as the last one listed.")
    return notes
