"""The rows of an index: which examples each batch and each shard holds, fixed before any work starts, and their texts.

The plan follows from the lengths and the settings alone, so every worker makes the same one, and any worker that
computes a shard, at any time, gets the same bytes. The manifest keeps rows per shard and a hash, not a million row
numbers, and the plan itself has them on the disk. The examples are kept with the index, so that it can be read without
the data it was made from.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import (
    ANY_EXAMPLES,
    EXAMPLES,
    GROUP_ROWS,
    CutBatch,
    CutBatches,
    Example,
    Sharing,
    TokenizedData,
    record_of,
)
from vestige.errors import CorruptFile, DataError, Difference, IndexMismatch, mismatch_message
from vestige.indexes._manifest import Manifest, PlanStage, difference, read_manifest
from vestige.storage import make_folder, write_durably
from vestige.tables import read_table

_SHARD_TOKENS = 2**20
_MOST_TOKEN_SHARDS = 1024
"""A long job is cut into shards of about a million tokens even where the rows are small, up to this many."""
_DECIDE_TOKENS = ("model", "max-length", "chat")
_FILE_ROWS = 64 * GROUP_ROWS
"""Examples in a file: its table of contents, about 1 kB a row group, is in memory while it is written or open."""


class PlannedShard(NamedTuple):
    """One shard's work. Its rows are looked up when they are requested, so a plan is small however many there are."""

    number: int
    cut: CutBatches
    """The batches of its stage, of which its rows are those from `start` to `stop`."""
    first: int
    """The first row of its stage in the data."""
    start: int
    stop: int

    @property
    def rows(self) -> np.ndarray:
        """The rows of the data, int64, in the order of the shard."""
        return self.cut.rows[self.start : self.stop].astype(np.int64) + self.first

    @property
    def batches(self) -> tuple[np.ndarray, ...]:
        """Its batches, each an array of rows of the data, int64."""
        ends = [batch.stop - self.start for batch in self.cut_batches()]
        return tuple(np.split(self.rows, ends[:-1]))

    @property
    def examples(self) -> int:
        """Number of its rows."""
        return self.stop - self.start

    @property
    def tokens(self) -> int:
        """Tokens of its examples."""
        return self.cut.tokens(self.start, self.stop)

    @property
    def padded_tokens(self) -> int:
        """Tokens with the padding of the batches."""
        return sum(batch.tokens for batch in self.cut_batches())

    def cut_batches(self) -> Iterator[CutBatch]:
        """Yield its batches, as ranges of the rows of `cut`."""
        return self.cut.batches(self.start, self.stop)


@dataclass(frozen=True)
class Plan:
    """All shards of an index, and the tokens per example [example] that they were made from."""

    shards: tuple[PlannedShard, ...]
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.shards)


def plan_index(
    folder: Path,
    draft: Manifest,
    lengths: np.ndarray,
    fingerprint_of: Callable[[int, int], str],
    *,
    append: bool = False,
    sharing: Sharing = ANY_EXAMPLES,
) -> tuple[Manifest, Plan]:
    """Return the manifest with its plan, and the plan: one stage, or those of the index in `folder` and what is new.

    Args:
        folder: The index, which need not exist.
        draft: The manifest without stages.
        lengths: Tokens per example, whole numbers [example].
        fingerprint_of: sha256 over the examples `start:stop`, as `fingerprint_rows` makes it.
        sharing: Which examples may share a batch.
        append: If the data begins with the examples that `folder` has indexed, add the rows behind them as a stage.

    Raises:
        DataError: There is no example.
        IndexMismatch: The index in `folder` was made with other settings or other examples, or with fewer while
            `append` is False.
    """
    if not len(lengths):
        raise DataError("There is nothing to index: the data has no examples.")
    bounds, fingerprint_of = [(0, len(lengths))], cache(fingerprint_of)
    old = read_manifest(folder)
    if old is not None and (earlier := [(stage.start, stage.stop) for stage in old.plan.stages]):
        _require_prefix(folder, old, draft, len(lengths), fingerprint_of)
        rest = (earlier[-1][1], len(lengths))
        if rest[0] < rest[1] and not append:
            raise IndexMismatch(
                f"The index in {folder} holds {rest[0]:,} examples and the data has {rest[1]:,}, of which the first "
                "are the same; nothing was changed. Type --append to add the new ones, or give another --out."
            )
        bounds = [*earlier, rest] if rest[0] < rest[1] else earlier
    stages: list[PlanStage] = []
    shards: list[PlannedShard] = []
    for start, stop in bounds:
        stage = _cut(draft, lengths[start:stop], start, len(shards), sharing)
        shards += stage
        stages.append(_record(start, stop, fingerprint_of(start, stop), stage))
    manifest = draft.model_copy(update={"plan": draft.plan.model_copy(update={"stages": tuple(stages)})})
    return manifest, Plan(tuple(shards), lengths)


def _require_prefix(
    folder: Path, old: Manifest, draft: Manifest, examples: int, fingerprint_of: Callable[[int, int], str]
) -> None:
    """Raise unless the examples that `old` has indexed begin the new data, and the settings are the same."""
    cut = draft.plan.model_copy(update={"stages": old.plan.stages})
    differences = difference(old, draft.model_copy(update={"data": old.data, "plan": cut}))
    changed = old.plan.stages[-1].stop > examples or any(
        fingerprint_of(stage.start, stage.stop) != stage.fingerprint for stage in old.plan.stages
    )
    # Another tokenizer or another cut gives other tokens: then the data is not what the user has to check.
    if changed and not any(found.field in _DECIDE_TOKENS for found in differences):
        sizes = [f"{side.name} ({side.examples:,} examples)" for side in (old.data, draft.data)]
        differences.insert(0, Difference("data", sizes[0], f"{sizes[1]}, begins differently"))
    if differences:
        raise IndexMismatch(mismatch_message(f"The index in {folder}", differences))


