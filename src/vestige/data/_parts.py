"""A data set in parts of bounded size: each is encoded by any process, with the same bytes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data._bad_text import OnBadText
from vestige.data._fingerprint import hashed
from vestige.data._load import Numbered, Read, example_of
from vestige.data._stored import EXAMPLES, GROUP_ROWS, record_of
from vestige.data._tokenize import Encoded, Encoder, Tally
from vestige.data._types import Example

PART_ROWS = 8192
PART_BYTES = 8 * 2**20
"""A part ends after this many examples or bytes of text."""

PART = EXAMPLES.append(pa.field("targets", pa.int64())).append(pa.field("truncated", pa.bool_()))
"""Columns of the file of a part's examples."""


class Chunk(NamedTuple):
    """Consecutive examples, as the source holds them."""

    items: list[Numbered | Example]
    weight: int
    """About as many bytes of text."""


class Part(NamedTuple):
    """Consecutive examples and their tokens, in memory."""

    examples: list[Example]
    encoded: Encoded


class PackedPart(NamedTuple):
    """A part as the bytes of its files."""

    names: list[str]
    """Ids of its examples."""
    table: bytes
    """Parquet, with the columns `PART`."""
    tokens: bytes
    """int32 ids of all examples, one after another, and then one bit for each: is it a target?"""
    hashed: bytes
    """What it adds to the fingerprint of the data."""
    tally: Tally


def chunks(items: Iterable[Numbered | Example]) -> Iterator[Chunk]:
    """Cut the items into chunks by number and size: the same chunks in every process."""
    held: list[Numbered | Example] = []
    weight = 0
    for item in items:
        held.append(item)
        weight += _weight(item.record.value if isinstance(item, Numbered) else item)
        if len(held) == PART_ROWS or weight >= PART_BYTES:
            yield Chunk(held, weight)
            held, weight = [], 0
    if held:
        yield Chunk(held, weight)


@final
class PartEncoder:
    """Encodes chunks of one source; sent to worker processes."""

    def __init__(self, source: str, encoder: Encoder, on_bad_text: OnBadText) -> None:
        self._source = source
        self._encoder = encoder
        self._on_bad_text: OnBadText = on_bad_text

    def encode(self, chunk: Chunk) -> Part:
        """Return the chunk's examples and their tokens.

        Raises:
            DataError: A record has no format that fits, or does not become tokens.
        """
        read = [
            Read(item, 0) if isinstance(item, Example) else example_of(self._source, item, self._on_bad_text)
            for item in chunk.items
        ]
        encoded = self._encoder.encode([example for example, _ in read])
        tally = encoded.tally._replace(replaced=sum(replaced for _, replaced in read))
        return Part([example for example, _ in read], encoded._replace(tally=tally))

    def packed(self, chunk: Chunk) -> PackedPart:
        """Return the chunk as the bytes of its files."""
        return pack(self.encode(chunk))


def pack(part: Part) -> PackedPart:
    """Return the part as the bytes of its files."""
    examples, (ids, targets, truncated, tally) = part
    names = [example.id for example in examples]
    flat = np.concatenate(ids).astype("<i4", copy=False)
    tokens = flat.tobytes() + np.packbits(np.concatenate(targets)).tobytes()
    fingerprinted = b"".join(map(hashed, names, ids, targets))
    return PackedPart(names, _table(examples, ids, targets, truncated), tokens, fingerprinted, tally)


def _table(
    examples: Sequence[Example], ids: Sequence[np.ndarray], targets: Sequence[np.ndarray], truncated: np.ndarray
) -> bytes:
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, PART) as writer:
        for start in range(0, len(examples), GROUP_ROWS):
            rows = range(start, min(start + GROUP_ROWS, len(examples)))
            records = [
                record_of(examples[row], len(ids[row]))
                | {"targets": int(targets[row].sum()), "truncated": bool(truncated[row])}
                for row in rows
            ]
            writer.write_table(pa.Table.from_pylist(records, schema=PART))
    return sink.getvalue().to_pybytes()


def _weight(value: Any) -> int:
    """Return about how many bytes of text a record holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Example):
        return len(value.display)
    if isinstance(value, Mapping):
        return sum(map(_weight, value.values()))
    if isinstance(value, list | tuple) and value and isinstance(value[0], int):
        return 4 * len(value)
    return sum(map(_weight, value)) if isinstance(value, list | tuple) else 8
