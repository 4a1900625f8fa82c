"""`scores.safetensors`: all scores of a run and the ids of its axes, written and read a part at a time.

The library's own functions make one text of all ids, several times over, and a second copy of the scores. Here memory
hardly grows with the number of examples; the files are the same.
"""

import json
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, final, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vestige.errors import CorruptFile, UserError
from vestige.parsing import parse_json
from vestige.runs._digests import require_unaltered
from vestige.runs._record import DENSE_FILE, is_run, read_record

if TYPE_CHECKING:
    from vestige.data import Example

AXES = "query example"
_IDS_AT_ONCE = 2**13
_WINDOW = 2**20
"""Bytes of ids that are decoded at once."""
_ENTRY = 4096
"""More bytes than the longest entry of the header but the ids."""


@runtime_checkable
class _OnDisk(Protocol):
    """Examples that are stored column by column."""

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of one column, in order."""
        ...


def names_of(examples: "Sequence[Example]") -> Iterator[str]:
    """Yield ids in row order; of examples that are on disk, nothing else is read."""
    return examples.column("id") if isinstance(examples, _OnDisk) else (example.id for example in examples)


def id_array(names: Iterable[str]) -> pa.ChunkedArray:
    """Return the names as an Arrow array, which takes little more than their letters."""
    names = iter(names)
    parts = iter(lambda: list(islice(names, _IDS_AT_ONCE)), [])
    return pa.chunked_array([pa.array(part, pa.string()) for part in parts], pa.string())


def write_dense(
    path: Path, scores: Float[np.ndarray, "query example"], query_ids: Iterable[str], example_ids: Iterable[str]
) -> None:
    """Write the file: eight bytes with the length of the header, the header as JSON, the scores row by row."""
    entry = {"dtype": "F32", "shape": list(scores.shape), "data_offsets": [0, 4 * scores.size]}
    with path.open("wb") as file:
        file.write(bytes(8) + f'{{"__metadata__":{{"axes":"{AXES}","query_ids":"'.encode())
        file.writelines(_texts(query_ids))
        file.write(b'","example_ids":"')
        file.writelines(_texts(example_ids))
        file.write(b'"},"scores":' + json.dumps(entry, separators=(",", ":")).encode() + b"}")
        file.write(b" " * (-file.tell() % 8))
        length = file.tell() - 8
        file.seek(0)
        file.write(length.to_bytes(8, "little"))
        file.seek(0, os.SEEK_END)
        for row in scores:
            file.write(np.ascontiguousarray(row, dtype="<f4").data)


def _texts(names: Iterable[str]) -> Iterator[bytes]:
    """Yield the names as a JSON list inside a JSON text, part by part."""
    names, between = iter(names), ""
    yield b"["
    while part := list(islice(names, _IDS_AT_ONCE)):
        yield json.dumps(between + json.dumps(part)[1:-1])[1:-1].encode()
        between = ", "
    yield b"]"


@final
class DenseFile:
    """All scores of a run on disk, [query, example]."""

    def __init__(self, path: Path) -> None:
        """Use `open_dense`.

        Args:
            path: The file.

        Raises:
            ValueError: It is damaged.
        """
        self.path = path
        with path.open("rb") as file, _header(file) as header:
            self.axes = _entry(header, "axes")
            entry = _entry(header, "scores")
            self._begin = len(header)
            self._ids = {name: _place(header, name) for name in ("query_ids", "example_ids")}
        if entry is None or entry["dtype"] != "F32":
            raise ValueError("it holds no scores")
        rows, columns = entry["shape"]
        self.shape: tuple[int, int] = operator.index(rows), operator.index(columns)
        if path.stat().st_size != self._begin + 4 * self.shape[0] * self.shape[1]:
            raise ValueError("it is too short or too long")

    def read(self, queries: slice = slice(None), examples: slice = slice(None)) -> Float[np.ndarray, "query example"]:
        """Return the scores of some queries, or examples, or all."""
        rows, columns = (range(*part.indices(size)) for part, size in zip((queries, examples), self.shape, strict=True))
        scores = np.empty((len(rows), len(columns)), dtype=np.float32)
        # Read, not mapped: the pages of a map count as this process's memory until another process needs them.
        with self.path.open("rb", buffering=0) as file:
            for row, found in zip(rows, scores, strict=True):
                file.seek(self._begin + 4 * (row * self.shape[1] + columns.start))
                found[:] = np.fromfile(file, dtype="<f4", count=len(columns))
        return scores

    def query_ids(self) -> list[str]:
        """Return the ids of the queries, in order."""
        with self.path.open("rb") as file, _header(file) as header:
            return list(_names(header, *self._ids["query_ids"]))

    def example_ids(self) -> "ExampleIds":
        """Return the ids of the examples, in order."""
        return ExampleIds(self.path, *self._ids["example_ids"], self.shape[1])


@final
class ExampleIds:
    """Ids of the examples of a run, in order; read again each time, a part at once, for they are what takes memory."""

    def __init__(self, path: Path, start: int, stop: int, count: int) -> None:
        """Use `DenseFile.example_ids`.

        Args:
            path: The file.
            start: Where its header has them.
            stop: Where they end there.
            count: How many there are to be.
        """
        self._path, self._place, self._count = path, (start, stop), count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Yield all ids.

        Raises:
            CorruptFile: They are not as many as the scores.
        """
        found = 0
        with self._path.open("rb") as file, _header(file) as header:
            for name in _names(header, *self._place):
                found += 1
                yield name
        if found != self._count:
            raise CorruptFile(f"{self._path} has {found} ids for {self._count} examples. Make the run again.")


