"""Which tenth of a mixture of domains to train on for a held-out domain: every method against random data.

The selection experiment of LESS (Xia et al. 2024, arXiv:2402.04333) and of DATE-LM (2025) in small: a model that knows
other text is warmed up on a random tenth, scores are computed on it for some pieces of the target domain, the best
tenth of the mixture is chosen, the model trained on it from the start, and its loss measured on other pieces.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks import EVERYTHING, Bank
from vestige.evaluate import Gain, measure_gain, selection as compare
from vestige.methods import attribute
from vestige.selection import select
from vestige.training import Recipe
from vestige_recipes.common.texts import Row, byte_gpt, write_rows
from vestige_recipes.common.training import Checkpoints, Training, train_checkpoints
from vestige_recipes.domains.run import DOMAINS, domain_pieces
from vestige_recipes.studies import (
    Gate,
    Outcome,
    StudySettings,
    draw_intervals,
    keep_run,
    register_study,
    show_interval,
)

METHODS = ("influence", "grad-dot", "grad-cos", "less", "bm25", "rep-sim")
GATED = ("influence", "grad-cos", "less")
"""Of these at least random data was expected to be beaten."""
TARGET = "biomedicine"
"""Chosen before anything was measured."""
PARTS = {"target absent": False, "target in the mixture": True}
"""Whether the mixture holds pieces of the target domain, as many as of any other."""
_COLUMNS = (
    "mixture",
    "chosen by",
    "loss",
    "gain over random",
    "95 % interval",
    "over repetitions",
    "ahead",
    "of the target",
)
_SHARE = 10
"""Percent of the mixture that is chosen."""


@dataclass(frozen=True)
class SelectionPlan:
    """One size of the study."""

    length: int
    """Bytes of a piece."""
    pieces: int
    """In the mixture, of each domain."""
    before: int
    """Of each other domain, for the model that everything begins from."""
    steps_before: int
    asked: int
    """Pieces of the target that scores are computed for."""
    tests: int
    """Others, on which the trained models are compared."""
    passes: int
    """Over the chosen tenth."""
    checkpoints: int
    learning_rate: float = 1e-3
    batch_size: int = 16
    width: int = 64
    layers: int = 2
    random_sets: int = 3
    draws: int = 1_000


PLANS = {
    "tiny": SelectionPlan(16, 6, 4, 4, 3, 4, 1, 1, width=8, layers=1, random_sets=2, draws=50),
    "pocket": SelectionPlan(64, 160, 400, 500, 32, 128, 4, 2),
}


@register_study(PLANS)
def selection_domains(settings: StudySettings) -> Outcome:
    """Loss on a held-out domain after training on the tenth that each method chooses, and its gain over random tenths.

    Every repetition draws its texts, its start and its random sets again; it is the unit of the intervals.
    """
    plan = PLANS[settings.size]
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": asdict(plan), "target": TARGET}
    for part, inside in PARTS.items():
        found = [_compare(settings, plan, part, inside, settings.seed + number) for number in range(settings.seeds)]
        random = np.stack([each["random"] for each, _ in found], 1)
        everything = np.stack([each[EVERYTHING] for each, _ in found])
        losses = {name: np.stack([each[name] for each, _ in found]) for name in METHODS}
        gains = {name: measure_gain(losses[name], random, plan.draws, settings.seed) for name in METHODS}
        shares = {name: float(np.mean([each[name] for _, each in found])) for name in METHODS}
        rows += sorted(
            ((part, *_row(name, losses[name], gains[name], shares[name])) for name in METHODS), key=lambda row: row[2]
        )
        rows.append((part, "random", float(random.mean()), "", "", "", "", ""))
        rows.append((part, "everything", float(everything.mean()), "", "", "", "", ""))
        gates += [Gate(f"{part}: gain of {name} over random", gains[name].over_all.value, ">=") for name in GATED]
        intervals = {name: gain.over_all for name, gain in gains.items()}
        label = f"fewer nats per byte of {TARGET} than after random tenths (95 % intervals)"
        draw_intervals(settings.out, part.replace(" ", "-"), intervals, label, beside=("bm25", "rep-sim"))
        details[part] = {
            "gain by repetition": {name: gain.by_seed.tolist() for name, gain in gains.items()},
            "gain": {name: [gain.over_all._asdict(), gain.over_seeds._asdict()] for name, gain in gains.items()},
            "random by repetition": random.mean(2).T.tolist(),
            "everything by repetition": everything.mean(1).tolist(),
            "share of the target": shares,
        }
    return Outcome(_COLUMNS, rows, gates, details)


def _row(name: str, losses: np.ndarray, gain: Gain, share: float) -> tuple[Any, ...]:
    both = [show_interval(each) for each in (gain.over_all, gain.over_seeds)]
    ahead = f"{int((gain.by_seed > 0).sum())} of {len(gain.by_seed)}"
    return name, float(losses.mean()), gain.over_all.value, *both, ahead, f"{share:.0%}"


def _compare(
    settings: StudySettings, plan: SelectionPlan, part: str, inside: bool, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """One repetition: texts, start, scores, choices, trainings.

    Return the losses per token [query] after training on what each method chose, on everything, and on each `random`
    set [set, query]; and the share of the pieces chosen by each method that are of the target.
    """
    folder = settings.out / str(seed) / part.replace(" ", "-")
    texts, sources = _write_texts(plan, folder / "texts", inside, seed)
    before = Training(Recipe(3e-3, plan.batch_size), plan.steps_before)
    fresh = byte_gpt(plan.length, plan.width, plan.layers)
    # The same texts and seed in both parts: one start serves them.
    start = train_checkpoints(
        fresh, texts["before"], settings.out / str(seed) / "start", before, seed=seed, from_scratch=True
    ).model
    tenth = max(1, round(len(sources) * _SHARE / 100))
    steps = plan.passes * -(-tenth // plan.batch_size)
    warming = Training(Recipe(plan.learning_rate, plan.batch_size), steps)
    warm = train_checkpoints(
        start, texts["warm"], folder / "warm", warming, seed=seed, count=plan.checkpoints, optimizer=True
    )
    runs = _runs(folder / "runs", texts, warm, seed)
    chosen = [
        select(scores=run, budget=f"{_SHARE}%", out=folder / "chosen" / name, data=str(texts["mixture"]), seed=seed)
        for name, run in runs.items()
    ]
    compare(
        selected=tuple(str(each.folder) for each in chosen),
        model=start,
        data=str(texts["mixture"]),
        queries=str(texts["tests"]),
        out=folder / "compared",
        random_sets=plan.random_sets,
        seeds=1,
        steps=steps,
        learning_rate=plan.learning_rate,
        batch_size=plan.batch_size,
        draws=plan.draws,
        seed=seed,
        **settings.launch_arguments,
    )
    truth = Bank.open(folder / "compared" / "bank")
    losses = dict(zip(truth.subset_names, truth.by_subset(truth.query_token_losses)[:, 0], strict=True))
    losses["random"] = np.stack([values for name, values in losses.items() if name.startswith("random ")])
    shares = {
        name: float(np.mean([sources[one] == TARGET for one in each.ids]))
        for name, each in zip(runs, chosen, strict=True)
    }
    return losses, shares


def _write_texts(plan: SelectionPlan, folder: Path, inside: bool, seed: int) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the files of one repetition, and return them with the domain of each id of the mixture.

    No piece is in two of the files, but for the random tenth `warm`, which is of the mixture.
    """
    most = max(plan.before, plan.asked + plan.tests) + plan.pieces
    drawn = domain_pieces(seed, length=plan.length, pieces=most)
    mixture = [row for name in DOMAINS if inside or name != TARGET for row in drawn[name][: plan.pieces]]
    others = [name for name in DOMAINS if name != TARGET]
    before = [row for name in others for row in drawn[name][plan.pieces : plan.pieces + plan.before]]
    target = drawn[TARGET][plan.pieces :]
    tenth = np.random.default_rng([seed, 1]).permutation(len(mixture))[: max(1, round(len(mixture) * _SHARE / 100))]
    files: dict[str, list[Row]] = {
        "before": before,
        "mixture": mixture,
        "warm": [mixture[row] for row in np.sort(tenth)],
        "asked": target[: plan.asked],
        "tests": target[plan.asked : plan.asked + plan.tests],
    }
    paths = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    return paths, {row["id"]: row["source"] for row in mixture}


def _runs(folder: Path, texts: dict[str, Path], warm: Checkpoints, seed: int) -> dict[str, Path]:
    """Folders of the runs by method; LESS scores for the domain as one target, over all checkpoints."""
    several = {"checkpoints": warm.folders, "checkpoint_weights": tuple(warm.rates), "options": {"subtasks": True}}
    for method in METHODS:
        keep_run(
            attribute,
            folder / method,
            data=str(texts["mixture"]),
            queries=str(texts["asked"]),
            method=method,
            components=("all",),
            dense=True,
            trust=False,
            seed=seed,
            **(several if method == "less" else {"model": warm.model}),
        )
    return {method: folder / method for method in METHODS}
