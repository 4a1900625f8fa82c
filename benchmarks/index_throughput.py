"""How fast `vestige index` is, measured against the model's own passes and the peer bergson.

    python benchmarks/index_throughput.py [--bergson-python PEER/bin/python] [--quick] [--json results.json]

One thread on one core. In every round each engine runs once over the same examples, one engine after the other, so
that whatever else the machine does meets all of them. The main number is CPU time.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import measure

measure.pin(int(sys.argv[sys.argv.index("--core") + 1]) if "--core" in sys.argv else None)
os.environ["VESTIGE_QUIET"] = "1"

import baselines  # noqa: E402 - torch reads the number of threads when it is imported
import numpy as np  # noqa: E402
import torch  # noqa: E402
import vestige_engine  # noqa: E402
from bergson_peer import Bergson, bergson_command, run_command  # noqa: E402
from measure import Measurement  # noqa: E402
from tables import aligned, ratio, table  # noqa: E402
from workload import Workload, draw_tokens, draw_workloads, make_model, make_tokenizer, save  # noqa: E402

QUERIES = 16
LOGRA, MASK, DEFAULT = "logra:16x16", "mask:32x32 | sjlt:256", "tensorsketch:256"
PLAIN, FLOOR = "forward + backward, all weight gradients", "forward + backward, frozen weights (floor)"
SORTED_PLAIN, SORTED_FLOOR = "all weight gradients, sorted by length", "frozen weights, sorted by length"
OURS, PEER = f"vestige index {LOGRA}", "bergson build, projection 16"
OURS_EXACT, PEER_EXACT = "vestige exact scores, 16 queries", "bergson exact scores, 16 queries"
TITLES = {
    "equal": "128 tokens each; baselines in batches of 16",
    "uneven": "16 to 256 tokens; baselines in batches of 16 in the order of the data, padded",
    "masked": "16 to 256 tokens, the first half a prompt without labels; batches as above",
}


@dataclass(frozen=True)
class Engine:
    """One line of the table."""

    name: str
    run: Callable[[Workload], Measurement]
    only: tuple[str, ...] = ("equal", "uneven", "masked")
    has_fixed_cost: bool = False
    """Whether a call costs something even for one short example."""


class Bench:
    """The engines on one model; knows where files go."""

    def __init__(self, folder: Path, bergson: Bergson | None, queries: Workload) -> None:
        self._folder, self._bergson, self._queries = folder, bergson, queries
        self._model, self._tokenizer = make_model(), make_tokenizer()
        self.exact: dict[str, dict[str, np.ndarray]] = {"vestige": {}, "bergson": {}}
        self._runs = 0

    @property
    def engines(self) -> list[Engine]:
        """All engines, in the order of the table."""
        everywhere = ("equal", "uneven", "masked")
        peer = [
            Engine(PEER, self._build_peer, everywhere, True),
            Engine(PEER_EXACT, self._score_peer, ("equal", "uneven")),
        ]
        return [
            Engine(PLAIN, self._passes(baselines.plain)),
            Engine(SORTED_PLAIN, self._passes(baselines.plain, by_length=True), ("uneven",)),
            Engine(FLOOR, self._passes(baselines.floor)),
            Engine("frozen weights, batches of 8", self._passes(baselines.floor, size=8), ("equal",)),
            Engine(SORTED_FLOOR, self._passes(baselines.floor, by_length=True), ("uneven", "masked")),
            Engine("forward only", self._passes(baselines.forward)),
            Engine(f"{OURS}, batches of 16", self._build(LOGRA, 16 * 128), ("equal",), True),
            Engine(OURS, self._build(LOGRA), everywhere, True),
            Engine(f"vestige index {MASK}", self._build(MASK), everywhere, True),
            Engine(f"vestige index {DEFAULT} (default)", self._build(DEFAULT), everywhere, True),
            *(peer[:1] if self._bergson else []),
            Engine(OURS_EXACT, self._score, ("equal", "uneven")),
            *(peer[1:] if self._bergson else []),
        ]

    def _passes(self, passes: Callable[..., None], **options: object) -> Callable[[Workload], Measurement]:
        return lambda workload: measure.measure(lambda: passes(self._model, workload, **options))

    def _build(self, spec: str, token_budget: int | None = None) -> Callable[[Workload], Measurement]:
        return lambda workload: vestige_engine.build(
            self._model, self._tokenizer, workload, self._new(), compress=spec, token_budget=token_budget
        )

    def _score(self, workload: Workload) -> Measurement:
        _, cost, scores = vestige_engine.score_exactly(self._model, self._tokenizer, workload, self._queries)
        self.exact["vestige"][workload.name] = scores
        return cost

    def _build_peer(self, workload: Workload) -> Measurement:
        assert self._bergson is not None
        return self._bergson.build(workload.name, self._new())

    def _score_peer(self, workload: Workload) -> Measurement:
        assert self._bergson is not None
        out = self._new()
        cost = self._bergson.score(workload.name, self._queries.name, out)
        self.exact["bergson"][workload.name] = np.load(f"{out}.npy")
        return cost

    def _new(self) -> Path:
        self._runs += 1
        return self._folder / f"run-{self._runs}"


def main() -> None:
    """Measure, and print the tables."""
    options = _options()
    torch.set_num_threads(1)
    workloads = draw_workloads(options.examples)
    queries = Workload("queries", draw_tokens([128] * QUERIES, np.random.default_rng(7)), [0] * QUERIES)
    one = Workload("one", draw_tokens([16], np.random.default_rng(8)), [0])
    warm = {f"warm-{name}": workload for name, workload in draw_workloads(2, seed=2).items()}
    with tempfile.TemporaryDirectory(prefix="vestige-benchmark-") as name:
        folder = Path(name)
        save(folder, make_model(), {**workloads, **warm, "queries": queries, "one": one})
        with _peer(options, folder) as bergson:
            bench = Bench(folder, bergson, queries)
            _warm_up(bench, warm)
            results = _measured(bench, {**workloads, "one": one}, options.rounds)
        _show(results, bench, options)
        if not options.quick:
            _show_commands(options, folder, workloads["uneven"])
    if options.json:
        runs = {
            key: {name: [asdict(one) for one in runs] for name, runs in rows.items()} for key, rows in results.items()
        }
        options.json.write_text(json.dumps({"examples": options.examples, "results": runs}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bergson-python", help="interpreter of an environment that has bergson (see README.md)")
    parser.add_argument("--examples", type=int, default=64, help="examples per workload (64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the table shows medians (3)")
    parser.add_argument("--core", type=int, help="core to run on (the last one)")
    parser.add_argument("--quick", action="store_true", help="one round of few examples: does it run?")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    options = parser.parse_args()
    if options.quick:
        options.examples, options.rounds = 8, 1
    return options


@contextmanager
def _peer(options: argparse.Namespace, folder: Path) -> Iterator[Bergson | None]:
    if not options.bergson_python:
        print("No --bergson-python: the peer is left out.")
    with (
        Bergson(options.bergson_python, folder, measure.pinned_core())
        if options.bergson_python
        else nullcontext() as bergson
    ):
        yield bergson


def _warm_up(bench: Bench, warm: dict[str, Workload]) -> None:
    """Every engine once on a few examples, and Vestige must read the same tokens as the others."""
    for workload in warm.values():
        vestige_engine.check_tokens(workload, make_tokenizer())
    for engine in bench.engines:
        engine.run(next(iter(warm.values())))


def _measured(bench: Bench, workloads: dict[str, Workload], rounds: int) -> dict[str, dict[str, list[Measurement]]]:
    results: dict[str, dict[str, list[Measurement]]] = {name: {} for name in workloads}
    for number in range(rounds):
        for name, workload in workloads.items():
            for engine in bench.engines:
                if name in engine.only or (name == "one" and engine.has_fixed_cost):
                    results[name].setdefault(engine.name, []).append(engine.run(workload))
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return results


def _show(results: dict[str, dict[str, list[Measurement]]], bench: Bench, options: argparse.Namespace) -> None:
    fixed = {name: min(run.cpu_seconds for run in runs) for name, runs in results["one"].items()}
    print(f"\n{options.examples} examples, median of {options.rounds} rounds, one thread, torch {torch.__version__}.")
    for name, title in TITLES.items():
        rounds = results[name]
        floor = SORTED_FLOOR if SORTED_FLOOR in rounds else FLOOR
        bases = {"of plain": PLAIN, "of floor": FLOOR}
        if floor is SORTED_FLOOR:
            bases |= {"of sorted floor": floor}
        if PEER in rounds:
            bases |= {"of bergson": PEER}
        print(f"\n### {name}: {title}\n\n{table(rounds, options.examples, bases, fixed, floor)}")
    for name, ours in bench.exact["vestige"].items():
        if name in bench.exact["bergson"]:
            theirs = bench.exact["bergson"][name]
            difference = np.abs(ours - theirs).max() / np.ptp(theirs)
            print(f"\nExact scores, {name}: vestige and bergson differ by {difference:.1e} of the range at most.")
    shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in fixed.items())
    print(f"\nCPU-s of a call on one example of 16 tokens, which the long run leaves out: {shown}.")
    if PEER_EXACT in results["equal"]:
        print(f"\nExact scoring, vestige over bergson: {ratio(results['equal'], OURS_EXACT, PEER_EXACT):.2f}")


def _show_commands(options: argparse.Namespace, folder: Path, workload: Workload) -> None:
    """The command lines once each, from start to exit."""
    data, model = str(folder / f"{workload.name}.jsonl"), str(folder / "model")
    arguments = ["--model", model, "--data", data, "--out", str(folder / "ours"), "--compress", LOGRA]
    ours = [
        sys.executable,
        "-m",
        "vestige.cli",
        "index",
        *arguments,
        "--components",
        "attention",
        "--components",
        "mlp",
    ]
    commands = {"vestige index": (ours, folder / "ours")}
    if options.bergson_python:
        theirs = bergson_command(options.bergson_python, folder, workload.name, folder / "theirs")
        commands["bergson build"] = (theirs, folder / "theirs")
    lines = [["command, start to exit", "CPU-s", "s", "kB / ex."], [":--", *["--:"] * 3]]
    for name, (command, leaves) in commands.items():
        cost = run_command(command, leaves)
        numbers = (cost.cpu_seconds, cost.wall_seconds, cost.disk_bytes / 1e3 / options.examples)
        lines.append([name, *(f"{number:.1f}" for number in numbers)])
    print(f"\n### Command lines on {workload.name}, once\n\n{aligned(lines)}")


if __name__ == "__main__":
    main()
