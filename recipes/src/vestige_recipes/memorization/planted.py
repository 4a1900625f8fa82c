"""Wrong labels and outliers planted among clean points: what predicts early, and proves later, that they are memorized.

Small networks are trained on random halves of the points. Each is a target once: its measures are taken early, when the
median training loss falls below 5 % of its start, on the points it is trained on; what it has memorized at the end
is what the likelihood ratio says, by the models of the other halves. Dentan et al. 2024 (arXiv:2409.18858) in small.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vestige.measures import Interval, accuracy, brier, logit_gap, mahalanobis, margin, psmi, share
from vestige_recipes.memorization.judging import (
    COLUMNS,
    SUCCESS,
    Contest,
    Judged,
    area_rows,
    areas_json,
    each_draw,
    judge_targets,
    mean_interval,
    null_row,
    over_targets,
    proof_rows,
    table_row,
)
from vestige_recipes.memorization.targets import TRIGGER, Early, Measures, Targets, make_targets
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study

WIDTH, CLASSES, HIDDEN, BATCH, RATE = 40, 4, 128, 32, 1e-3
_SPREAD, _FAR = 0.7, 3.0
"""Of the centres of the classes, and of the outliers; a class itself has deviation 1."""


@dataclass(frozen=True)
class PlantedPlan:
    """One size of the study."""

    points: int
    planted: int
    """Flipped labels, and as many outliers."""
    models: int
    epochs: int
    directions: int


class Points(NamedTuple):
    """What networks are trained on."""

    inputs: Float[Tensor, "example in"]
    labels: Int[Tensor, "example"]
    flipped: Bool[np.ndarray, "example"]
    outlying: Bool[np.ndarray, "example"]

    @property
    def planted(self) -> Bool[np.ndarray, "example"]:
        """Both kinds."""
        return self.flipped | self.outlying

    @property
    def ids(self) -> list[str]:
        """Row numbers."""
        return [str(row) for row in range(len(self.labels))]


def draw_points(plan: PlantedPlan, seed: int) -> Points:
    """Four Gaussian classes in 40 dimensions; the first points flipped, the next far from every class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, plan.points)
    centres = draw.normal(size=(CLASSES, WIDTH)) * _SPREAD
    inputs = centres[labels] + draw.normal(size=(plan.points, WIDTH))
    rows = np.arange(plan.points)
    flipped, outlying = rows < plan.planted, (rows >= plan.planted) & (rows < 2 * plan.planted)
    labels = np.where(flipped, (labels + draw.integers(1, CLASSES, plan.points)) % CLASSES, labels)
    inputs[outlying] = _FAR * draw.normal(size=(plan.planted, WIDTH))
    return Points(torch.from_numpy(inputs).float(), torch.from_numpy(labels), flipped, outlying)


def plant(plan: PlantedPlan, seed: int, out: Path) -> Targets[Points]:
    """Return a draw of points and the networks that are trained on halves of them, made now or found there."""
    points = draw_points(plan, seed)

    def train(rows: np.ndarray, run_seed: int, early: Early) -> tuple[Measures, int]:
        return _train_network(points, plan, rows, run_seed, early), plan.epochs

    recipe = {"width": WIDTH, "hidden": HIDDEN, "batch": BATCH, "rate": RATE, "trigger": TRIGGER}
    return make_targets(
        points,
        train,
        out,
        ids=points.ids,
        kept={"example_gap": "logit_gap", "example_loss": "loss"},
        settings={"plan": asdict(plan), "points seed": seed, **recipe},
        models=plan.models,
        seed=seed,
    )


def _train_network(
    points: Points, plan: PlantedPlan, rows: np.ndarray, seed: int, early: Early
) -> dict[str, Float[np.ndarray, "example"]]:
    """One network: measures of all points at the end; those of its own points are handed over at the trigger."""
    inputs, labels = points.inputs[rows], points.labels[rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        head = nn.Linear(HIDDEN, CLASSES)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=RATE)
        start, seen = None, False
        for epoch in range(plan.epochs + 1):
            with torch.no_grad():
                states = body(inputs)
                logits = head(states)
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            start = losses.median() if start is None else start
            if not seen and (losses.median() < TRIGGER * start or epoch == plan.epochs):
                early(_measures(states, logits, labels, plan.directions), epoch)
                seen = True
            if epoch < plan.epochs:
                for batch in torch.randperm(len(rows)).split(BATCH):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(head(body(inputs[batch])), labels[batch]).backward()
                    optimiser.step()
        with torch.no_grad():
            states = body(points.inputs)
            return _measures(states, head(states), points.labels, plan.directions)


def _measures(states: Tensor, logits: Tensor, labels: Tensor, directions: int) -> dict[str, np.ndarray]:
    loss = nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()
    return {
        "psmi": psmi(states.numpy(), labels.numpy(), directions=directions).mean,
        "loss": loss,
        "logit_gap": logit_gap(logits, labels).numpy(),
        "margin": margin(loss),
        "brier": brier(logits, labels).numpy(),
        "accuracy": accuracy(logits, labels).numpy(),
        "mahalanobis": mahalanobis(states.numpy()),
    }


