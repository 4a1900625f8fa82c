"""The work on an index: its folder prepared, its shards computed as the pieces of a plan, inspected, removed.

Nothing on disk changes before the settings were compared and the free space was checked. After that the markers are
the truth: a run that is killed at any moment, on any of several hosts, loses the shards in flight and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, final

import numpy as np
from jaxtyping import Float, Int

from vestige.data import Example, TokenizedData
from vestige.distributed import is_rank0
from vestige.indexes._manifest import (
    Expectation,
    Manifest,
    expect_shards,
    manifest_path,
    publish_manifest,
    read_manifest,
    require_same,
)
from vestige.indexes._plan import Plan, PlannedShard, fingerprint_rows, plan_index, write_examples
from vestige.indexes._shards import (
    ShardContent,
    ShardFile,
    ShardWriter,
    marker_path,
    parts_of,
    shard_fault,
    shard_path,
)
from vestige.indexes._store import Index, corrupt_shards, find_places
from vestige.jobs import JOB_FILES, PROFILE_FILE, Compute, Pieces, run_pieces, step_done
from vestige.lazy import torch
from vestige.settings import LaunchSettings
from vestige.storage import check_disk, make_folder, remove_durably, remove_result, remove_strays, require_no_others

if TYPE_CHECKING:
    from torch import Tensor


@final
class PlannedBatches(tuple[np.ndarray, ...]):
    """The batches of one shard; a loop over them counts one as done when it requests the next."""

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(len(self)):
            yield self[number]
            step_done(len(self[number]))


ShardCompute = Callable[[PlannedBatches], Iterable[ShardContent]]
"""From the batches of a shard (arrays of rows of the data), taken once, to its content: part by part, in that order."""


@dataclass(frozen=True)
class IndexWork:
    """The shards of an index, and the finished index; `prepare_index` makes the folder ready for its `pieces`."""

    folder: Path
    manifest: Manifest
    plan: Plan
    """Both from `plan_index`."""
    examples: Sequence[Example]
    """All examples, in row order."""
    compute: Callable[[], AbstractContextManager[ShardCompute]]
    """Opens what shards are computed with."""
    skip_bad: bool = False

    @cached_property
    def pieces(self) -> Pieces[Index]:
        """The shards as pieces; a piece weighs as much as its shard has examples."""
        return Pieces(
            name="Indexing",
            folder=self.folder,
            weights=[each.rows for each in self.expected],
            is_done=lambda piece: self.fault(piece) is None,
            open=self._open,
            reduce=self._reduce,
        )

    @cached_property
    def expected(self) -> tuple[Expectation, ...]:
        """The record of each shard in the manifest."""
        return expect_shards(self.manifest)

    def fault(self, piece: int, *, contents: bool = False) -> str | None:
        """Return what is wrong with a shard, None if its marker is this index's and its file has the right size."""
        return shard_fault(self.folder, piece, self.expected[piece], contents=contents)

    @contextmanager
    def _open(self) -> Iterator[Compute]:
        with ShardWriter() as writer, self.compute() as compute:
            yield lambda piece: self._fill(piece, compute, writer)

    def _reduce(self) -> Index:
        """Return the finished index.

        Raises:
            CorruptFile: Shards are missing, or do not hold each example once; the message lists them.
        """
        faults = [f"shard {number}: {fault}" for number in range(len(self.plan)) if (fault := self.fault(number))]
        if faults:
            raise corrupt_shards(f"{len(faults)} of {len(self.plan)} shards of {self.folder} do not count", faults)
        # What was written a moment ago is not read whole again.
        find_places(self.folder, self.manifest, checked=False)
        return Index.open(self.folder)

    def _fill(self, piece: int, compute: ShardCompute, writer: ShardWriter) -> None:
        planned = self.plan.shards[piece]
        parts = _require_planned(compute(PlannedBatches(planned.batches)), planned, self.manifest)
        if not is_rank0():
            for _ in parts:
                pass
            return

        def name_of(row: int) -> str:
            return f'"{self.examples[row].id}" (row {row})'

        options = self.manifest.dtype, self.expected[piece], name_of
        kept = {"skip_bad": self.skip_bad, "device": self.manifest.device}
        writer.write(ShardFile(self.folder, piece, *options, **kept), parts)


def _require_planned(
    parts: Iterable[ShardContent], planned: PlannedShard, manifest: Manifest
) -> Iterator[ShardContent]:
    """Yield the parts; raise unless they are the rows that were planned."""
    first, all_rows = 0, planned.rows
    for content in parts:
        rows = all_rows[first : first + len(content.example)]
        first += len(content.example)
        if not np.array_equal(content.example.cpu().numpy(), rows):
            raise ValueError(f"shard {planned.number} was computed with other rows than planned")
        shape = (len(rows), manifest.width)
        if content.gradients.shape != shape or not len(content.loss) == len(content.norm) == len(rows):
            found = tuple(content.gradients.shape)
            raise ValueError(f"a part of shard {planned.number} has shape {found}, expected {shape}")
        yield content
    if first != len(all_rows):
        raise ValueError(f"shard {planned.number} was computed with {first} of {len(all_rows)} rows")


