"""Loading of a list of examples from any source of data."""

import re
from collections.abc import Iterator
from itertools import islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

from vestige.data._bad_text import OnBadText, check_text
from vestige.data._files import absent_file, data_extension, files_of_folder, matching_files, read_file, read_files
from vestige.data._hub import HUB_NAME, from_dataset, from_folder, from_hub, is_dataset, is_saved_dataset
from vestige.data._origin import Record, Source, parsed, place, shown
from vestige.data._rows import PAIR_FORMATS, TURN_COLUMNS, example_from_record
from vestige.data._types import Example
from vestige.errors import DataError
from vestige.progress import announce

_RUN_QUERIES = "queries.parquet"
"""Table of the queries in the folder of a run."""


def load_examples(
    source: Any, *, limit: int | None = None, split: str | None = None, on_bad_text: OnBadText = "refuse"
) -> list[Example]:
    """Read every row of a training data source as an example, in the source's order.

    Args:
        source: A path (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each also with `.gz` unless Parquet; a
            folder saved by `datasets.save_to_disk`), several files (a pattern such as `parts/*.jsonl`, a folder of
            files of one kind, a list of `Path`s; in the order of their names, or of the list), a hub id
            (`owner/name` or `owner/name:config`), a live `datasets.Dataset`, or a list of dictionaries or strings;
            a bare string is a text.
        limit: Read at most this many rows; announced when it leaves rows out.
        split: Split of a hub id or a saved `DatasetDict`; `train` when there are several.
        on_bad_text: Whether halves of surrogate pairs are refused, or replaced with U+FFFD and counted.

    Returns:
        Examples whose `row` counts from 0 and whose `id` is the `id` column, else the row number. `source`
        and `label` are carried; columns that no format uses are in `extra`. Equal texts stay separate
        examples. `prompt` and `completion` stay as they are; the prompt of a `question` or an `instruction`
        ends in a newline.

    Raises:
        DataError: The source is absent, empty or broken, or a row does not parse; the message names it and the reason.
    """
    return _examples(open_source(source, split), limit, on_bad_text, is_query=False, learned=True)


def load_queries(
    source: Any, *, may_be_prompts: bool = True, on_bad_text: OnBadText = "refuse", learned: bool = False
) -> list[Example]:
    """Read every query of a source: as `load_examples`, but a query may be a prompt without a completion.

    Args:
        source: As for `load_examples`. A bare string in a list, and a single string that names no file and cannot be
            a hub id, is a prompt. The folder of a run stands for its queries with the answers that it explains.
        may_be_prompts: Whether it is; otherwise a single string is always the name of a file, a folder or a data set.
        on_bad_text: As for `load_examples`.
        learned: Refuse rows that training data may not hold, such as answers to be avoided.

    Raises:
        DataError: As for `load_examples`, or a prompt is a word that looks like the name of a file.
    """
    if isinstance(source, str) and may_be_prompts and not _names_a_place(source):
        source = [source]
    if isinstance(source, list | tuple):
        for text in source:
            if isinstance(text, str) and _looks_like_file(text):
                raise DataError(
                    f"The question {shown(text)} is or looks like the name of a file. Give one file alone, or "
                    'questions only; a question that looks like this goes into a file of lines {"prompt": "..."}.'
                )
    if isinstance(source, str | Path) and _exists(f"{source}/{_RUN_QUERIES}"):
        table = read_file(Path(source).expanduser() / _RUN_QUERIES)
        source = [_query_of_run(parsed(record).value) for record in table.records]
    return _examples(open_source(source, None), None, on_bad_text, is_query=True, learned=learned)


def _query_of_run(row: dict[str, Any]) -> dict[str, Any]:
    words = {name: row.get(name) for name in ("text", "prompt", "completion", "messages")}
    return {"id": row["query_id"], **{name: cell for name, cell in words.items() if cell is not None}}


def _names_a_place(text: str) -> bool:
    """Return whether a string is meant as a path or a hub id rather than as a prompt."""
    if _exists(text):
        return True
    if "\n" in text:
        return False
    if matching_files(Path(text)):
        return True
    looks_like_path = data_extension(Path(text)) is not None or re.match(r"(\.{0,2}|~)/\S+$", text) is not None
    return looks_like_path or ("/" in text and HUB_NAME.fullmatch(text) is not None)


def _looks_like_file(text: str) -> bool:
    """Return whether a question is the name of a file, or a single word with a slash or an extension."""
    word = text.strip()
    if _exists(word):
        return True
    return re.fullmatch(r"\S*([/\\]\S*|\.[A-Za-z]\w{0,9})", word) is not None


def _exists(text: str) -> bool:
    try:
        return bool(text.strip()) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a file name, a null byte, an unknown home
        return False


def open_source(source: Any, split: str | None) -> Source:
    """Return the reader for a source of any kind.

    Raises:
        DataError: There is no such source.
    """
    if isinstance(source, str | Path):
        return _open_path(source, split)
    if is_dataset(source):
        return from_dataset(source, split)
    if isinstance(source, list | tuple):
        _refuse_split("a list", split)
        if source and all(isinstance(item, Path) for item in source):
            return read_files(f"{len(source)} files", source)
        return Source("the list", map(Record, source))
    raise DataError(
        f"Data of type {type(source).__name__} cannot be read ({shown(source)}). Give a path, a hub id, "
        "a `datasets.Dataset`, or a list of dictionaries."
    )


