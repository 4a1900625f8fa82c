"""Examples in Parquet files and tokens in memory-mapped Arrow files: sequences that read one item at a time.

The folder of the tokens of one source, encoded in one way:

    tokens.json       written last: what the tokens were made from, the number of parts, the fingerprint
    00012.arrow       ids and targets of the part, which are memory-mapped
    00012.parquet     its examples, with their lengths and numbers of targets
    00012.json        written after both: their sizes and sha256

Killed at any moment, the next process that makes the same tokens continues at the first part without its marker.
Several processes may make them at once: they write the same bytes.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, Generic, TypeVar, final, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data._tokenize import Encoded, Tally
from vestige.data._types import Example, Message, TokenizedData, hash_example
from vestige.parsing import parse_json, parse_object
from vestige.storage import sha256_of, write_durably
from vestige.tables import reading, write_table

Item = TypeVar("Item")

_AGAIN = "Run the command that made it again."
GROUP_ROWS = 512
"""Examples in a row group: what is decoded to read one of them."""
_GROUPS_HELD = 4

_PLAIN = ("id", "row", "text", "prompt", "completion", "source", "label")
"""Columns that hold the fields of an example as they are."""
EXAMPLES = pa.schema(
    (name, pa.int64() if name in ("row", "length") else pa.string())
    for name in ("id", "row", "text", "prompt", "completion", "messages", "source", "label", "extra", "length")
)
"""Columns of a file of examples; `length` is in tokens, `messages` and `extra` are JSON."""
_TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("targets", pa.list_(pa.bool_()))])
"""Columns of a file of tokens."""
_PART = EXAMPLES.append(pa.field("targets", pa.int64())).append(pa.field("truncated", pa.bool_()))
"""Columns of the file of a part's examples."""
FORMAT = 5
"""Those of format 1 may lack examples: of what was read before the first part was written, only that part was. Those of
format 2 were made without reading loss masks, weights of turns and what a chat template is given beside them; those of
format 3 are no Arrow files; those of format 4 hold the markers of all parts in the list."""
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
        rows = range(len(self))[index]
        return self._read(rows) if isinstance(rows, int) else [self._read(row) for row in rows]

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
            with reading(path, _AGAIN):
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


def record_of(example: Example, length: int) -> dict[str, Any]:
    """Return the example as a row of a file of examples."""
    plain = {name: getattr(example, name) for name in _PLAIN}
    turns = [turn_record(turn) for turn in example.messages]
    return {**plain, "messages": _to_json(turns), "extra": _to_json(example.extra), "length": length}


def turn_record(turn: Message) -> list[Any]:
    """Return the turn in JSON terms: its role and content, and its other keys if it has any."""
    return [turn.role, turn.content, *([turn.extra] if turn.extra else [])]


def _to_json(value: Any) -> str | None:
    def plain(cell: Any) -> Any:
        return cell.tolist() if isinstance(cell, np.ndarray) else str(cell)

    return json.dumps(value, ensure_ascii=False, default=plain) if value else None


def _decode_group(path: Path, number: int) -> list[Example]:
    """Return the examples of a row group."""
    with reading(path, _AGAIN), parquet.ParquetFile(path) as file:
        return [_example(record) for record in file.read_row_group(number).to_pylist()]


def _example(record: dict[str, Any]) -> Example:
    fields = {name: record[name] for name in _PLAIN}
    messages = tuple(Message(*turn) for turn in parse_json(record["messages"] or "[]"))
    return Example(**fields, messages=messages, extra=parse_object(record["extra"] or "{}"))


