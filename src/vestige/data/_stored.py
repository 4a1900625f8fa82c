"""Examples in Parquet files and tokens in memory-mapped Arrow files: sequences that read one item at a time.

The folder of the tokens of one source, encoded in one way:

    tokens.json       written last: what the tokens were made from, rows and bytes of every part, the fingerprint
    00012.arrow       ids and targets of the part, which are memory-mapped
    00012.parquet     its examples, with their lengths and numbers of targets
    00012.json        written after both: their sizes and sha256

Killed at any moment, the next process that makes the same tokens continues at the first part without its marker.
Several processes may make them at once: they write the same bytes.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, final, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data._tokenize import Encoded, Tally
from vestige.data._types import Example, Message, TokenizedData, hash_example
from vestige.errors import CorruptFile
from vestige.parsing import as_record, parse_json, parse_object
from vestige.storage import make_folder, remove_strays, sha256_of, write_durably
from vestige.tables import reading

Item = TypeVar("Item")

_AGAIN = "Run the command that made it again."
GROUP_ROWS = 512
"""Examples in a row group: what is decoded to read one of them."""
_GROUPS_HELD = 4

EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("messages", pa.string()),
        ("source", pa.string()),
        ("label", pa.string()),
        ("extra", pa.string()),
        ("length", pa.int64()),
    ]
)
"""Columns of a file of examples; `length` is in tokens, `messages` and `extra` are JSON."""
_TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("targets", pa.list_(pa.bool_()))])
"""Columns of a file of tokens."""
_PART = EXAMPLES.append(pa.field("targets", pa.int64())).append(pa.field("truncated", pa.bool_()))
"""Columns of the file of a part's examples."""
FORMAT = 4
"""Those of format 1 may lack examples: of what was read before the first part was written, only that part was. Those of
format 2 were made without reading loss masks, weights of turns and what a chat template is given beside them; those of
format 3 are no Arrow files."""
_LIST = "tokens.json"


class StoredRows(Sequence[Item], ABC, Generic[Item]):
    """A sequence whose items are read when they are requested; equal to any other with equal items."""

    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def _read(self, row: int) -> Item:
        """Read the item at `row`, which is from 0 to the length less one."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._read(row) for row in range(*index.indices(len(self)))]
        row = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._read(row)

    def __iter__(self) -> Iterator[Item]:
        return (self._read(row) for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))


@final
class StoredExamples(StoredRows[Example]):
    """The examples of Parquet files with the columns `EXAMPLES`, one file after another.

    Some row groups are held decoded, so going through the examples in order, or reading some in ascending order,
    decodes each group once.
    """

    def __init__(self, paths: Sequence[Path], owner: object = None) -> None:
        self._paths = list(paths)
        self._owner = owner
        self._groups: list[tuple[Path, int]] = []
        rows = [0]
        for path in self._paths:
            with _reading(path):
                about = parquet.read_metadata(path)
            self._groups += [(path, number) for number in range(about.num_row_groups)]
            rows += [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._starts = np.cumsum(rows)
        # Of a function, not of a method: a cache of a method would keep `owner` alive.
        self._decode = lru_cache(_GROUPS_HELD)(_decode_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def folder(self) -> Path:
        """Return the folder of the files."""
        return self._paths[0].parent

    def column(self, name: str) -> Iterator[Any]:
        """Yield one column's values in row order, without reading the others."""
        for path in self._paths:
            with reading(path, _AGAIN), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=[name]):
                    yield from batch.column(0).to_pylist()

    def _read(self, row: int) -> Example:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._decode(*self._groups[group])[row - int(self._starts[group])]


@final
class StoredArrays(StoredRows[np.ndarray]):
    """A column of lists of Arrow files: the token ids of every example, int32, or its target marks, bool."""

    def __init__(self, column: pa.ChunkedArray, sizes: np.ndarray) -> None:
        self._column = column
        self.sizes = sizes
        """Entries (token ids) or true entries (target marks) of every array, int32 [example]."""

    def __len__(self) -> int:
        return len(self._column)

    def _read(self, row: int) -> np.ndarray:
        # A copy, because PyTorch wants to be able to write to what it is given.
        return np.array(self._column[row].values.to_numpy(zero_copy_only=False))


