"""What `run_pieces` costs beside a plain loop over the pieces, and what a second worker process brings.

    python benchmarks/jobs.py [--examples 600] [--rounds 3] [--keep FOLDER]

Both compute the shards of one index of the benchmark's model (see README.md). The loop writes the same shards without
journal or record; the last line of the first table computes and writes nothing. On a machine whose speed strays, the
time between pieces says more than the ratios of whole runs.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "VESTIGE_QUIET": "1", "HF_HUB_OFFLINE": "1"}

SETTINGS = {"compress": "tensorsketch:256", "token_budget": 2048}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the files here, and leave them")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="vestige-jobs-"))

    from workload import draw_workloads, make_model, save

    save(folder, make_model(), {"uneven": draw_workloads(given.examples)["uneven"]})
    overhead(folder, given.rounds)
    scaling(folder, given.rounds)
    if not given.keep:
        shutil.rmtree(folder)


class Clocks(NamedTuple):
    """Seconds of a way to make the shards."""

    wall: float
    processor: float
    between: float
    """Wall seconds in which no piece was at work."""


def overhead(folder: Path, rounds: int) -> None:
    """Seconds of the same shards by a plain loop, by `run_pieces`, and without writing them."""
    import torch

    import vestige
    from vestige.indexes import _build as build
    from vestige.jobs import run_pieces

    torch.set_num_threads(1)
    found: dict[str, list[Clocks]] = {"loop": [], "jobs": [], "nothing written": []}
    pieces, index = [], []

    def measured(plan: Any, settings: Any, command: Any) -> Any:
        pieces.append(plan.count)
        inside: list[float] = []
        timed = time_pieces(plan, inside)
        works = [
            ("loop", lambda: loop(timed)),
            ("jobs", lambda: run_pieces(timed, settings, command)),
            ("nothing written", lambda: unwritten(index[0])),
        ]
        unwritten(index[0])
        for number in range(rounds):
            # Each comes first, second and last as often as the others.
            for name, work in works[number % 3 :] + works[: number % 3]:
                empty(settings.out)
                inside.clear()
                found[name].append(clocks(work, inside))
        return run_pieces(plan, settings, command)

    def noted(*arguments: Any, **options: Any) -> Any:
        index.append(make(*arguments, **options))
        return index[-1]

    original, make = build.run_pieces, build.IndexWork
    build.run_pieces, build.IndexWork = measured, noted
    try:
        vestige.index(model=str(folder / "model"), data=str(folder / "uneven.jsonl"), out=folder / "one", **SETTINGS)
    finally:
        build.run_pieces, build.IndexWork = original, make
    print(f"{pieces[0]} pieces, {rounds} rounds, one thread; ratios are medians of the ratios within a round\n")
    print("| | wall seconds | CPU seconds | wall, of the loop | CPU, of the loop | seconds between pieces |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for name, seconds in found.items():
        pairs = list(zip(seconds, found["loop"], strict=True))
        numbers = [statistics.median(one[clock] for one in seconds) for clock in (0, 1)]
        ratios = [statistics.median(one[clock] / other[clock] for one, other in pairs) for clock in (0, 1)]
        between = "" if name == "nothing written" else f"{statistics.median(one.between for one in seconds):.3f}"
        print(f"| {name} | {numbers[0]:.2f} | {numbers[1]:.2f} | {ratios[0]:.4f} | {ratios[1]:.4f} | {between} |")
    both = zip(found["jobs"], found["loop"], strict=True)
    shares = [(plan.between - loop.between) / loop.wall for plan, loop in both]
    shown = ", ".join(f"{share:.2%}" for share in shares)
    print(f"\nBetween pieces the job needs {statistics.median(shares):.2%} of the loop's time beyond it ({shown}).")


def time_pieces(pieces: Any, inside: list[float]) -> Any:
    """The same pieces; `inside` gets the seconds of each, its rows' computing and writing."""

    @contextmanager
    def opened() -> Iterator[Callable[[int], None]]:
        with pieces.open() as compute:

            def noted(piece: int) -> None:
                started = time.perf_counter()
                compute(piece)
                inside.append(time.perf_counter() - started)

            yield noted

    return dataclasses.replace(pieces, open=opened)


def clocks(work: Callable[[], object], inside: list[float]) -> Clocks:
    """What the work takes; `inside` has the seconds of its pieces afterwards."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Clocks(wall, processor, wall - sum(inside))


def loop(pieces: Any) -> None:
    """Every piece, one after another."""
    with pieces.open() as compute:
        for piece in range(pieces.count):
            compute(piece)


def unwritten(plan: Any) -> None:
    """Every piece's rows, which are dropped."""
    from vestige.indexes import PlannedBatches

    with plan.compute() as compute:
        for shard in plan.plan.shards:
            # The parts of a shard are computed as they are asked for.
            for _ in compute(PlannedBatches(shard.batches)):
                pass


def empty(index: Path) -> None:
    """No shard is there, nor any record of work."""
    shutil.rmtree(index / "launch", ignore_errors=True)
    for path in (index / "shards").iterdir():
        path.unlink()


def scaling(folder: Path, rounds: int) -> None:
    """Whole commands, from their start to their end, with one worker process and with two."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    steady: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in seconds:
            out = folder / f"workers-{workers}"
            shutil.rmtree(out, ignore_errors=True)
            words = [
                "index",
                "--model",
                str(folder / "model"),
                "--data",
                str(folder / "uneven.jsonl"),
                "--out",
                str(out),
            ]
            words += ["--compress", SETTINGS["compress"], "--token-budget", str(SETTINGS["token_budget"])]
            started = time.perf_counter()
            command = [sys.executable, "-m", "vestige.cli", *words, "--workers", str(workers)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[workers].append(time.perf_counter() - started)
            steady[workers].append(working_seconds(out))
    print(
        "\n| workers | wall seconds of the command | wall seconds from the first piece's start to the last one's end |"
    )
    print("| --: | --: | --: |")
    for workers in seconds:
        print(f"| {workers} | {statistics.median(seconds[workers]):.1f} | {statistics.median(steady[workers]):.1f} |")
    for name, both in (("command", seconds), ("pieces", steady)):
        ratio = statistics.median(one / two for one, two in zip(both[1], both[2], strict=True))
        print(f"\nTwo workers are {ratio:.2f} times as fast as one ({name}).")


def working_seconds(index: Path) -> float:
    """From when the first piece was begun until the last one was done, as the workers' journals say."""
    from vestige.jobs import JobFolder

    entries = [entry for entry in JobFolder.of(index, "Indexing").entries() if entry.piece >= 0]
    return max(entry.ended for entry in entries) - min(entry.ended - entry.seconds for entry in entries)


if __name__ == "__main__":
    main()