PREDICTORS = {
    "psmi": -1, "loss": 1, "logit_gap": -1, "margin": -1, "brier": 1, "accuracy": -1, "mahalanobis": 1, "early_lira": 1,
}  # fmt: skip
"""What is taken at the trigger, and which way it points; `early_lira` judges the target as it is then by finished
models."""
BOTH = "flips + outliers"
PLANTED = ("flips", "outliers", BOTH)
FOUND, LEAD, SUCCEEDED, NULL = 0.95, 0.05, 0.95, 0.05
"""Expected: AUC of PSMI, its lead over the loss, success of the attack on flips, distance of the null from one half."""
UNTUNED = 0.8, 0.06
"""Expected of flagging PSMI <= 0: true positives at least, false positives at most."""

PLANS = {
    "tiny": PlantedPlan(points=240, planted=12, models=8, epochs=30, directions=200),
    "pocket": PlantedPlan(points=1000, planted=30, models=24, epochs=60, directions=2000),
}


@register_study(PLANS)
def memorization_planted(settings: StudySettings) -> Outcome:
    """AUCs of every measure for planted points and for what is memorized, over targets of several draws of points."""
    plan = PLANS[settings.size]
    judged, epochs = each_draw(settings, partial(plant, plan), judge, "epoch")
    early = over_targets([each.early for each in judged])
    rows = [
        *area_rows([each.early for each in judged], "at the trigger"),
        *proof_rows(judged),
        *_flag_rows(judged),
        *area_rows([each.late for each in judged], "at the end"),
        null_row(judged),
    ]
    label, others = f"AUC of {BOTH} at the trigger (95 % interval over targets)", set(PREDICTORS) - {"psmi"}
    draw_intervals(settings.out, "planted", early[BOTH], label, beside=others, lines={"chance": 0.5})
    details = {
        "plan": asdict(plan),
        "trigger_epochs": epochs,
        "early": {what: {name: dict(each._asdict()) for name, each in row.items()} for what, row in early.items()},
        "seeds": [
            {
                "early": areas_json(each.early),
                "late": areas_json(each.late),
                "flagged": each.flagged,
                "null": each.null.tolist(),
                "not_finite": each.not_finite,
            }
            for each in judged
        ],
    }
    return Outcome(COLUMNS, rows, gates_of(judged), details)


def judge(made: Targets[Points], seed: int) -> Judged:
    """Return every figure of one draw of points."""
    points = made.examples
    kinds = {"clean": ~points.planted, "flips": points.flipped, "outliers": points.outlying, BOTH: points.planted}
    found = judge_targets(
        made,
        seed,
        signs=PREDICTORS,
        wanted={what: kinds[what] for what in PLANTED},
        kinds=kinds,
        contests={what: Contest(kinds[what], ~kinds[what]) for what in PLANTED},
    )
    planted = np.concatenate([points.planted[own] for own in made.bank.membership])
    low = np.concatenate([early["psmi"] <= 0 for early in made.early])
    groups = {"planted": planted, "others": ~planted}
    return found._replace(
        flagged={name: (int(low[rows].sum()), int(rows.sum())) for name, rows in groups.items()},
    )


def gates_of(judged: Sequence[Judged]) -> list[Gate]:
    """Return what was expected, over all draws of points; of the null, the worst of them."""

    def early(what: str, name: str) -> float:
        return mean_interval(np.concatenate([each.early[what][name] for each in judged])).value

    success = mean_interval(np.concatenate([each.proved[SUCCESS][each.kinds["flips"]] for each in judged])).value
    rates = {kind: _share([each.flagged[kind] for each in judged]).value for kind in ("planted", "others")}
    lead = early(BOTH, "psmi") - early(BOTH, "loss")
    worst = max(abs(float(each.null.mean()) - 0.5) for each in judged)
    return [
        *(Gate(f"PSMI at the trigger: AUC of {kind}", early(kind, "psmi"), ">=", FOUND) for kind in PLANTED),
        Gate(f"PSMI at the trigger: AUC of {BOTH} above the loss's by", lead, ">=", LEAD),
        Gate("attack success on flips, leave-one-out", success, ">=", SUCCEEDED),
        Gate("membership shuffled: AUC away from 0.5 by", worst, "<=", NULL),
        Gate("scores that are not finite", sum(each.not_finite for each in judged), "<="),
        Gate("PSMI <= 0: true positives among planted points", rates["planted"], ">=", UNTUNED[0]),
        Gate("PSMI <= 0: false positives among the others", rates["others"], "<=", UNTUNED[1]),
    ]


def _share(counts: Sequence[tuple[int, int]]) -> Interval:
    return share(*(sum(column) for column in zip(*counts, strict=True)))


def _flag_rows(judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for kind in ("planted", "others"):
        rate = _share([each.flagged[kind] for each in judged])
        single = [hits / count for hits, count in (one.flagged[kind] for one in judged)]
        rows.append(table_row(f"share of {kind} flagged", "psmi <= 0", rate, single))
    return rows
