"""Examples and tokens that stay on disk: sequences that read one item at a time and keep nothing of it."""

import json
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar, final, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige import disk_arrays
from vestige.data._types import Example, Message
from vestige.errors import CorruptFile
from vestige.parsing import parse_json, parse_object
from vestige.scratch import Scratch
from vestige.tables import reading

Item = TypeVar("Item")

_AGAIN = "Run the command that made it again."
GROUP_ROWS = 512
"""Examples in a row group: what is decoded to read one of them."""
_GROUPS_HELD, _FILES_HELD = 4, 32
_PLACES_HELD = 2**16
"""Bytes in memory of where tokens begin, while that is written."""

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
class _Recent(Generic[Item]):
    """The last requested items, so that they need not be made again; unlike `lru_cache`, it keeps no owner alive."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: dict[int, Item] = {}
        self._lock = Lock()

    def get(self, key: int, make: Callable[[int], Item]) -> Item:
        """Return the item of this key."""
        with self._lock:
            item = self._items.pop(key, None)
        if item is None:
            item = make(key)
        with self._lock:
            self._items[key] = item
            while len(self._items) > self._most:
                del self._items[next(iter(self._items))]
        return item


class _Group(NamedTuple):
    path: Path
    number: int


@final
class StoredExamples(StoredRows[Example]):
    """The examples of Parquet files with the columns `EXAMPLES`, one file after another.

    Some row groups are held decoded, so going through the examples in order, or reading some in ascending order,
    decodes each group once.
    """

    def __init__(self, paths: Sequence[Path], owner: object = None) -> None:
        self._paths = list(paths)
        self._owner = owner
        self._groups: list[_Group] = []
        rows = [0]
        for path in self._paths:
            about = _metadata(path)
            self._groups += [_Group(path, number) for number in range(about.num_row_groups)]
            rows += [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._starts = np.cumsum(rows)
        self._held = _Recent[list[Example]](_GROUPS_HELD)

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
        return self._held.get(group, self._decode)[row - int(self._starts[group])]

    def _decode(self, group: int) -> list[Example]:
        path, number = self._groups[group]
        try:
            with parquet.ParquetFile(path) as file:
                return [_example(record) for record in file.read_row_group(number).to_pylist()]
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error


@final
class TokenFiles:
    """Positions of the tokens of each example: files of int32 ids, and behind them one bit a token, the targets."""

    def __init__(
        self, paths: Sequence[Path], rows: Sequence[int], lengths: np.ndarray, counts: np.ndarray, owner: object = None
    ) -> None:
        self.lengths, self.counts = lengths, counts
        self._paths = list(paths)
        self._owner = owner
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        # Where the tokens of each example begin, counted over all files.
        self._begins = Scratch.temporary(_PLACES_HELD)
        weakref.finalize(self, self._begins.close)
        self._begins.write(np.zeros(1, dtype=np.int64).data)
        total = 0
        for part in disk_arrays.parts(lengths):
            ends = total + np.cumsum(part, dtype=np.int64)
            self._begins.write(ends.data)
            total = int(ends[-1])
        self._firsts = [self._bounds(row, 1)[0] for row in self._starts.tolist()]
        self._held = _Recent[_Opened](_FILES_HELD)

    def ids(self, row: int) -> np.ndarray:
        """Return the token ids of the example, int32 [token]."""
        part, begin, end = self._place(row)
        return np.frombuffer(self._bytes(part, 4 * begin, 4 * end), dtype="<i4").astype(np.int32, copy=False)

    def targets(self, row: int) -> np.ndarray:
        """Return whether each token is a target, bool [token]."""
        part, begin, end = self._place(row)
        bits = 4 * (self._firsts[part + 1] - self._firsts[part])
        packed = self._bytes(part, bits + begin // 8, bits + (end + 7) // 8)
        first = begin % 8
        return np.unpackbits(np.frombuffer(packed, dtype=np.uint8))[first : first + end - begin].view(bool)

    def _place(self, row: int) -> tuple[int, int, int]:
        """Return the file, and the first token and the one behind the last, counted in that file."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        begin, end = self._bounds(row, 2)
        return part, begin - self._firsts[part], end - self._firsts[part]

    def _bounds(self, row: int, count: int) -> list[int]:
        """Return where the tokens of `count` examples begin, from `row` on, counted over all files."""
        return np.frombuffer(self._begins.read(8 * row, 8 * count), dtype=np.int64).tolist()

    def _bytes(self, part: int, begin: int, end: int) -> bytearray:
        # Read, not mapped: the pages of a map count as this process's memory until another process needs them.
        # A bytearray, because PyTorch wants to be able to write to what it is given.
        file = self._held.get(part, self._open)
        content = bytearray(os.pread(file.descriptor, end - begin, begin))
        if len(content) != end - begin:
            raise _damaged(self._paths[part], "it is too short")
        return content

    def _open(self, part: int) -> "_Opened":
        return _Opened(self._paths[part])


@final
class _Opened:
    """A file that is closed when its last user is gone."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _damaged(path, error) from error

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Arrays(StoredRows[np.ndarray], ABC):
    def __init__(self, files: TokenFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int32 [example]."""
        return self._files.lengths

    @property
    def counts(self) -> np.ndarray:
        """Targets per example, int32 [example]."""
        return self._files.counts


@final
class StoredIds(_Arrays):
    """Token ids of every example."""

    def _read(self, row: int) -> np.ndarray:
        return self._files.ids(row)


@final
class StoredTargets(_Arrays):
    """Target marks of every example."""

    def _read(self, row: int) -> np.ndarray:
        return self._files.targets(row)


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


def _example(record: dict[str, Any]) -> Example:
    fields = {name: record[name] for name in ("id", "row", "text", "prompt", "completion", "source", "label")}
    messages = tuple(Message(*turn) for turn in parse_json(record["messages"] or "[]"))
    return Example(**fields, messages=messages, extra=parse_object(record["extra"] or "{}"))


def _metadata(path: Path) -> parquet.FileMetaData:
    try:
        return parquet.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> CorruptFile:
    return CorruptFile(f"{path} is missing or damaged ({reason}). {_AGAIN}")
