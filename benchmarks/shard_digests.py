"""What it costs to compare every shard of an index with its sha256 while the index is scanned.

Writes an index of about a gigabyte of random gradients, then scores it for a few queries, with and without the
comparison in turns, each in a process of its own. Type: python benchmarks/shard_digests.py [--gigabytes 1] [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vestige.data import Example
from vestige.indexes import (
    CompressionIdentity,
    DataIdentity,
    Index,
    IndexedComponent,
    IndexWork,
    Manifest,
    ModelIdentity,
    ShardContent,
    plan_index,
    prepare_index,
)
from vestige.jobs import run_pieces
from vestige.settings import LaunchSettings

WIDTH = 8192
QUERIES = (1, 64)


def main() -> None:
    """Print the seconds of both scans and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scan", help="internal: FOLDER,QUERIES,CHECKED")
    asked = parser.parse_args()
    if asked.scan:
        folder, queries, checked = asked.scan.split(",")
        scan(Path(folder), int(queries), checked == "yes")
        return
    with tempfile.TemporaryDirectory() as folder:
        made = write(Path(folder) / "index", int(asked.gigabytes * 1e9) // (2 * WIDTH))
        size = sum(path.stat().st_size for path in (made / "shards").iterdir())
        print(f"{size / 1e9:.2f} GB in {len(list((made / 'shards').glob('*.safetensors')))} shards", flush=True)
        for queries in QUERIES:
            compare(made, queries, asked.rounds)


def write(folder: Path, rows: int) -> Path:
    """Write an index of random gradients."""
    column = IndexedComponent(name="w", kind="linear", shape=(WIDTH, 1), start=0, stop=WIDTH)
    draft = Manifest(
        model=ModelIdentity(name="none", fingerprint="0"),
        data=DataIdentity(name="none", fingerprint="0", examples=rows),
        compression=CompressionIdentity(spec="none"),
        seed=0,
        loss="sum",
        precision="float32",
        max_length=None,
        chat=False,
        token_budget=1024,
        components=(column,),
    )
    lengths = np.full(rows, 64)
    manifest, plan = plan_index(folder, draft, lengths, lambda start, stop: f"{start}-{stop}")
    draw = torch.Generator().manual_seed(0)

    def parts(batches):
        for batch in batches:
            gradients = torch.randn(len(batch), WIDTH, generator=draw)
            yield ShardContent(gradients, torch.ones(len(batch)), gradients.norm(dim=1), torch.as_tensor(batch))

    @contextmanager
    def compute():
        yield parts

    examples = [Example(str(row), row, text="") for row in range(rows)]
    work = IndexWork(folder, manifest, plan, examples, compute)
    prepare_index(work)
    run_pieces(work.pieces, LaunchSettings.model_validate({}), None)
    return folder


def compare(folder: Path, queries: int, rounds: int) -> None:
    """Time both scans in turns."""
    seconds: dict[str, list[float]] = {"yes": [], "no": []}
    for _ in range(rounds):
        for checked, times in seconds.items():
            words = [sys.executable, __file__, "--scan", f"{folder},{queries},{checked}"]
            times.append(float(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    ratios = [one / other for one, other in zip(seconds["yes"], seconds["no"], strict=True)]
    print(
        f"{queries} queries: {statistics.median(seconds['yes']):.2f} s with, {statistics.median(seconds['no']):.2f} s "
        f"without; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def scan(folder: Path, queries: int, checked: bool) -> None:
    """Print the seconds of one scan."""
    if not checked:
        from vestige.indexes import _shards, _store

        whole = _store.map_shard
        assert whole is _shards.map_shard
        _store.map_shard = lambda folder, number: whole(folder, number, checked=False)
    asked = torch.randn(queries, WIDTH)
    index = Index.open(folder)
    started = time.perf_counter()
    for block in index.blocks():
        asked @ block.gradients.T
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