def _cut(manifest: Manifest, lengths: np.ndarray, first: int, number: int, sharing: Sharing) -> list[PlannedShard]:
    """Cut the shards of a stage, from `number` on: consecutive batches, none split, no shard larger than need be."""
    settings = manifest.plan
    cut = CutBatches(lengths, manifest.token_budget, settings.max_examples, sharing)
    # Padded tokens stand for the time that a batch takes.
    total = sum(batch.tokens for batch in cut.batches())
    most_tokens = max(total // max(min(total // _SHARD_TOKENS, _MOST_TOKEN_SHARDS), settings.fewest_shards), 1)
    most_rows = max(settings.shard_bytes // manifest.row_bytes, 1)
    held_tokens = 0
    borders = [0]
    for batch in cut.batches():
        full = batch.stop - borders[-1] > most_rows or held_tokens + batch.tokens > most_tokens
        if held_tokens and full:
            borders.append(batch.start)
            held_tokens = 0
        held_tokens += batch.tokens
    return [
        PlannedShard(number + place, cut, first, start, stop)
        for place, (start, stop) in enumerate(pairwise([*borders, len(cut)]))
    ]


def _record(start: int, stop: int, fingerprint: str, shards: Sequence[PlannedShard]) -> PlanStage:
    digest = hashlib.sha256()
    for shard in shards:
        for batch in shard.batches:
            digest.update(np.array([len(batch)], dtype="<i8").tobytes())
            digest.update(batch.astype("<i8").tobytes())
        digest.update(b"end of shard")
    rows = tuple(shard.examples for shard in shards)
    return PlanStage(start=start, stop=stop, fingerprint=fingerprint, shard_rows=rows, plan_hash=digest.hexdigest())


def fingerprint_rows(data: TokenizedData, start: int, stop: int) -> str:
    """Return the sha256 of the examples `start:stop`: ids, tokens, targets, texts, sources and labels, in order."""
    digest = hashlib.sha256()
    for row in range(start, stop):
        digest.update(json.dumps(record_of(data.examples[row], 0), sort_keys=True).encode())
        for values in (np.asarray(data.input_ids[row], "<i4"), np.packbits(data.targets[row])):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(values.tobytes())
    return digest.hexdigest()


def write_examples(folder: Path, manifest: Manifest, examples: Sequence[Example], lengths: np.ndarray) -> None:
    """Write the examples of each stage of the plan to Parquet files of its own; existing ones stay as they are."""
    make_folder(folder / "examples")
    for number, stage in enumerate(manifest.plan.stages):
        if _holds(_paths(folder, number), stage.stop - stage.start):
            continue
        for place, first in enumerate(range(stage.start, stage.stop, _FILE_ROWS)):
            path = folder / "examples" / f"{number:05d}-{place:05d}.parquet"
            rows = range(first, min(first + _FILE_ROWS, stage.stop))
            if not _holds([path], len(rows)):
                write_durably(path, _stream(_tables(rows, examples, lengths)))


def read_lengths(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the lengths of all examples of an index in tokens, int64 [example]."""
    tables = [
        read_table(path, EXAMPLES, "Run the same vestige index command again.", required=["length"], columns=["length"])
        for path in examples_paths(folder, manifest)
    ]
    return pa.concat_tables(tables)["length"].to_numpy()


def examples_paths(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files of the examples of an index, in row order."""
    found = []
    for number, stage in enumerate(manifest.plan.stages):
        paths = _paths(folder, number)
        if not _holds(paths, stage.stop - stage.start):
            raise CorruptFile(
                f"A file {folder / 'examples'}/{number:05d}*.parquet is missing or damaged. Run the same vestige index "
                "command again."
            )
        found += paths
    return found


def _stream(tables: Iterator[pa.Table]) -> Iterator[bytes]:
    """Yield the bytes of a Parquet file of `tables`, table by table."""
    held = io.BytesIO()
    with parquet.ParquetWriter(pa.PythonFile(held, mode="w"), EXAMPLES) as writer:
        for table in tables:
            writer.write_table(table)
            yield held.getvalue()
            held.seek(0)
            held.truncate()
    yield held.getvalue()


def _paths(folder: Path, stage: int) -> list[Path]:
    """Return the files of a stage, in order. Of an older index it is one, named by the stage alone."""
    parts = sorted((folder / "examples").glob(f"{stage:05d}-*.parquet"))
    return parts or [folder / "examples" / f"{stage:05d}.parquet"]


def _holds(paths: Sequence[Path], rows: int) -> bool:
    try:
        return sum(parquet.read_metadata(path).num_rows for path in paths) == rows
    except (OSError, pa.ArrowException):
        return False


def _tables(rows: range, examples: Sequence[Example], lengths: np.ndarray) -> Iterator[pa.Table]:
    """Yield the examples at `rows`, one row group after another."""
    for first in range(0, len(rows), GROUP_ROWS):
        records = [record_of(examples[row], int(lengths[row])) for row in rows[first : first + GROUP_ROWS]]
        yield pa.Table.from_pylist(records, schema=EXAMPLES)
