"""What a scan of an index costs beside `torch.mm` on the same memory-mapped bytes.

Writes an index of random gradients in float16, then multiplies all of it with a few queries: by `torch.mm` alone with
queries in float16 (the floor: its scores have three digits), by `torch.mm` on shards converted to float32, and by
`Index.scan`, in turns in one process. Its first scan also compares every byte with the shards' sha256.

    python benchmarks/scan.py [--gigabytes 1.3] [--width 16384] [--queries 16] [--rounds 5]
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from measure import Measurement, measure, pin

pin()

import numpy as np  # noqa: E402 - torch reads the number of threads when it is imported
import torch  # noqa: E402

from vestige.data import Example  # noqa: E402
from vestige.indexes import (  # noqa: E402
    CompressionIdentity,
    DataIdentity,
    Index,
    IndexedComponent,
    IndexWork,
    Manifest,
    ModelIdentity,
    ShardContent,
    map_shard,
    plan_index,
    prepare_index,
)
from vestige.jobs import run_pieces  # noqa: E402
from vestige.settings import LaunchSettings  # noqa: E402


def main() -> None:
    """Print the seconds of each way, and their ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = write(Path(folder) / "index", int(asked.gigabytes * 1e9) // (2 * asked.width), asked.width)
        size = sum(path.stat().st_size for path in (made / "shards").iterdir())
        print(f"{size / 1e9:.2f} GB in {len(list((made / 'shards').glob('*.safetensors')))} shards", flush=True)
        compare(Index.open(made), torch.randn(asked.queries, asked.width), asked.rounds)


def write(folder: Path, rows: int, width: int) -> Path:
    """Write an index of random gradients."""
    column = IndexedComponent(name="w", kind="linear", shape=(width, 1), start=0, stop=width)
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
            gradients = torch.randn(len(batch), width, generator=draw)
            yield ShardContent(gradients, torch.ones(len(batch)), gradients.norm(dim=1), torch.as_tensor(batch))

    @contextmanager
    def compute():
        yield parts

    examples = [Example(str(row), row, text="") for row in range(rows)]
    work = IndexWork(folder, manifest, plan, examples, compute)
    prepare_index(work)
    run_pieces(work.pieces, LaunchSettings.model_validate({}), None)
    return folder


def compare(index: Index, queries: torch.Tensor, rounds: int) -> None:
    """Measure every way in turns."""
    half, shards = queries.half(), range(len(index.manifest.shard_rows))

    def stored(number: int) -> torch.Tensor:
        return map_shard(index.folder, number, checked=False).gradients

    ways: dict[str, Callable[[], object]] = {
        "torch.mm, float16": lambda: [torch.mm(half, stored(number).T) for number in shards],
        "torch.mm, float32": lambda: [torch.mm(queries, stored(number).float().T) for number in shards],
        "scan": lambda: [scores for _, scores, _ in index.scan(queries)],
    }
    first = measure(ways["scan"])
    found: dict[str, list[Measurement]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(measure(work))
    floor = found["torch.mm, float16"]
    for name, runs in found.items():
        ratios = [one.cpu_seconds / base.cpu_seconds for one, base in zip(runs, floor, strict=True)]
        print(
            f"{name}: {median(one.cpu_seconds for one in runs):.3f} CPU-s, "
            f"{median(one.wall_seconds for one in runs):.3f} "
            f"s; {median(ratios):.2f} of the floor ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"the first scan, with sha256: {first.cpu_seconds:.3f} CPU-s, {first.wall_seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