def _read_tokens(paths: Sequence[Path], lengths: np.ndarray, counts: np.ndarray) -> tuple[StoredArrays, StoredArrays]:
    """Map files with the columns `_TOKENS`, one after another, and return the token ids and the target marks.

    Args:
        paths: The files.
        lengths: Tokens per example, int32 [example].
        counts: Targets per example, int32 [example].
    """
    tables = []
    for path in paths:
        with _reading(path), pa.memory_map(str(path)) as source:
            tables.append(pa.ipc.open_file(source).read_all())
    table = pa.concat_tables(tables)
    return StoredArrays(table["input_ids"], lengths), StoredArrays(table["targets"], counts)


class PackedPart(NamedTuple):
    """A part as the bytes of its files, and what it adds to the fingerprint of the data."""

    names: list[str]
    """Ids of its examples."""
    files: tuple[bytes, bytes]
    """Arrow with the columns `_TOKENS`, Parquet with the columns `_PART`."""
    fingerprinted: bytes
    tally: Tally


class _PartRecord(NamedTuple):
    """Content of the marker of a part."""

    rows: int
    bytes: list[int]
    sha256: list[str]
    tally: list[Any]


@final
class TokenWriter:
    """Writes the parts of one data set in their order."""

    def __init__(self, folder: Path, encoder: str) -> None:
        make_folder(folder)
        remove_strays(folder)
        self._folder, self._encoder = folder, encoder
        self._parts: list[_PartRecord] = []
        self._digest = hashlib.sha256()

    def is_done(self, number: int) -> bool:
        """Return whether the part is there and matches its marker; reads every byte."""
        record, paths = _read_marker(self._folder, number), _part_paths(self._folder, number)
        if record is None or not all(path.exists() for path in paths):
            return False
        return [sha256_of(path) for path in paths] == record.sha256

    def add(self, part: PackedPart) -> list[str]:
        """Write the next part to disk and return the ids of its examples."""
        number = len(self._parts)
        paths = _part_paths(self._folder, number)
        written = [write_durably(path, [content]) for path, content in zip(paths, part.files, strict=True)]
        sizes, digests = [one.bytes for one in written], [one.sha256 for one in written]
        record = _PartRecord(len(part.names), sizes, digests, list(part.tally))
        write_durably(_marker(self._folder, number), [json.dumps(record._asdict()).encode()])
        self._parts.append(record)
        self._digest.update(part.fingerprinted)
        return part.names

    def add_finished(self) -> list[str]:
        """Take over the next part, which `is_done`, as it is, and return the ids of its examples."""
        record = _read_marker(self._folder, len(self._parts))
        assert record is not None
        data = _open_parts(self._folder, [len(self._parts)], "", "")
        assert isinstance(data.examples, StoredExamples)
        names = list(data.examples.column("id"))
        for name, ids, targets in zip(names, data.input_ids, data.targets, strict=True):
            self._digest.update(hash_example(name, ids, targets))
        self._parts.append(record)
        return names

    def names(self) -> Iterator[str]:
        """Yield the ids of all examples so far."""
        paths = [_part_paths(self._folder, number)[1] for number in range(len(self._parts))]
        yield from StoredExamples(paths).column("id")

    def finish(self) -> None:
        """Write the list of the parts: the tokens are complete."""
        content = {
            "format": FORMAT,
            "encoder": self._encoder,
            "fingerprint": self._digest.hexdigest(),
            "parts": [part._asdict() for part in self._parts],
        }
        write_durably(self._folder / _LIST, [json.dumps(content).encode()])


def record_of(example: Example, length: int) -> dict[str, Any]:
    """Return the example as a row of a file of examples."""
    turns = [turn_record(turn) for turn in example.messages]
    return {
        "id": example.id,
        "row": example.row,
        "text": example.text,
        "prompt": example.prompt,
        "completion": example.completion,
        "messages": json.dumps(turns, ensure_ascii=False, default=_as_json) if turns else None,
        "source": example.source,
        "label": example.label,
        "extra": json.dumps(example.extra, ensure_ascii=False, default=_as_json) if example.extra else None,
        "length": length,
    }


def turn_record(turn: Message) -> list[Any]:
    """Return the turn in JSON terms: its role and content, and its other keys if it has any."""
    return [turn.role, turn.content, *([turn.extra] if turn.extra else [])]


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _decode_group(path: Path, number: int) -> list[Example]:
    """Return the examples of a row group."""
    with _reading(path), parquet.ParquetFile(path) as file:
        return [_example(record) for record in file.read_row_group(number).to_pylist()]