def _open_path(source: str | Path, split: str | None) -> Source:
    if not str(source).strip():
        raise DataError("The path of the data is empty. Give a file, a folder or a hub id.")
    path = Path(source).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return from_folder(path, split)
    several = files_of_folder(path) if path.is_dir() else [] if _exists(str(path)) else matching_files(path)
    if several:
        _refuse_split(str(source), split)
        if len(several) == 1:
            return read_file(several[0])
        announce(f"{source}: {len(several)} files, from {several[0].name} to {several[-1].name}.")
        return read_files(str(source), several)
    can_be_hub_id = isinstance(source, str) and data_extension(path) is None and HUB_NAME.fullmatch(source)
    if not _exists(str(path)) and can_be_hub_id:
        return from_hub(str(source), split)
    if not _exists(str(path)):
        raise DataError(absent_file(path))
    _refuse_split(path.name, split)
    return read_file(path)


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"split={split!r} was requested, but {name} has no splits. Leave it out.")


def _examples(
    source: Source, limit: int | None, on_bad_text: OnBadText, *, is_query: bool, learned: bool
) -> list[Example]:
    examples: list[Example] = []
    replaced = 0
    row_of_id: dict[str, int] = {}
    for numbered in number_records(source, limit):
        example, halves = example_of(source.name, numbered, on_bad_text, is_query=is_query, learned=learned)
        replaced += halves
        first = row_of_id.setdefault(example.id, example.row)
        if first != example.row:
            raise repeated_id(place(source.name, example.row, numbered.record), example.id, first)
        examples.append(example)
    if not examples:
        raise no_rows(source.name)
    announce_replaced(source.name, replaced)
    return examples


class Numbered(NamedTuple):
    """A record and its row, counted from 0."""

    row: int
    record: Record


def number_records(source: Source, limit: int | None) -> Iterator[Numbered]:
    """Yield at most `limit` records of the source with their rows; leaving some out is announced.

    Raises:
        DataError: The limit is below 1, or the source is broken.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: give a whole number of rows above 0, or leave it out.")
    records = iter(source.records)
    yield from starmap(Numbered, enumerate(islice(records, limit)))
    if limit is not None and next(records, None) is not None:
        announce(f"{source.name}: only the first {limit:,} rows are used (limit={limit}); the rest is left out.")


class Read(NamedTuple):
    """An example, and how many halves of surrogate pairs were replaced in its record."""

    example: Example
    replaced: int


def example_of(
    name: str, numbered: Numbered, on_bad_text: OnBadText, *, is_query: bool = False, learned: bool = True
) -> Read:
    """Return the example of one record of the source called `name`; the choice of columns is announced at row 0.

    Raises:
        DataError: The record is not valid, or no format fits it.
    """
    row = numbered.row
    record, replaced = check_text(name, row, parsed(numbered.record), on_bad_text)
    example = example_from_record(record.value, row, place(name, row, record), is_query=is_query, learned=learned)
    if row == 0 and isinstance(record.value, dict):
        _announce_choice(name, record.value, example)
    return Read(example, replaced)


def announce_replaced(name: str, replaced: int) -> None:
    """Announce how many halves of surrogate pairs are U+FFFD now, if any."""
    if replaced:
        announce(f"{name}: {replaced:,} halves of surrogate pairs, which are no characters, were replaced with U+FFFD.")


def repeated_id(where: str, name: str, first: int) -> DataError:
    """Return the error of an id that two rows have."""
    return DataError(
        f"{where}: the id {name!r} is already that of row {first}. Ids must be unique; rename "
        "one, or drop the `id` column to number the rows (a row without an id takes its row number)."
    )


def no_rows(name: str) -> DataError:
    """Return the error of a source that is empty."""
    return DataError(f"{name} holds no rows. Give data with at least one.")


def _announce_choice(name: str, columns: dict[str, Any], example: Example) -> None:
    """Announce which columns were taken where the first row fits several formats."""
    present = {
        column for column, cell in columns.items() if cell is not None and not (isinstance(cell, str) and not cell)
    }
    fitting = [turns for turns in TURN_COLUMNS if turns in present]
    fitting += [
        f"{pair.prompt}/{pair.completion}" for pair in PAIR_FORMATS if {pair.prompt, pair.completion} <= present
    ]
    fitting += [column for column in ("text",) if column in present]
    if len(fitting) > 1 and "input_ids" not in example.extra:
        announce(f"{name}: rows hold {' and '.join(fitting)}; {fitting[0]} is used. Drop its columns to use another.")


def load_records(
    source: Any, *, limit: int | None = None, on_bad_text: OnBadText = "refuse"
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Yield every row of a training data source with its columns as they stand there; nothing is kept.

    Args:
        source: As for `load_examples`.
        limit: Read at most this many rows.
        on_bad_text: As for `load_examples`.

    Raises:
        DataError: As for `load_examples`.
    """
    opened, total = open_source(source, None), 0
    for row, unparsed in number_records(opened, limit):
        record, replaced = check_text(opened.name, row, parsed(unparsed), on_bad_text)
        example, _ = example_of(opened.name, Numbered(row, record), on_bad_text)
        total += replaced
        yield example, {"text": record.value} if isinstance(record.value, str) else dict(record.value)
    announce_replaced(opened.name, total)