def open_dense(folder: Path) -> DenseFile:
    """Open all scores of the run in a folder.

    Raises:
        UserError: The run keeps only the ends of each ranking.
        CorruptFile: The file is damaged.
    """
    path = folder / DENSE_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} keeps only the ends of each ranking, not all scores.\n"
            "Run `vestige attribute` again with --dense."
        )
    if is_run(folder):
        require_unaltered(folder, read_record(folder).files, DENSE_FILE)
    try:
        file = DenseFile(path)
    except (OSError, ValueError, OverflowError, LookupError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}. Run `vestige attribute` again.") from error
    if file.axes != AXES:
        raise CorruptFile(f"{path} has the axes {file.axes!r}; expected {AXES!r}.")
    return file


def _header(file: BinaryIO) -> mmap:
    """Return everything before the scores: the length of the header, and the header."""
    return mmap(file.fileno(), 8 + int.from_bytes(file.read(8), "little"), access=ACCESS_READ)


def _entry(header: mmap, name: str) -> Any:
    """Return what the header has under a name; None if nothing. Inside a text, a quotation mark would be escaped."""
    key = f'"{name}":'.encode()
    start = _find(header, key)
    if start < 0:
        return None
    text = header[start + len(key) : start + len(key) + _ENTRY].decode("ascii", errors="replace")
    return json.JSONDecoder().raw_decode(text)[0]


def _place(header: mmap, name: str) -> tuple[int, int]:
    """Return where the header has a JSON list that it holds as a text."""
    key = f'"{name}":"['.encode()
    start = _find(header, key)
    end = _find(header, b']"', max(start, 0))
    if start < 0 or end < 0:
        raise ValueError(f"it has no {name}")
    return start + len(key), end


def _find(header: mmap, key: bytes, start: int = 0) -> int:
    """Return where the key comes first, -1 for nowhere; a window at a time is in memory, for the ids may be many."""
    for begin in range(start, len(header), _WINDOW):
        if (found := header.find(key, begin, begin + _WINDOW + len(key) - 1)) >= 0:
            return found
    return -1


def _names(header: mmap, start: int, stop: int) -> Iterator[str]:
    """Yield the ids of such a list, decoded window by window."""
    decoder, text = json.JSONDecoder(), ""
    while start < stop:
        cut = _cut(header, start, stop)
        text += parse_json(b'"' + header[start:cut] + b'"')
        start, end = cut, 0
        while (quote := text.find('"', end)) >= 0:
            try:
                found, end = decoder.raw_decode(text, quote)
            except json.JSONDecodeError:  # it goes on in the next window
                break
            yield found
        text = text[end:]


def _cut(header: mmap, start: int, stop: int) -> int:
    """Return the end of a window: behind a comma, which is in no escape sequence."""
    end = start + _WINDOW
    if end >= stop:
        return stop
    comma = header.rfind(b",", start, end)
    if comma < 0:
        comma = header.find(b",", end, stop)
    return comma + 1 or stop
