"""Filling an index: the shards that are missing are computed and written one by one, whoever began them.

Nothing on disk changes before the settings were compared and the free space was checked. After that the markers are
the truth: a run that is killed at any moment, on any of several hosts, loses the shard in flight and nothing else.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, final, overload

import numpy as np

from vestige.data import Example
from vestige.errors import SpecError, UserError
from vestige.files import check_disk, is_temporary, make_folder, remove_strays
from vestige.index._difference import extends, publish_manifest, require_same
from vestige.index._examples import write_examples
from vestige.index._manifest import Manifest, expected_shards, manifest_path, read_manifest
from vestige.index._plan import Plan, PlannedShard, check_plan
from vestige.index._shards import ShardContent, shard_fault, shard_path, write_shard
from vestige.index._store import incomplete_message
from vestige.progress import Progress, announce
from vestige.progress import progress as show_progress

_OURS = ("manifest.json", "shards", "examples", "curvature")
_ROOT, _SHARDS, _EXAMPLES = ".", "shards", "examples"


class IndexStatus(NamedTuple):
    """How far an index has come."""

    done: int
    """Shards whose marker is there and whose file has the right size."""
    total: int
    bytes: int
    """Size of the finished shards."""
    rows: int
    """Examples in the finished shards."""


@final
class PlannedBatches(Sequence[np.ndarray]):
    """The batches of one shard; a loop over them moves the progress bar when it comes back for the next one."""

    def __init__(self, batches: tuple[np.ndarray, ...], progress: Progress) -> None:
        self._batches, self._progress = batches, progress

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[np.ndarray, ...]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | tuple[np.ndarray, ...]:
        return self._batches[index]

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self._batches:
            yield batch
            self._progress.advance(len(batch))


def write_shards(
    folder: Path,
    manifest: Manifest,
    plan: Plan,
    compute: Callable[[PlannedBatches], ShardContent],
    *,
    examples: Sequence[Example],
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> list[int]:
    """Every shard of this worker's share is on disk, whole and marked; those that were there are left alone.

    Args:
        folder: The index; made if it does not exist.
        manifest: From `plan_index`.
        plan: From `plan_index`.
        compute: Turns the batches of a shard (each an array of rows of the data) into its content, rows in that order.
            Iterate over the batches once: this is what moves the progress bar.
        examples: All examples, in row order; they are stored with the index.
        shard: `(i, n)`: compute shards i, i + n, i + 2n, ... only, as worker i of n, counted from 0.
        progress: Whether to show progress.

    Returns:
        Numbers of the shards that were computed.

    Raises:
        IndexMismatch: The index in `folder` was made with other settings; nothing was touched.
        DiskSpaceError: It would not, or does not, fit; finished shards are intact.
        NonFinite: A loss or a gradient is NaN or infinite.
        SpecError: `shard` is not a share.
        UserError: `folder` holds other files, or cannot be written to.
    """
    share = _share(plan, shard)
    _require_usable(folder, manifest)
    check_plan(folder, manifest, plan)
    expected = expected_shards(manifest)
    missing = [one for one in share if shard_fault(folder, one.number, expected[one.number], contents=True)]
    check_disk(folder, sum(expected[one.number].rows for one in missing) * manifest.row_bytes)
    _prepare(folder, manifest)
    write_examples(folder, manifest, examples, plan.lengths)
    if progress and len(missing) < len(share):
        announce(f"{len(share) - len(missing)} of {len(share)} shards are already done.")

    def name_of(row: int) -> str:
        return f'"{examples[row].id}" (row {row})'

    done: list[int] = []
    try:
        with _shown(sum(expected[one.number].rows for one in missing), progress) as bar:
            for one in missing:
                content = compute(PlannedBatches(one.batches, bar))
                _require_planned(content, one, manifest)
                write_shard(folder, one.number, content, manifest.dtype, expected[one.number], name_of)
                done.append(one.number)
    except KeyboardInterrupt:
        announce(incomplete_message(folder, manifest, len(plan) - index_status(folder).done))
        raise
    return done


def index_status(folder: Path) -> IndexStatus:
    """How far the index in `folder` has come, read from its markers; nothing is done where there is no manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        return IndexStatus(0, 0, 0, 0)
    expected = expected_shards(manifest)
    done = [
        number
        for number, expectation in enumerate(expected)
        if shard_fault(folder, number, expectation, contents=False) is None
    ]
    size = sum(shard_path(folder, number).stat().st_size for number in done)
    return IndexStatus(len(done), len(expected), size, sum(expected[number].rows for number in done))


def remove_index(folder: Path) -> None:
    """The index in `folder` is gone, for `--overwrite`; a folder without one is left alone.

    Raises:
        UserError: The folder holds files that are not an index's.
    """
    if not folder.exists():
        return
    _require_no_others(folder)
    # The manifest goes first: whatever is left after a kill is no longer taken for an index.
    manifest_path(folder).unlink(missing_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _share(plan: Plan, shard: tuple[int, int] | None) -> tuple[PlannedShard, ...]:
    """Every n-th shard, because the first ones hold the longest examples and take the longest."""
    if shard is None:
        return plan.shards
    number, workers = shard
    if workers < 1 or not 0 <= number < workers:
        raise SpecError(
            f"shard=({number}, {workers}) is not a share of the work. Expected (i, n) with i from 0 to n-1; "
            "on the command line, --shard 1/n to --shard n/n."
        )
    return plan.shards[number::workers]


def _require_usable(folder: Path, manifest: Manifest) -> None:
    """The folder is empty, absent, or holds this index or its beginning."""
    old = read_manifest(folder)
    if old is None:
        _require_no_others(folder)
    elif not extends(old, manifest):
        require_same(folder, old, manifest)


def _require_no_others(folder: Path) -> None:
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file, expected a folder. Choose another --out.")
        return
    others = [path.name for path in folder.iterdir() if path.name not in _OURS and not is_temporary(path)]
    if others:
        raise UserError(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}). Give a new or empty folder as --out."
        )


def _prepare(folder: Path, manifest: Manifest) -> None:
    for name in (_ROOT, _SHARDS, _EXAMPLES):
        make_folder(folder / name)
        remove_strays(folder / name)
    publish_manifest(folder, manifest)


def _require_planned(content: ShardContent, planned: PlannedShard, manifest: Manifest) -> None:
    rows = planned.rows
    if not np.array_equal(content.example.cpu().numpy(), rows):
        raise ValueError(f"shard {planned.number} was computed with other rows than planned")
    shape = (len(rows), manifest.width)
    if content.gradients.shape != shape or not len(content.loss) == len(content.norm) == len(rows):
        raise ValueError(f"shard {planned.number} has shape {tuple(content.gradients.shape)}, expected {shape}")


@final
class _Hidden(AbstractContextManager[Progress]):
    """A progress that nobody watches."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        """Show nothing."""


def _shown(total: int, progress: bool) -> AbstractContextManager[Progress]:
    return show_progress(total, "Indexing") if progress and total else _Hidden()
