"""Every registered attribution method on one bank of retrained models: what it predicts, and what it costs.

The bank has two parts, both without a row's weight and with the rest as it was: random halves, whose runs read the rows
in orders of their own, and random twentieths left out of the very training that is asked about, and of a second one.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vestige.banks import Bank, run_seed
from vestige.errors import UserError
from vestige.evaluate import Estimate, Lds, ceiling
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure, write_plainly
from vestige.indexes import Index, index
from vestige.jobs import PROFILE_FILE
from vestige.methods import METHODS, Method, attribute
from vestige.progress import announce
from vestige.runs import Scores, is_complete
from vestige.storage import write_durably
from vestige.training import TrainingRun, bank, train
from vestige_recipes.common.halves import judge_scores
from vestige_recipes.leaderboard.peer_rows import ask_peer, find_peers
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study, show_interval
from vestige_recipes.text_lds.run import TextPlan, prepare_texts

Options = dict[str, Any]
LineT = TypeVar("LineT")


@dataclass(frozen=True)
class BoardPlan:
    """One size of the leaderboard."""

    text: TextPlan
    """Texts, the model, how it is trained, and the number of halves."""
    drops: int
    """Random twentieths that are left out."""
    trainings: int
    """Whose scores are averaged for models trained like these."""
    warmup: int
    """Steps in which the learning rate rises: Adam's first steps follow signs, which no derivative sees."""
    options: Mapping[str, tuple[Options, ...]] = field(default_factory=dict)
    """Option sets of a method, a row of the table for each, in place of its defaults alone."""
    compress: tuple[str, ...] = ("tensorsketch:256",)
    """Indexes for the methods that read one."""
    draws: int = 1_000
    """Of the bootstrap, for each interval."""


