"""Loading of a list of examples from any source of data."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vestige.data._files import exists, is_address, locate
from vestige.data._focus import FIELDS, FocusUse, take_focus
from vestige.data._records import OnBadText, Record, Source, check_text, parse_record, place, quote
from vestige.data._rows import PAIR_FORMATS, TURN_COLUMNS, example_from_record
from vestige.data._sources import HUB_NAME, data_extension, open_source, read_file, require_data
from vestige.data._types import Example
from vestige.errors import DataError
from vestige.progress import announce

_RUN_QUERIES = "queries.parquet"
"""Table of the queries in the folder of a run."""


def load_examples(
    source: Any,
    *,
    limit: int | None = None,
    split: str | None = None,
    where: Mapping[str, Any] | None = None,
    on_bad_text: OnBadText = "refuse",
) -> list[Example]:
    """Read every row of a training data source as an example, in the source's order.

    Args:
        source: A path or an fsspec address (`s3://...`) of a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`,
            `.txt`, `.arrow` and every other format of `datasets`; packed ones as `.gz`, `.bz2`, `.xz`, `.zst`, `.lz4`
            or `.zip`) or of a folder saved by `datasets.save_to_disk`; several files (a pattern such as
            `parts/*.jsonl`, a folder of files of one kind, a list of `Path`s; in the order of their names, or of the
            list), a hub id (`owner/name`, `owner/name:config` or `owner/name:config:split`), a live
            `datasets.Dataset` or stream, or a list of dictionaries or strings; a bare string is a text.
        limit: Read at most this many rows; announced when it leaves rows out. Of a hub id no more is fetched.
        split: Split of a hub id or a saved `DatasetDict`; `train` when there are several.
        where: Values of columns that a row must have to be read, such as `{"source": "web"}`.
        on_bad_text: Whether halves of surrogate pairs are refused, or replaced with U+FFFD and counted.

    Returns:
        Examples whose `row` counts from 0 and whose `id` is the `id` column, else the row number in the source.
        `source` and `label` are carried; columns that no format uses are in `extra`. Equal texts stay separate
        examples. `prompt` and `completion` stay as they are; the prompt of a `question` or an `instruction`
        ends in a newline.

    Raises:
        DataError: The source is absent, empty or broken, or a row does not parse; the message names it and the reason.
    """
    return _examples(open_source(source, split, limit=limit, where=where), on_bad_text)


def load_queries(
    source: Any,
    *,
    may_be_prompts: bool = True,
    on_bad_text: OnBadText = "refuse",
    learned: bool = False,
    focus: FocusUse = "refuse",
    **reading: Any,
) -> list[Example]:
    """Read every query of a source: as `load_examples`, but a query may be a prompt without a completion.

    Args:
        source: As for `load_examples`. A bare string in a list, and a single string that names no file and cannot be
            a hub id, is a prompt. The folder of a run stands for its queries with the answers that it explains.
        may_be_prompts: Whether it is; otherwise a single string is always the name of a file, a folder or a data set.
        on_bad_text: As for `load_examples`.
        learned: Refuse rows that training data may not hold, such as answers to be avoided.
        focus: Read `instead`, `span` and `weights`, which choose what of a query is explained, and `chosen` with
            `rejected`, which are a contrast; refuse them; or keep them with the columns of rows that are no queries.
        reading: `split`, `limit` and `where`, as for `load_examples`.

    Raises:
        DataError: As for `load_examples`, or a prompt is a word that looks like the name of a file.
    """
    if isinstance(source, str) and may_be_prompts and not names_a_place(source):
        source = [source]
    if isinstance(source, list | tuple):
        for text in source:
            if isinstance(text, str) and _looks_like_file(text):
                raise DataError(
                    f"The question {quote(text)} is or looks like the name of a file. Give one file alone, or "
                    'questions only; a question that looks like this goes into a file of lines {"prompt": "..."}.'
                )
    if isinstance(source, str | Path) and exists(f"{source}/{_RUN_QUERIES}"):
        rows = [record.value for record in read_file(locate(f"{source}/{_RUN_QUERIES}")).records]
        columns = ("text", "prompt", "completion", "messages", *FIELDS)
        words = [{name: row[name] for name in columns if row.get(name) is not None} for row in rows]
        source = [{"id": row["query_id"], **each} for row, each in zip(rows, words, strict=True)]
    return _examples(open_source(source, **reading), on_bad_text, is_query=True, learned=learned, focus=focus)


def load_records(
    source: Any,
    *,
    limit: int | None = None,
    where: Mapping[str, Any] | None = None,
    on_bad_text: OnBadText = "refuse",
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Yield every row of a training data source with its columns as they stand there; nothing is kept.

    Arguments and errors are those of `load_examples`.
    """
    for example, record in _read(open_source(source, limit=limit, where=where), on_bad_text):
        yield example, {"text": record.value} if isinstance(record.value, str) else dict(record.value)


def require_queries(source: Any) -> None:
    """Raise if queries are a path where there is nothing; questions are taken as they are.

    Raises:
        DataError: As `load_queries`.
    """
    if not isinstance(source, str) or names_a_place(source):
        require_data(source)


def names_a_place(text: str) -> bool:
    """Return whether a string is meant as a path or a hub id rather than as a prompt."""
    if is_address(text) or exists(text):
        return True
    if "\n" in text:
        return False
    if locate(text).matches():
        return True
    looks_like_path = data_extension(text) is not None or re.match(r"(\.{0,2}|~)/\S+$", text) is not None
    return looks_like_path or ("/" in text and HUB_NAME.fullmatch(text) is not None)


def _looks_like_file(text: str) -> bool:
    """Return whether a question is the name of a file, or a single word with a slash or an extension."""
    word = text.strip()
    return re.fullmatch(r"\S*([/\\]\S*|\.[A-Za-z]\w{0,9})", word) is not None or exists(word)


def _examples(source: Source, on_bad_text: OnBadText, **meaning: Any) -> list[Example]:
    examples: list[Example] = []
    row_of_id: dict[str, int] = {}
    for example, record in _read(source, on_bad_text, **meaning):
        first = row_of_id.setdefault(example.id, record.source_row)
        if first != record.source_row:
            raise repeat_error(place(source.name, record), example.id, first)
        examples.append(example)
    if not examples:
        raise empty_error(source.name)
    return examples


def _read(source: Source, on_bad_text: OnBadText, **meaning: Any) -> Iterator[tuple[Example, Record]]:
    """Yield the examples of a source with their records, and announce at its end what was replaced."""
    total = 0
    for unread in source.records:
        example, record, replaced = example_of(source.name, unread, on_bad_text, **meaning)
        total += replaced
        yield example, record
    announce_replaced(source.name, total)


def example_of(
    name: str,
    record: Record,
    on_bad_text: OnBadText,
    *,
    is_query: bool = False,
    learned: bool = True,
    focus: FocusUse = "keep",
) -> tuple[Example, Record, int]:
    """Return one record as an example and as it was read, and how many halves of surrogate pairs were replaced.

    The choice of columns is announced at row 0.
    """
    record, replaced = check_text(name, parse_record(record), on_bad_text)
    chosen = None
    if focus != "keep" and isinstance(record.value, Mapping):
        columns, chosen = take_focus(record.value, place(name, record), focus)
        record = record._replace(value=columns)
    example = example_from_record(record, place(name, record), is_query=is_query, learned=learned)
    if chosen is not None:
        example = replace(example, focus=chosen)
    if record.row == 0 and isinstance(record.value, dict):
        _announce_choice(name, record.value, example)
    return example, record, replaced


def announce_replaced(name: str, replaced: int) -> None:
    """Announce how many halves of surrogate pairs are U+FFFD now, if any."""
    if replaced:
        announce(f"{name}: {replaced:,} halves of surrogate pairs, which are no characters, were replaced with U+FFFD.")


def repeat_error(where: str, name: str, first: int) -> DataError:
    """Return the error of an id that two rows have."""
    return DataError(
        f"{where}: the id {name!r} is already that of row {first}. Ids must be unique; rename "
        "one, or drop the `id` column to number the rows (a row without an id takes its row number)."
    )


def empty_error(name: str) -> DataError:
    """Return the error of a source that is empty."""
    return DataError(f"{name} holds no rows. Give data with at least one.")


def _announce_choice(name: str, columns: dict[str, Any], example: Example) -> None:
    """Announce which columns were taken where the first row fits several formats."""
    present = {
        column for column, cell in columns.items() if cell is not None and not (isinstance(cell, str) and not cell)
    }
    formats = [(turns,) for turns in TURN_COLUMNS] + [pair[:2] for pair in PAIR_FORMATS] + [("text",)]
    fitting = ["/".join(names) for names in formats if present.issuperset(names)]
    if len(fitting) > 1 and "input_ids" not in example.extra:
        announce(f"{name}: rows hold {' and '.join(fitting)}; {fitting[0]} is used. Drop its columns to use another.")
