"""Groups of rows: copies of one text, or rows with the same value of a column.

A draw that splits copies measures nothing: a model that was not trained on a row but on its copy has memorized it all
the same.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from vestige.data._fingerprint import hashed
from vestige.data._types import Example, TokenizedData
from vestige.errors import DataError


def token_groups(data: TokenizedData, column: str | None = None) -> Int[np.ndarray, "example"]:
    """Return the group of each row: rows with equal tokens and targets share one, or with `column` equal values of it.

    Groups are numbered by their first rows, so without copies row `i` is group `i`.

    Raises:
        DataError: A row has no value of the column.
    """
    if column is not None:
        return _numbered(_values(data.examples, column))
    return _numbered(hashed("", ids, mask) for ids, mask in zip(data.input_ids, data.targets, strict=True))


def text_groups(examples: Iterable[Example]) -> Int[np.ndarray, "example"]:
    """Return the group of each example, as `token_groups` does, where there is no tokenizer: equal contents share one.

    The content is the text, the prompt and completion or the turns, and columns of lists and mappings (token ids,
    masks, tools); an id, a source, a label and other plain columns are not.
    """
    return _numbered(map(_content, examples))


def describe_copies(groups: Int[np.ndarray, "example"], column: str | None = None) -> str | None:
    """Return how many rows belong to the same texts, in a sentence; None where every row is a group of its own."""
    count = int(groups.max(initial=-1)) + 1
    if count == len(groups):
        return None
    if column is not None:
        return f"{len(groups):,} rows have {count:,} values of {column!r}: rows of one value stay together."
    copies = len(groups) - count
    return f"{copies:,} of {len(groups):,} rows are copies of others: {count:,} distinct texts, each counted once."


def _numbered(keys: Iterable[bytes]) -> Int[np.ndarray, "example"]:
    """Return numbers for equal keys; 16 bytes a row are kept while they are counted."""
    digests = bytearray()
    for key in keys:
        digests += hashlib.blake2b(key, digest_size=16).digest()
    words = np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    first = np.empty(len(order), dtype=np.int64)
    # Sorting keeps the order of equals: where a run of them begins, there is its first row.
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return np.unique(first, return_inverse=True)[1].astype(np.int64)


def _content(example: Example) -> bytes:
    more = {name: value for name, value in example.extra.items() if isinstance(value, list | tuple | dict | np.ndarray)}
    parts = [example.text, example.prompt, example.completion, repr(example.messages), more]
    return json.dumps(parts, sort_keys=True, default=_plain).encode()


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _values(examples: Sequence[Example], column: str) -> Iterable[bytes]:
    for row, example in enumerate(examples):
        value = getattr(example, column) if column in ("id", "source", "label") else example.extra.get(column)
        if value is None:
            raise DataError(
                f"--group {column}: row {row} (id {example.id!r}) has no such column. Give every row one, or leave "
                "--group out to keep copies of one text together."
            )
        yield str(value).encode()