@final
class TokenFolder:
    """The tokens of one source, encoded in one way, in a folder of their own.

    Without a path it is a temporary folder, which is deleted when nothing uses its tokens any more.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="vestige-tokens-")) if path is None else path
        if path is None:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def write_part(self, number: int, examples: Sequence[Example], encoded: Encoded) -> None:
        """Write consecutive examples, their tokens and then the marker of the part; the same bytes in every process."""
        ids, targets, truncated, tally = encoded
        columns = [pa.array(rows, field.type) for rows, field in zip((ids, targets), _TOKENS, strict=True)]
        tokens = pa.BufferOutputStream()
        with pa.ipc.new_file(tokens, _TOKENS) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_TOKENS))
        records = [
            record_of(example, len(ids[row])) | {"targets": int(targets[row].sum()), "truncated": bool(truncated[row])}
            for row, example in enumerate(examples)
        ]
        about = pa.Table.from_pylist(records, schema=_PART)
        written = [
            write_durably(self._file(number, "arrow"), [tokens.getvalue()]),
            write_table(self._file(number, "parquet"), about, row_group_size=GROUP_ROWS),
        ]
        part = {"bytes": [one.bytes for one in written], "sha256": [one.sha256 for one in written], "tally": tally}
        write_durably(self._file(number, "json"), [json.dumps(part).encode()])

    def has_part(self, number: int) -> bool:
        """Return whether the part is there and matches its marker; reads every byte."""
        part = self._read_marker(number)
        return part is not None and [sha256_of(path) for path in self._files(number)] == part["sha256"]

    def hash_part(self, number: int, digest: "hashlib._Hash") -> list[str]:
        """Add a part to the digest of all data, as `data_fingerprint` does, and return the ids of its examples."""
        tokens, examples = self._files(number)
        names = list(StoredExamples([examples]).column("id"))
        (batch,) = _map_tokens(tokens).to_batches()
        ends = batch["input_ids"].offsets.to_numpy()
        ids, targets = (batch[name].values.to_numpy(zero_copy_only=False) for name in _TOKENS.names)
        for name, start, stop in zip(names, ends, ends[1:], strict=False):
            digest.update(hash_example(name, ids[start:stop], targets[start:stop]))
        return names

    def names(self, count: int) -> Iterator[str]:
        """Yield the ids of the examples of the first `count` parts."""
        yield from StoredExamples([self._file(number, "parquet") for number in range(count)]).column("id")

    def finish(self, encoder: str, fingerprint: str, parts: int) -> None:
        """Write the list of the parts: the tokens are complete."""
        content = {"format": FORMAT, "encoder": encoder, "fingerprint": fingerprint, "parts": parts}
        write_durably(self.path / _LIST, [json.dumps(content).encode()])

    def open(self, name: str) -> tuple[TokenizedData, Tally] | None:
        """Return the tokens; None if they are not complete."""
        content = self.read_list()
        markers = [] if content is None else [self._read_marker(number) for number in range(content["parts"])]
        parts = [part for part in markers if part is not None]
        if content is None or len(parts) < len(markers):
            return None
        arrows, parquets = zip(*map(self._files, range(len(parts))), strict=True)
        about = pa.concat_tables(_read_lengths(path) for path in parquets)
        tokens = pa.concat_tables(map(_map_tokens, arrows))
        lengths, counts = (about[column].to_numpy().astype(np.int32) for column in ("length", "targets"))
        data = TokenizedData(
            StoredExamples(parquets, owner=self),
            StoredArrays(tokens["input_ids"], lengths),
            StoredArrays(tokens["targets"], counts),
            about["truncated"].to_numpy(),
            content["fingerprint"],
            name,
        )
        return data, reduce(Tally.join, (Tally(*part["tally"]) for part in parts))

    def read_list(self) -> dict[str, Any] | None:
        """Return what the tokens were made from and how many parts they have; None if they are not complete."""
        try:
            content = parse_object((self.path / _LIST).read_bytes())
        except (OSError, ValueError):
            return None
        return content if content.get("format") == FORMAT else None

    def _read_marker(self, number: int) -> dict[str, Any] | None:
        """Return the marker of a part, None unless its files are there in the sizes that it names."""
        try:
            part = parse_object(self._file(number, "json").read_bytes())
            return part if [path.stat().st_size for path in self._files(number)] == part["bytes"] else None
        except (OSError, LookupError, ValueError):
            return None

    def _files(self, number: int) -> tuple[Path, Path]:
        """Return the files of a part: its tokens and its examples."""
        return self._file(number, "arrow"), self._file(number, "parquet")

    def _file(self, number: int, kind: str) -> Path:
        return self.path / f"{number:05d}.{kind}"


def find_tokens(folder: Path, fingerprint: str, encoder: str, name: str) -> TokenizedData | None:
    """Return the tokens of the data with this fingerprint, made by this encoder, from any folder in `folder`."""
    for path in sorted(folder.glob(f"*/{_LIST}")):
        tokens = TokenFolder(path.parent)
        content = tokens.read_list()
        if content is not None and (content["fingerprint"], content["encoder"]) == (fingerprint, encoder):
            found = tokens.open(name)
            return None if found is None else found[0]
    return None


def _map_tokens(path: Path) -> pa.Table:
    with reading(path, _AGAIN), pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _read_lengths(path: Path) -> pa.Table:
    with reading(path, _AGAIN):
        return parquet.read_table(path, columns=["length", "targets", "truncated"])