_SHORT: dict[str, tuple[Options, ...]] = {
    "ekfac": ({}, {"refine": "cg:1"}),
    "cg": ({"steps": 2, "examples": 4},),
    "lissa": ({"depth": 2, "sample": 4},),
    "arnoldi": ({"steps": 3, "rank": 2, "examples": 4},),
}
PLANS = {
    "tiny": BoardPlan(
        TextPlan(16, 3, 1e-3, 8, 1, 1, (), width=8, layers=1, subjects=2, sequences=16, queries=3, before=64,
                 steps_before=4),
        drops=2, trainings=2, warmup=1, options=_SHORT, compress=("tensorsketch:16",), draws=20,
    ),
    # Two passes in 48 steps: replay is asked for a first derivative, which a longer training would bend more.
    "pocket": BoardPlan(
        TextPlan(64, 40, 1e-3, 16, 2, 2, (), subjects=24, sequences=384, queries=24, before=2_000, steps_before=1_000),
        drops=40, trainings=3, warmup=12,
        options={
            "ekfac": ({}, {"refine": "cg:3"}, {"refine": "neumann:8"}),
            "cg": ({"steps": 5, "examples": 96},),
            "lissa": ({"depth": 10, "sample": 48},),
            "arnoldi": ({"steps": 30, "rank": 15, "examples": 96},),
            "source": ({"segments": 2},),
        },
        compress=("tensorsketch:256", "tensorsketch:1024", "logra:32x32"),
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A row of the table before it is scored."""

    name: str
    arguments: dict[str, Any]
    stored: Path | None
    """Its index."""


class Line(NamedTuple):
    """What one row of the table shows."""

    name: str
    halves: Estimate
    same: Estimate
    other: Estimate
    before: float
    """Seconds for the index."""
    seconds: float
    memory: int
    row_bytes: int | None


COLUMNS = (
    *("method", "halves", "95 %", "drops, same run", "95 %", "drops, another run", "95 %"),
    *("index, s", "seconds", "memory, MB", "bytes a row"),
)
REPLAY_REACHES = 0.9
"""LDS of replay without a twentieth of the same run, expected."""
NEAR_EKFAC = 0.03
"""Within this of the LDS of streaming EK-FAC, its estimate from an index was expected."""


@register_study(PLANS)
def leaderboard(settings: StudySettings) -> Outcome:
    """How well every method predicts retraining on halves and without twentieths, and at what price."""
    plan, peers = PLANS[settings.size], find_peers(settings.peer)
    start, data, queries = prepare_texts(settings, plan.text)
    halves, drops = _make_banks(settings, plan, start, data, queries)
    trained = [train_whole(settings, plan, start, data, number) for number in range(plan.trainings)]
    seeds = {"same": 0, "other": settings.seeds - 1}
    truths = {"halves": partial(judge_scores, truth=halves, draws=plan.draws)}
    for name, seed in seeds.items():
        truths[name] = partial(judge_scores, truth=drops, draws=plan.draws, members=drops.seeds == seed)
    lines, reasons = score_methods(settings, plan, trained, data, queries, partial(_read_line, truths))
    for peer in peers:
        rows, missing = ask_peer(peer, settings.out / "peers", _last(trained[0]), data, queries)
        reasons |= missing
        for row in rows:
            judged = {name: judge(row.scores).estimate for name, judge in truths.items()}
            lines.append(Line(row.name, **judged, before=0.0, seconds=row.seconds, memory=row.memory, row_bytes=None))
    for name, reason in reasons.items():
        announce(f"{name} is not on the board: {reason}")
    limits = [ceiling(one.query_losses, one.subsets, one.seeds) for one in (halves, drops)]
    lines.sort(key=lambda line: -line.halves.value)
    for name, content in draw_prices(lines, limits[0].whole).items():
        write_durably(settings.out / name, [content])
    top = ("noise ceiling", limits[0].whole, "", 1.0, "", limits[1].half, *[""] * 5)
    return Outcome(
        COLUMNS,
        [top, *map(_cells, lines)],
        _gates(lines),
        {"plan": asdict(plan), "lines": [line._asdict() for line in lines], "not_on_the_board": reasons},
    )


def _make_banks(settings: StudySettings, plan: BoardPlan, start: str, data: Path, queries: Path) -> tuple[Bank, Bank]:
    common: dict[str, Any] = {
        **{"model": start, "data": str(data), "queries": str(queries), "seeds": settings.seeds, "seed": settings.seed},
        **{"drop_by": "weight", **learning_arguments(plan)},
        **settings.launch_arguments,
    }
    halves = bank(out=settings.out / "halves", subsets=plan.text.subsets, **common)
    random = np.random.default_rng(settings.seed)
    count = max(1, len(halves.example_ids) // 20)
    lists = [random.choice(halves.example_ids, count, replace=False).tolist() for _ in range(plan.drops)]
    return halves, bank(out=settings.out / "drops", leave_out_lists=lists, **common)


def learning_arguments(plan: BoardPlan) -> dict[str, Any]:
    """Return how every model of a board is trained."""
    text = plan.text
    rates = {"learning_rate": text.learning_rate, "warmup": plan.warmup}
    return {"epochs": text.epochs, "batch_size": text.batch_size, **rates}


def train_whole(settings: StudySettings, plan: BoardPlan, start: str, data: Path, number: int) -> TrainingRun:
    """Return a training on everything; the first is the one that the drops were left out of, seed and all.

    The others are none of the bank's: the orders of their rows are drawn behind those of its seeds.
    """
    seed = run_seed(settings.seed, None, number if number == 0 else settings.seeds + number)
    out, points = settings.out / f"training-{number}", ",".join(map(str, range(plan.text.epochs + 1)))
    return train(
        model=start, data=str(data), out=out, checkpoints=points, losses=False, seed=seed, **learning_arguments(plan)
    )


def score_methods(
    settings: StudySettings,
    plan: BoardPlan,
    trained: list[TrainingRun],
    data: Path,
    queries: Path,
    judge: Callable[[Entry, Scores], LineT],
) -> tuple[list[LineT], dict[str, str]]:
    """Return a line for each row of every registered method, and why others have none."""
    lines, reasons = list[LineT](), dict[str, str]()
    for found in METHODS:
        for entry in _entries(settings, plan, found, trained, data):
            try:
                lines.append(judge(entry, _score(settings, entry, queries)))
            except UserError as error:
                reasons[entry.name] = str(error)
        if found.command != Method.command:
            reasons[found.name] = f"it has a command of its own: vestige {found.command}"
    return lines, reasons


def _entries(
    settings: StudySettings, plan: BoardPlan, found: type[Method], trained: list[TrainingRun], data: Path
) -> Iterator[Entry]:
    """Yield the rows of a method, by what it says it needs."""
    if found.command != Method.command:
        return
    folders = [str(run.folder) for run in trained]
    first, model = trained[0].checkpoints, _last(trained[0])
    for options in plan.options.get(found.name, ({},)):
        name = " ".join([found.name, *(f"{key}={value}" for key, value in options.items())])
        common: dict[str, Any] = {"method": found.name, "options": options}
        if found.needs_training:
            yield Entry(name, common | {"training": folders[:1]}, None)
            if len(folders) > 1:
                yield Entry(f"{name}, mean of {len(folders)} runs", common | {"training": folders}, None)
        elif found.weighting is not None:
            points = [str(first[step]) for step in sorted(first) if step > 0]
            yield Entry(name, common | {"checkpoints": points, "data": str(data)}, None)
        elif found.needs_index:
            for number, spec in enumerate(plan.compress):
                made = settings.out / "indexes" / str(number)
                # Called again, it would be measured again, and have nothing left to do.
                if not (made / PROFILE_FILE).exists():
                    launched = settings.launch_arguments
                    index(out=made, profile=True, model=model, data=str(data), compress=spec, **launched)
                yield Entry(f"{name}, {spec}", common | {"index": str(made)}, made)
        else:
            yield Entry(name, common | {"model": model, "data": str(data)}, None)


def _last(run: TrainingRun) -> str:
    """Return the folder of the trained model."""
    return str(run.checkpoints[max(run.checkpoints)])


def _score(settings: StudySettings, entry: Entry, queries: Path) -> Scores:
    """Return the scores of a row of the table, made by a process of its own: its peak memory is that of nothing else.

    Raises:
        UserError: The method cannot score this bank; the message says why.
    """
    out = settings.out / "runs" / re.sub(r"[^\w=.-]+", "-", entry.name)
    if not is_complete(out):
        common = {"queries": str(queries), "out": out, "dense": True, "trust": False, "seed": settings.seed}
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", __name__])
        with ProcessPoolExecutor(1, context) as pool:
            if reason := pool.submit(_attribute, entry.arguments | common).result():
                raise UserError(reason)
    return Scores.open(out)


def _read_line(truths: Mapping[str, Callable[[np.ndarray], Lds]], entry: Entry, scores: Scores) -> Line:
    record, before, width = scores.run, 0.0, None
    if entry.stored is not None:
        before = json.loads((entry.stored / PROFILE_FILE).read_text())["total_seconds"]
        width = Index.open(entry.stored).manifest.row_bytes
    judged = {name: judge(scores.dense()).estimate for name, judge in truths.items()}
    costs = {"before": before, "seconds": record.seconds, "memory": record.peak_memory_bytes, "row_bytes": width}
    return Line(entry.name, **judged, **costs)


def _attribute(arguments: dict[str, Any]) -> str | None:
    """Return why a run cannot be made, None once it is there."""
    try:
        attribute(**arguments)
    except UserError as error:
        return str(error)
    return None


def _cells(line: Line) -> tuple[Any, ...]:
    judged = [cell for one in (line.halves, line.same, line.other) for cell in (one.value, show_interval(one))]
    return (line.name, *judged, line.before, line.seconds, line.memory // 10**6, line.row_bytes or "")


def _gates(lines: list[Line]) -> list[Gate]:
    """Return what was expected, of the rows that there are."""
    found, gates = {line.name: line for line in lines}, list[Gate]()
    exact, one = found["ekfac"], found.get("replay")
    for name, line in found.items():
        gain = line.halves.value - exact.halves.value
        if name.startswith("ekfac refine="):
            gates.append(Gate(f"{name}: LDS on halves above that of ekfac by", gain, ">="))
        elif name.startswith("ekfac-index"):
            gates.append(Gate(f"{name}: LDS on halves above that of ekfac by", gain, ">=", -NEAR_EKFAC))
        elif name == "replay":
            gates.append(Gate("replay: LDS of drops, same run", line.same.value, ">=", REPLAY_REACHES))
            gates.append(
                Gate("replay: its interval there above that of ekfac by", line.same.low - exact.same.high, ">=")
            )
        elif name.startswith("replay, mean") and one is not None:
            gain = line.halves.value - one.halves.value
            gates.append(Gate(f"{name}: LDS on halves above that of one run by", gain, ">="))
    return gates


def draw_prices(lines: list[Line], limit: float) -> dict[str, bytes]:
    """Draw what every method predicts of halves over the seconds that it takes, index included."""
    figure, (axes,) = make_figure(8.0, 5.0)
    for line in lines:
        value, low, high = line.halves
        seconds = line.before + line.seconds
        axes.plot([seconds] * 2, [low, high], color=COLOURS[0], linewidth=2, alpha=0.4)
        axes.plot([seconds], [value], "o", color=COLOURS[0], markersize=5)
        axes.annotate(line.name, (seconds, value), (5, 3), textcoords="offset points", fontsize="x-small")
    axes.axhline(limit, color=COLOURS[1], linestyle=":", linewidth=1.3)
    axes.set_xscale("log")
    write_plainly(axes.xaxis, "%g")
    finish_axes(axes, "seconds from the trained model to all scores", "LDS on halves, 95 % intervals")
    return render_figure(figure, "leaderboard")
