"""`scores.safetensors`: all scores of a run and the ids of its axes, read a part at a time.

The library takes no header beyond 100 MB, which is some five million ids, and copies the scores to write them: the
header is written and read here, and the file is one that the library reads too.
"""

import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, final, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from vestige.errors import CorruptFile, UserError
from vestige.parsing import parse_json
from vestige.runs._folder import is_run, read_record, require_unaltered
from vestige.runs._record import DENSE_FILE

if TYPE_CHECKING:
    from vestige.data import Example

AXES = "query example"
_IDS_AT_ONCE = 2**13


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
        file.write(bytes(8) + f'{{"__metadata__":{{"axes":"{AXES}","query_ids":"['.encode())
        _write_names(file, query_ids)
        file.write(b']","example_ids":"[')
        _write_names(file, example_ids)
        file.write(b']"},"scores":' + json.dumps(entry, separators=(",", ":")).encode() + b"}")
        file.write(b" " * (-file.tell() % 8))
        length = file.tell() - 8
        file.seek(0)
        file.write(length.to_bytes(8, "little"))
        file.seek(0, os.SEEK_END)
        for row in scores:
            file.write(np.ascontiguousarray(row, dtype="<f4").data)


def _write_names(file: BinaryIO, names: Iterable[str]) -> None:
    """Write the entries of a JSON list inside a JSON text."""
    between = b""
    for name in names:
        file.write(between + json.dumps(json.dumps(name))[1:-1].encode())
        between = b", "


@final
class DenseFile:
    """All scores of a run on disk, [query, example]."""

    def __init__(self, path: Path) -> None:
        """Use `open_dense`, which catches what the parsing of a damaged header raises."""
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._begin = 8 + length
            if self._begin > path.stat().st_size:
                raise ValueError("it is too short")
            header = parse_json(file.read(length))
        entry, about = header["scores"], header["__metadata__"]
        self.axes = about.get("axes")
        if entry["dtype"] != "F32":
            raise ValueError("it holds no scores")
        rows, columns = entry["shape"]
        self.shape: tuple[int, int] = operator.index(rows), operator.index(columns)
        if path.stat().st_size != self._begin + 4 * self.shape[0] * self.shape[1]:
            raise ValueError("it is too short or too long")
        self._query_ids, self._example_ids = str(about["query_ids"]), str(about["example_ids"])

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
        return list(StoredIds(self.path, self._query_ids, self.shape[0]))

    def example_ids(self) -> "StoredIds":
        """Return the ids of the examples, in order."""
        return StoredIds(self.path, self._example_ids, self.shape[1])


@final
class StoredIds:
    """Ids of an axis of a run, in order: a list in JSON, decoded name by name, which takes a fifth of their memory."""

    def __init__(self, path: Path, text: str, count: int) -> None:
        """Use `DenseFile.example_ids`: of `text`, the list in the file at `path`, `count` names are expected."""
        self._path, self._text, self._count = path, text, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Yield all ids.

        Raises:
            CorruptFile: They are not as many as the scores, or do not read.
        """
        decoder, at, found = json.JSONDecoder(), self._text.find('"'), 0
        while at >= 0:
            try:
                name, end = decoder.raw_decode(self._text, at)
            except json.JSONDecodeError as error:
                raise CorruptFile(f"{self._path} has ids that do not read: {error}. Make the run again.") from error
            yield name
            at, found = self._text.find('"', end), found + 1
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
    except (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}. Run `vestige attribute` again.") from error
    if file.axes != AXES:
        raise CorruptFile(f"{path} has the axes {file.axes!r}; expected {AXES!r}.")
    return file


def rank_scores(
    scores: Float[np.ndarray, "example"], end: str
) -> tuple[Float[np.ndarray, "example"], Int[np.ndarray, "rank"], Callable[[float], float]]:
    """Return all scores of a query in float64, the rows of an end, best first, and the map from a score to percentile.

    Ties are in the order of rows; examples that were left out have NaN and no rank.

    Args:
        scores: In the order of the training data.
        end: "proponent" for the highest first, "opponent" for the lowest.
    """
    scores = scores.astype(np.float64)
    known = np.flatnonzero(np.isfinite(scores))
    order = known[np.argsort(scores[known] * (-1 if end == "proponent" else 1), kind="stable")]
    ascending = np.sort(scores[known])
    return scores, order, lambda score: 100.0 * float(np.searchsorted(ascending, score)) / max(len(ascending), 1)
