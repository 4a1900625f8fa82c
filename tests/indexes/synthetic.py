"""A small index whose gradients are a known function of the row, computed without any model."""

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from vestige.data import Example, Message
from vestige.errors import WorkElsewhere
from vestige.indexes import (
    CompressionIdentity,
    DataIdentity,
    IndexedComponent,
    IndexWork,
    Manifest,
    ModelIdentity,
    Plan,
    PlannedBatches,
    PlanRecord,
    ShardContent,
    plan_index,
    prepare_index,
)
from vestige.jobs import run_pieces
from vestige.settings import LaunchSettings

WIDTH = 24
COMPONENTS = (
    IndexedComponent(name="first.weight", kind="linear", shape=(8, 6), start=0, stop=16),
    IndexedComponent(name="second.weight", kind="linear", shape=(6, 8), start=16, stop=WIDTH),
)


def draft(examples: int = 60, **changes) -> Manifest:
    settings = {
        "model": ModelIdentity(name="tiny", fingerprint="m" * 64),
        "data": DataIdentity(name="pairs.jsonl", fingerprint=f"{examples:064d}", examples=examples),
        "compression": CompressionIdentity(spec="logra:4x4"),
        "seed": 0,
        "dtype": "float16",
        "loss": "sum",
        "precision": "float32",
        "max_length": 128,
        "chat": False,
        "token_budget": 300,
        "components": COMPONENTS,
        "plan": PlanRecord(fewest_shards=8),
    }
    return Manifest(**(settings | changes))


def lengths_of(examples: int) -> np.ndarray:
    # Each row by its own seed, so that more examples leave the first ones as they are.
    return np.array([np.random.default_rng(row).integers(5, 100) for row in range(examples)], dtype=np.int64)


def fingerprint_of(start: int, stop: int) -> str:
    return hashlib.sha256(str(list(range(start, stop))).encode()).hexdigest()


def gradient_rows(rows: np.ndarray, width: int = WIDTH) -> torch.Tensor:
    """Rows of very different sizes: what a per-row scale is for."""
    one_by_one = [np.random.default_rng(int(row)).standard_normal(width) * 10.0 ** (row % 7 - 3) for row in rows]
    return torch.from_numpy(np.array(one_by_one, dtype=np.float32))


def content(rows: np.ndarray) -> ShardContent:
    gradients = gradient_rows(rows)
    numbers = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return ShardContent(gradients, numbers.float() / 8, gradients.norm(dim=1), numbers)


def compute(batches: PlannedBatches) -> list[ShardContent]:
    return [content(np.concatenate(list(batches)))]


def examples_of(count: int) -> list[Example]:
    return [
        Example(id=f"e{row}", row=row, prompt=f"question {row}", completion="answer", source="a" if row % 2 else "b")
        if row % 3
        else Example(id=f"e{row}", row=row, messages=(Message("user", "hi"), Message("assistant", f"no. {row}")))
        for row in range(count)
    ]


def planned(folder: Path, examples: int = 60, *, append: bool = False, **changes) -> tuple[Manifest, Plan]:
    return plan_index(folder, draft(examples, **changes), lengths_of(examples), fingerprint_of, append=append)


def work_of(
    folder: Path,
    examples: int = 60,
    *,
    append: bool = False,
    compute: Callable[[PlannedBatches], Iterable[ShardContent]] = compute,
    skip_bad: bool = False,
    **changes,
) -> IndexWork:
    manifest, plan = planned(folder, examples, append=append, **changes)
    return IndexWork(folder, manifest, plan, examples_of(examples), lambda: nullcontext(compute), skip_bad=skip_bad)


def build(folder: Path, examples: int = 60, *, shard: tuple[int, int] | None = None, **options) -> list[int]:
    """Build or continue the index in `folder`; the numbers of the shards that were computed."""
    settings = LaunchSettings(shard=f"{shard[0] + 1}/{shard[1]}" if shard else None)
    work = work_of(folder, examples, **options)
    missing = prepare_index(work)
    with suppress(WorkElsewhere):
        run_pieces(work.pieces, settings, None)
    return [number for number in missing if work.fault(number) is None]


def build_slowly(folder: Path, log: Path, seconds: float, examples: int, plan: PlanRecord) -> None:
    """Build, noting in `log` the first row of each shard whose computation begins."""

    def noted(batches: PlannedBatches) -> list[ShardContent]:
        with log.open("a") as file:
            file.write(f"{batches[0][0]}\n")
        time.sleep(seconds)
        return compute(batches)

    torch.set_num_threads(1)
    build(folder, examples, compute=noted, plan=plan)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # What the job left beside the index tells of times and hosts.
    files = [path for path in files if path.relative_to(folder).parts[0] != "launch"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