TOKENS = "tokens"
"""Folder of the tokens of data that does not fit into memory, made before there is a manifest."""
TRAINED = "trained"
"""Folder of what a compressor was trained to."""
BEGUN = (f"{TOKENS}/{'[0-9a-f]' * 16}", TRAINED, *JOB_FILES)
"""What there may be before there is a manifest."""
_OURS = (
    "manifest.json",
    *(f"shards/[0-9]*.{kind}" for kind in ("safetensors", "json")),
    "examples/[0-9]*.parquet",
    *(f"curvature/{name}" for name in ("fisher-*", "kfac-*", "ekfac-*", PROFILE_FILE)),
    "checks",
    "verbatim/[0-9]*",
    PROFILE_FILE,
    *BEGUN,
)


class IndexStatus(NamedTuple):
    """The progress of an index."""

    done: int
    """Shards whose marker is there and whose file has the right size."""
    total: int
    bytes: int
    """Size of the finished shards."""
    rows: int
    """Examples in the finished shards."""


def prepare_index(work: IndexWork) -> list[int]:
    """Prepare the folder: write manifest and examples; whatever was damaged no longer counts as done.

    Returns:
        Numbers of the shards that are missing.

    Raises:
        IndexMismatch: The index in the folder was made with other settings; nothing was touched.
        DiskSpaceError: It would not, or does not, fit.
        UserError: The folder holds other files, or cannot be written to.
    """
    folder, manifest, expected = work.folder, work.manifest, work.expected
    old = read_manifest(folder)
    if old is None:
        require_no_others(folder, BEGUN)
    else:
        require_same(folder, old, manifest)
    missing = [number for number in range(len(work.plan)) if work.fault(number, contents=True)]
    check_disk(folder, sum(expected[number].rows for number in missing) * manifest.row_bytes)
    for name in (".", "shards", "examples"):
        make_folder(folder / name)
    remove_strays(folder)
    publish_manifest(folder, manifest)
    write_examples(folder, manifest, work.examples, work.plan.lengths)
    for number in missing:
        # A marker may vouch for a file of the right size and the wrong content. Other processes may be at work already:
        # what was missing a moment ago is checked again, or their finished shard would be forgotten.
        if work.fault(number) is None and work.fault(number, contents=True):
            remove_durably(marker_path(folder, number))
    return missing


def index_status(folder: Path) -> IndexStatus:
    """Return the progress of the index in `folder`, read from its markers; zero where there is no manifest."""
    if read_manifest(folder) is None:
        return IndexStatus(0, 0, 0, 0)
    index = Index.open(folder, allow_missing=True)
    rows = index.manifest.shard_rows
    done = sorted(set(range(len(rows))).difference(index.missing_shards()))
    size = sum(shard_path(folder, number).stat().st_size for number in done)
    return IndexStatus(len(done), len(rows), size, sum(rows[number] for number in done))


def remove_index(folder: Path) -> None:
    """Remove the index in `folder`, for `--overwrite`; a folder without one is left alone, and so are tokens.

    Raises:
        UserError: The folder holds files that are not an index's.
    """
    # Tokens are known by what they were made from, and those of the next index are among them.
    remove_result(folder, _OURS, manifest_path(folder).name, begun=BEGUN, keep=[TOKENS])


ReadRows: TypeAlias = "Callable[[Int[np.ndarray, 'row']], Float[Tensor, 'row column']]"
"""From positions in the data to their gradients, float32, columns in the order of the manifest's components."""


def write_rows(
    out: str | Path, draft: Manifest, data: TokenizedData, read: ReadRows, *, overwrite: bool = False
) -> Index:
    """Write gradients that were computed elsewhere as an index, and return it opened; its losses are 0.

    Shards that are there already are kept: an interrupted call is repeated.

    Args:
        out: Folder of the index.
        draft: Its manifest without stages; `imported` says where the gradients come from. Compression `IMPORTED_SPEC`
            stands for a projection that is not known: gradients of new queries are then refused.
        data: The examples, one for each row, with or without tokens.
        read: Reads rows; called once for each part of a shard.
        overwrite: Replace an index in `out`.

    Raises:
        IndexMismatch: `out` holds an index of other settings or examples.
        NonFinite: A row has a number that is not finite; the message names its example.
        UserError: `out` holds other files, or cannot be written to.
    """
    out = Path(out)
    if overwrite:
        remove_index(out)
    # Rows of equal length are planned in the order in which they are given.
    lengths = np.ones(len(data), dtype=np.int64)
    manifest, plan = plan_index(out, draft, lengths, lambda start, stop: fingerprint_rows(data, start, stop))

    def content(batches: PlannedBatches) -> Iterator[ShardContent]:
        for _, part in parts_of(batches, manifest.width):
            rows = np.concatenate(list(part))
            gradients = read(rows)
            yield ShardContent(gradients, torch.zeros(len(rows)), gradients.norm(dim=1), torch.from_numpy(rows))

    work = IndexWork(out, manifest, plan, data.examples, lambda: nullcontext(content))
    prepare_index(work)
    return run_pieces(work.pieces, LaunchSettings(), None)