def _example(record: dict[str, Any]) -> Example:
    fields = {name: record[name] for name in ("id", "row", "text", "prompt", "completion", "source", "label")}
    messages = tuple(Message(*turn) for turn in parse_json(record["messages"] or "[]"))
    return Example(**fields, messages=messages, extra=parse_object(record["extra"] or "{}"))


def pack(examples: Sequence[Example], encoded: Encoded) -> PackedPart:
    """Return consecutive examples as the bytes of its files."""
    ids, targets, truncated, tally = encoded
    names = [example.id for example in examples]
    columns = [pa.array(rows, field.type) for rows, field in zip((ids, targets), _TOKENS, strict=True)]
    tokens, table = pa.BufferOutputStream(), pa.BufferOutputStream()
    with pa.ipc.new_file(tokens, _TOKENS) as writer:
        writer.write_batch(pa.record_batch(columns, schema=_TOKENS))
    with parquet.ParquetWriter(table, _PART) as writer:
        for start in range(0, len(examples), GROUP_ROWS):
            records = [
                record_of(examples[row], len(ids[row]))
                | {"targets": int(targets[row].sum()), "truncated": bool(truncated[row])}
                for row in range(start, min(start + GROUP_ROWS, len(examples)))
            ]
            writer.write_table(pa.Table.from_pylist(records, schema=_PART))
    files = tokens.getvalue().to_pybytes(), table.getvalue().to_pybytes()
    return PackedPart(names, files, b"".join(map(hash_example, names, ids, targets)), tally)


def open_tokens(folder: Path, name: str, owner: object = None) -> tuple[TokenizedData, Tally] | None:
    """Return the tokens in `folder`; None if they are not complete. `owner` is kept as long as the data is in use."""
    content = _read_list(folder)
    if content is None:
        return None
    parts = [_PartRecord(**part) for part in content["parts"]]
    for number, part in enumerate(parts):
        paths = _part_paths(folder, number)
        if not all(path.exists() for path in paths) or [path.stat().st_size for path in paths] != part.bytes:
            return None
    tally = reduce(Tally.join, (Tally(*part.tally) for part in parts))
    return _open_parts(folder, range(len(parts)), content["fingerprint"], name, owner), tally


def find_tokens(folder: Path, fingerprint: str, encoder: str, name: str) -> TokenizedData | None:
    """Return the tokens of the data with this fingerprint, made by this encoder, from any folder in `folder`."""
    for path in sorted(folder.glob(f"*/{_LIST}")):
        content = _read_list(path.parent)
        if content is not None and (content["fingerprint"], content["encoder"]) == (fingerprint, encoder):
            found = open_tokens(path.parent, name)
            return None if found is None else found[0]
    return None


def _open_parts(folder: Path, parts: Sequence[int], fingerprint: str, name: str, owner: object = None) -> TokenizedData:
    paths = [_part_paths(folder, number) for number in parts]
    columns = ["length", "targets", "truncated"]
    tables = []
    for _, path in paths:
        with _reading(path):
            tables.append(parquet.read_table(path, columns=columns))
    table = pa.concat_tables(tables)
    lengths, counts = (table[name].to_numpy().astype(np.int32) for name in columns[:2])
    input_ids, targets = _read_tokens([tokens for tokens, _ in paths], lengths, counts)
    examples = StoredExamples([path for _, path in paths], owner)
    return TokenizedData(examples, input_ids, targets, table["truncated"].to_numpy(), fingerprint, name)


def _read_list(folder: Path) -> dict | None:
    try:
        content = parse_object((folder / _LIST).read_bytes())
    except (OSError, ValueError):
        return None
    return content if content.get("format") == FORMAT else None


def _read_marker(folder: Path, number: int) -> _PartRecord | None:
    try:
        return as_record(_PartRecord, parse_object(_marker(folder, number).read_bytes()))
    except (OSError, ValueError):
        return None


def _part_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05d}.arrow", folder / f"{number:05d}.parquet"


def _marker(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one error."""
    try:
        yield
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is missing or damaged ({error}). {_AGAIN}") from error
