"""Wrong labels and outliers planted among clean points: what predicts early, and proves later, that they are memorized.

Small networks are trained on random halves of the points. Each is a target once: its measures are taken early, when the
median training loss falls below 5 % of its start, on the points it is trained on; what it has memorized at the end
is what the likelihood ratio says, by the models of the other halves. Dentan et al. 2024 (arXiv:2409.18858) in small.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.audit import Interval, bank_evidence, lira_of_members, share
from vestige_recipes.common.registry import Gate, Outcome, StudySettings, registered
from vestige_recipes.memorization.judging import (
    COLUMNS,
    Areas,
    area_rows,
    areas_json,
    draw_intervals,
    each_draw,
    each_seed,
    early_areas,
    early_ratios,
    interval_json,
    mean_interval,
    members_auc,
    over_targets,
    shown,
)
from vestige_recipes.memorization.points import Planted, PlantedPlan, plant
from vestige_recipes.memorization.proof import (
    SUCCESS,
    Contest,
    Proofs,
    late_areas,
    late_scores,
    null_row,
    proof_rows,
    proofs,
)

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


class Judged(NamedTuple):
    """What one draw of points and its bank say."""

    early: Areas
    """AUC of each predictor for each thing to be found, one per target."""
    late: Areas
    """AUC of membership among the points of each kind by each measure at the end, one per target."""
    proved: Proofs
    kinds: dict[str, Bool[np.ndarray, "example"]]
    """Which points are of which kind."""
    flagged: dict[str, tuple[int, int]]
    """Points with PSMI <= 0, and how many there are, among planted ones and others."""
    null: Float[np.ndarray, "target"]
    """AUC of the likelihood ratio for membership in each target when membership is shuffled."""
    not_finite: int

    def contests(self) -> dict[str, Contest]:
        """What is planted, each against all other points."""
        return {what: Contest(self.kinds[what], ~self.kinds[what]) for what in PLANTED}


@registered("memorization-planted", list(PLANS))
def memorization_planted(settings: StudySettings) -> Outcome:
    """AUCs of every measure for planted points and for what is memorized, over targets of several draws of points."""
    plan = PLANS[settings.size]
    judged, epochs = each_draw(settings, partial(plant, plan), judge, lambda made: made.epochs, "epoch")
    early, late = (over_targets([getattr(each, side) for each in judged]) for side in ("early", "late"))
    rows = [
        *area_rows(early, [each.early for each in judged]),
        *proof_rows(
            [each.proved for each in judged],
            [each.kinds for each in judged],
            [each.contests() for each in judged],
        ),
        *_flagged_rows(judged),
        *area_rows(late, [each.late for each in judged], "at the end"),
        null_row([each.null for each in judged]),
    ]
    label = f"AUC of {BOTH} at the trigger (95 % interval over targets)"
    draw_intervals(settings, "planted", early[BOTH], label, beside=set(PREDICTORS) - {"psmi"}, lines={"chance": 0.5})
    details = {
        "plan": asdict(plan),
        "trigger_epochs": epochs,
        "early": {what: {name: interval_json(each) for name, each in row.items()} for what, row in early.items()},
        "seeds": [_details(each) for each in judged],
    }
    # Eight small networks show that everything runs, and nothing else.
    gates = [] if settings.size == "tiny" else gates_of(judged)
    return Outcome(COLUMNS, rows, gates, details)


def judge(made: Planted, seed: int) -> Judged:
    """Every figure of one draw of points."""
    evidence = bank_evidence(made.bank, of="gap")
    gaps, membership = made.bank.values("example_gap"), made.bank.membership
    shuffled = np.stack([np.random.default_rng([seed, row]).permutation(own) for row, own in enumerate(membership)])
    points = made.points
    kinds = {"clean": ~points.planted, "flips": points.flipped, "outliers": points.outlying, BOTH: points.planted}
    early = [
        each | {"early_lira": score}
        for each, score in zip(made.early, early_ratios(made.bank, made.early), strict=True)
    ]
    planted = np.concatenate([points.planted[own] for own in membership])
    low = np.concatenate([early["psmi"] <= 0 for early in made.early])
    return Judged(
        early_areas(made.bank, early, evidence.lira, {what: kinds[what] for what in PLANTED}, PREDICTORS),
        late_areas(made.bank, late_scores(made.bank, made.late, evidence), kinds),
        proofs(made.bank, evidence),
        kinds,
        {
            "planted": (int(low[planted].sum()), int(planted.sum())),
            "others": (int(low[~planted].sum()), int((~planted).sum())),
        },
        members_auc(lira_of_members(gaps, shuffled), shuffled),
        sum(int((~np.isfinite(values)).sum()) for early in made.early for values in early.values())
        + int((~np.isfinite(evidence.lira)).sum()),
    )


def gates_of(judged: Sequence[Judged]) -> list[Gate]:
    """What was expected, over all draws of points; of the null, the worst of them."""

    def early(what: str, name: str) -> float:
        return mean_interval(np.concatenate([each.early[what][name] for each in judged])).value

    success = mean_interval(np.concatenate([each.proved[SUCCESS][each.kinds["flips"]] for each in judged])).value
    rates = {kind: _share([each.flagged[kind] for each in judged]).value for kind in ("planted", "others")}
    found = [Gate(f"PSMI at the trigger: AUC of {kind}", early(kind, "psmi"), ">=", FOUND)
             for kind in PLANTED]  # fmt: skip
    return [
        *found,
        Gate(
            f"PSMI at the trigger: AUC of {BOTH} above the loss's by",
            early(BOTH, "psmi") - early(BOTH, "loss"),
            ">=",
            LEAD,
        ),
        Gate("attack success on flips, leave-one-out", success, ">=", SUCCEEDED),
        Gate(
            "membership shuffled: AUC away from 0.5 by",
            max(abs(float(each.null.mean()) - 0.5) for each in judged),
            "<=",
            NULL,
        ),
        Gate("scores that are not finite", sum(each.not_finite for each in judged), "<=", 0),
        Gate("PSMI <= 0: true positives among planted points", rates["planted"], ">=", UNTUNED[0]),
        Gate("PSMI <= 0: false positives among the others", rates["others"], "<=", UNTUNED[1]),
    ]


def _share(counts: Sequence[tuple[int, int]]) -> Interval:
    return share(*(sum(column) for column in zip(*counts, strict=True)))


def _flagged_rows(judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for kind in ("planted", "others"):
        rate = _share([each.flagged[kind] for each in judged])
        single = each_seed([hits / count for hits, count in (one.flagged[kind] for one in judged)])
        rows.append((f"share of {kind} flagged", "psmi <= 0", rate.value, shown(rate), single))
    return rows


def _details(each: Judged) -> dict[str, Any]:
    return {
        "early": areas_json(each.early),
        "late": areas_json(each.late),
        "flagged": each.flagged,
        "null": each.null.tolist(),
        "not_finite": each.not_finite,
    }
