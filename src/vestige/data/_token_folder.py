"""The folder of a data set's tokens: parts written one by one, each whole or absent, and a list of them at the end.

    tokens.json       written last: what the tokens were made from, rows and bytes of every part, the fingerprint
    00012.tokens      int32 ids, one example after another, and then one bit a token: is it a target?
    00012.parquet     the examples, with their lengths and numbers of targets
    00012.json        written after both: their sizes and sha256

Killed at any moment, the next process that makes the same tokens continues at the first part without its marker.
Several processes may make them at once: they write the same bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow.parquet as parquet

from vestige import disk_arrays
from vestige.data._fingerprint import hashed
from vestige.data._parts import PackedPart
from vestige.data._seen import SeenIds
from vestige.data._stored import StoredExamples, StoredIds, StoredTargets, TokenFiles
from vestige.data._tokenize import Tally
from vestige.data._types import TokenizedData
from vestige.parsing import as_record, parse_object
from vestige.storage import make_folder, remove_strays, sha256_of, write_durably

FORMAT = 3
"""Those of format 1 may lack examples: of what was read before the first part was written, only that part was. Those of
format 2 were made without reading loss masks, weights of turns and what a chat template is given beside them."""
_LIST = "tokens.json"


class StoredData(NamedTuple):
    """Tokens on disk, and the tally of how they were made."""

    data: TokenizedData
    tally: Tally


class AddedPart(NamedTuple):
    """Ids of a part, and the positions of those that may have come before."""

    names: list[str]
    suspects: list[int]


class _PartRecord(NamedTuple):
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
        self._folder = folder
        self._encoder = encoder
        self._parts: list[_PartRecord] = []
        self._digest = hashlib.sha256()
        self._seen = SeenIds()

    def is_done(self, number: int) -> bool:
        """Return whether the part is there and matches its marker; reads every byte."""
        record = _part_record(self._folder, number)
        if record is None:
            return False
        paths = _part_paths(self._folder, number)
        return all(path.exists() for path in paths) and [sha256_of(path) for path in paths] == record.sha256

    def add(self, part: PackedPart) -> AddedPart:
        """Write the next part to disk."""
        number, written = len(self._parts), []
        for path, content in zip(_part_paths(self._folder, number), (part.tokens, part.table), strict=True):
            written.append(write_durably(path, [content]))
        sizes, digests = [one.bytes for one in written], [one.sha256 for one in written]
        record = _PartRecord(len(part.names), sizes, digests, list(part.tally))
        write_durably(_marker(self._folder, number), [json.dumps(record._asdict()).encode()])
        self._parts.append(record)
        self._digest.update(part.hashed)
        return AddedPart(part.names, self._seen.add(part.names))

    def add_finished(self) -> AddedPart:
        """Take over the next part, which `is_done`, as it is."""
        number = len(self._parts)
        record = _part_record(self._folder, number)
        assert record is not None
        data = _opened(self._folder, range(number, number + 1), [record.rows], "", "")
        names = list(_examples(data).column("id"))
        for name, ids, targets in zip(names, data.input_ids, data.targets, strict=True):
            self._digest.update(hashed(name, ids, targets))
        self._parts.append(record)
        return AddedPart(names, self._seen.add(names))

    def row_of(self, name: str) -> int:
        """Return the first row so far with this id."""
        paths = [_part_paths(self._folder, number)[1] for number in range(len(self._parts))]
        return next(row for row, other in enumerate(StoredExamples(paths).column("id")) if other == name)

    def finish(self) -> None:
        """Write the list of the parts: the tokens are complete."""
        content = {
            "format": FORMAT,
            "encoder": self._encoder,
            "fingerprint": self._digest.hexdigest(),
            "parts": [part._asdict() for part in self._parts],
        }
        write_durably(self._folder / _LIST, [json.dumps(content).encode()])


def open_tokens(folder: Path, name: str, owner: object = None) -> StoredData | None:
    """Return the tokens in `folder`; None if they are not complete.

    Args:
        folder: Where a `TokenWriter` has finished.
        name: What to call the data.
        owner: Kept as long as the data is in use.
    """
    content = _listed(folder)
    if content is None:
        return None
    parts = [_PartRecord(**part) for part in content["parts"]]
    for number, part in enumerate(parts):
        if [_size(path) for path in _part_paths(folder, number)] != part.bytes:
            return None
    data = _opened(folder, range(len(parts)), [part.rows for part in parts], content["fingerprint"], name, owner)
    tally = Tally()
    for part in parts:
        tally = tally.joined(Tally(*part.tally))
    return StoredData(data, tally)


def find_tokens(folder: Path, fingerprint: str, encoder: str) -> Path | None:
    """Return the folder in `folder` with the tokens of the data with this fingerprint, made by this encoder."""
    for path in sorted(folder.glob(f"*/{_LIST}")):
        content = _listed(path.parent)
        if content is not None and (content["fingerprint"], content["encoder"]) == (fingerprint, encoder):
            return path.parent
    return None


def _opened(
    folder: Path, parts: range, rows: list[int], fingerprint: str, name: str, owner: object = None
) -> TokenizedData:
    paths = [_part_paths(folder, number) for number in parts]
    columns = [disk_arrays.zeros(sum(rows), kind) for kind in (np.int32, np.int32, np.bool_)]
    first = 0
    for (_, table), count in zip(paths, rows, strict=True):
        for column, values in zip(columns, _columns(table), strict=True):
            column[first : first + count] = values
        first += count
        disk_arrays.let_go(*columns)
    lengths, counts, truncated = columns
    files = TokenFiles([tokens for tokens, _ in paths], rows, lengths, counts, owner)
    examples = StoredExamples([table for _, table in paths], owner)
    return TokenizedData(examples, StoredIds(files), StoredTargets(files), truncated, fingerprint, name)


def _columns(path: Path) -> list[np.ndarray]:
    """Return lengths, numbers of targets, and what was truncated."""
    with parquet.ParquetFile(path) as file:
        return [column.to_numpy() for column in file.read(columns=["length", "targets", "truncated"]).columns]


def _examples(data: TokenizedData) -> StoredExamples:
    assert isinstance(data.examples, StoredExamples)
    return data.examples


def _listed(folder: Path) -> dict | None:
    try:
        content = parse_object((folder / _LIST).read_bytes())
    except (OSError, ValueError):
        return None
    return content if content.get("format") == FORMAT else None


def _part_record(folder: Path, number: int) -> _PartRecord | None:
    try:
        return as_record(_PartRecord, parse_object(_marker(folder, number).read_bytes()))
    except (OSError, ValueError):
        return None


def _part_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05d}.tokens", folder / f"{number:05d}.parquet"


def _marker(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
