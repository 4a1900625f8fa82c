"""The folder of an index: prepared before shards are computed, inspected while they are, removed.

Nothing on disk changes before the settings were compared and the free space was checked. After that the markers are
the truth: a run that is killed at any moment, on any of several hosts, loses the shards in flight and nothing else.
"""

from pathlib import Path
from typing import NamedTuple

from vestige.indexes._difference import extends, publish_manifest, require_same
from vestige.indexes._examples import write_examples
from vestige.indexes._manifest import Manifest, expected_shards, manifest_path, read_manifest
from vestige.indexes._plan import check_plan
from vestige.indexes._shards import marker_path, shard_fault, shard_path
from vestige.indexes._work import IndexPlan
from vestige.launch import JOB_FILES, PROFILE_FILE
from vestige.storage import check_disk, make_folder, remove_durably, remove_result, remove_strays, require_no_others

TOKENS = "tokens"
"""Folder of the tokens of data that does not fit into memory, made before there is a manifest."""
_BEGUN = (f"{TOKENS}/{'[0-9a-f]' * 16}", *JOB_FILES)
"""What there may be before there is a manifest."""
_OURS = (
    "manifest.json",
    *(f"shards/[0-9]*.{kind}" for kind in ("safetensors", "json")),
    "examples/[0-9]*.parquet",
    *(f"curvature/{name}" for name in ("fisher-*", "kfac-*", "ekfac-*", PROFILE_FILE)),
    PROFILE_FILE,
    *_BEGUN,
)
_ROOT, _SHARDS, _EXAMPLES = ".", "shards", "examples"


class IndexStatus(NamedTuple):
    """The progress of an index."""

    done: int
    """Shards whose marker is there and whose file has the right size."""
    total: int
    bytes: int
    """Size of the finished shards."""
    rows: int
    """Examples in the finished shards."""


def prepare_index(work: IndexPlan) -> list[int]:
    """Prepare the folder: write manifest and examples; whatever was damaged no longer counts as done.

    Returns:
        Numbers of the shards that are missing.

    Raises:
        IndexMismatch: The index in the folder was made with other settings; nothing was touched.
        DiskSpaceError: It would not, or does not, fit.
        UserError: The folder holds other files, or cannot be written to.
    """
    folder, manifest, expected = work.folder, work.manifest, work.expected
    _require_usable(folder, manifest)
    check_plan(folder, manifest, work.plan)
    missing = [number for number in range(work.pieces) if shard_fault(folder, number, expected[number], contents=True)]
    check_disk(folder, sum(expected[number].rows for number in missing) * manifest.row_bytes)
    for name in (_ROOT, _SHARDS, _EXAMPLES):
        make_folder(folder / name)
    remove_strays(folder)
    publish_manifest(folder, manifest)
    write_examples(folder, manifest, work.examples, work.plan.lengths)
    for number in missing:
        # A marker may vouch for a file of the right size and the wrong content. Other processes may be at work already:
        # what was missing a moment ago is checked again, or their finished shard would be forgotten.
        if work.is_done(number) and shard_fault(folder, number, expected[number], contents=True):
            remove_durably(marker_path(folder, number))
    return missing


def index_status(folder: Path) -> IndexStatus:
    """Return the progress of the index in `folder`, read from its markers; zero where there is no manifest."""
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
    """Remove the index in `folder`, for `--overwrite`; a folder without one is left alone, and so are tokens.

    Raises:
        UserError: The folder holds files that are not an index's.
    """
    # Tokens are known by what they were made from, and those of the next index are among them.
    remove_result(folder, _OURS, manifest_path(folder).name, begun=_BEGUN, keep=[TOKENS])


def _require_usable(folder: Path, manifest: Manifest) -> None:
    """Raise unless the folder is empty, absent, or holds this index or its beginning."""
    old = read_manifest(folder)
    if old is None:
        require_no_others(folder, _BEGUN)
    elif not extends(old, manifest):
        require_same(folder, old, manifest)
