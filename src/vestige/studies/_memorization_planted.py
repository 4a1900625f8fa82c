"""Wrong labels and outliers planted among clean points: what predicts early, and proves later, that they are memorized.

Small networks are trained on random halves of the points. Each is a target once: its measures are taken early, when the
median training loss falls below 5 % of its start, on the points it is trained on; what it has memorized at the end
is what the likelihood ratio says, by the models of the other halves. Dentan et al. 2024 (arXiv:2409.18858) in small.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.audit import Interval, attack, bank_evidence, lira_in_sample, lira_of_members, share
from vestige.evaluate import Mark, interval_figure
from vestige.files import write_durably
from vestige.progress import announce
from vestige.settings import StudySettings
from vestige.studies._memorization_judging import (
    area_rows,
    auc,
    each_seed,
    early_areas,
    early_ratios,
    estimate,
    interval_json,
    mean_interval,
    members_auc,
    over_targets,
    shown,
)
from vestige.studies._memorization_points import Planted, PlantedPlan, plant
from vestige.studies._registry import Gate, Outcome, registered

PREDICTORS = {"psmi": -1, "loss": 1, "logit_gap": -1, "brier": 1, "mahalanobis": 1, "early_lira": 1}
"""What is taken at the trigger, and which way it points; `early_lira` judges the target as it is then by finished
models."""
BOTH = "flips + outliers"
PLANTED = ("flips", "outliers", BOTH)
FOUND, LEAD, SUCCESS, NULL = 0.95, 0.05, 0.95, 0.05
"""Expected: AUC of PSMI, its lead over the loss, success of the attack on flips, distance of the null from one half."""
UNTUNED = 0.8, 0.06
"""Expected of flagging PSMI <= 0: true positives at least, false positives at most."""

PLANS = {
    "tiny": PlantedPlan(points=240, planted=12, models=8, epochs=30, directions=200),
    "pocket": PlantedPlan(points=1000, planted=30, models=24, epochs=60, directions=2000),
}


class Judged(NamedTuple):
    """What one draw of points and its bank say."""

    early: dict[str, dict[str, Float[np.ndarray, "target"]]]
    """AUC of each predictor for each thing to be found, one per target."""
    late: dict[str, Float[np.ndarray, "example"]]
    """What the bank proves of each point, high for memorized ones."""
    kinds: dict[str, Bool[np.ndarray, "example"]]
    """Which points are of which kind."""
    success: dict[str, tuple[Float[np.ndarray, "example"], Float[np.ndarray, "example"]]]
    """Of the attack on each kind of point, leave-one-out and in-sample."""
    flagged: dict[str, tuple[int, int]]
    """Points with PSMI <= 0, and how many there are, among planted ones and others."""
    membership: Float[np.ndarray, "target"]
    null: Float[np.ndarray, "target"]
    """AUC of the likelihood ratio for membership in each target, and when membership is shuffled."""
    not_finite: int


@registered("memorization-planted", list(PLANS))
def memorization_planted(settings: StudySettings) -> Outcome:
    """AUCs of every measure for planted points and for what is memorized, over targets of several draws of points."""
    plan, judged, epochs = PLANS[settings.size], [], []
    for number in range(settings.seeds):
        seed = settings.seed + number
        made = plant(plan, seed, settings.out / f"seed-{seed}")
        judged.append(judge(made, seed))
        epochs.append(made.epochs)
        announce(f"Points {seed}: the trigger went off after epoch {np.median(made.epochs):g} (median of targets).")
    found = over_targets([each.early for each in judged])
    rows = [*area_rows(found, [each.early for each in judged]), *_late_rows(judged)]
    marks = [Mark(name, estimate(interval), name != "psmi") for name, interval in found[BOTH].items()]
    label = f"AUC of {BOTH} at the trigger (95 % interval over targets)"
    for name, content in interval_figure("planted", marks, label, lines={"chance": 0.5}).items():
        write_durably(settings.out / name, [content])
    details = {
        "plan": asdict(plan),
        "trigger_epochs": [each.tolist() for each in epochs],
        "early": {what: {name: interval_json(each) for name, each in row.items()} for what, row in found.items()},
        "seeds": [_details(each) for each in judged],
    }
    # Eight small networks show that everything runs, and nothing else.
    gates = [] if plan == PLANS["tiny"] else gates_of(judged)
    return Outcome(("of", "measure", "value", "95 % interval", "single seeds"), rows, gates, details)


def judge(made: Planted, seed: int) -> Judged:
    """Every figure of one draw of points."""
    evidence = bank_evidence(made.bank, of="gap")
    gaps, membership = made.bank.values("example_gap"), made.bank.membership
    inside = lira_in_sample(gaps, membership).success
    shuffled = np.stack([np.random.default_rng([seed, row]).permutation(own) for row, own in enumerate(membership)])
    null = lira_of_members(gaps, shuffled)
    points = made.points
    kinds = {"clean": ~points.planted, "flips": points.flipped, "outliers": points.outlying, BOTH: points.planted}
    early = [
        each | {"early_lira": score}
        for each, score in zip(made.early, early_ratios(made.bank, made.early), strict=True)
    ]
    late = {
        "counterfactual": evidence.counterfactual,
        "success of the attack": evidence.success.success,
        "simplicity, negative": -evidence.simplicity,
    }
    planted = np.concatenate([points.planted[own] for own in membership])
    low = np.concatenate([early["psmi"] <= 0 for early in made.early])
    return Judged(
        early_areas(made.bank, early, evidence.lira, {what: kinds[what] for what in PLANTED}, PREDICTORS),
        late,
        kinds,
        {name: (evidence.success.success[kinds[name]], inside[kinds[name]]) for name in ("clean", "flips", "outliers")},
        {
            "planted": (int(low[planted].sum()), int(planted.sum())),
            "others": (int(low[~planted].sum()), int((~planted).sum())),
        },
        members_auc(evidence.lira, membership),
        members_auc(null, shuffled),
        sum(int((~np.isfinite(values)).sum()) for early in made.early for values in early.values())
        + int((~np.isfinite(evidence.lira)).sum()),
    )


def gates_of(judged: Sequence[Judged]) -> list[Gate]:
    """What was expected, over all draws of points; of the null, the worst of them."""

    def early(what: str, name: str) -> float:
        return mean_interval(np.concatenate([each.early[what][name] for each in judged])).value

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
        Gate("attack success on flips, leave-one-out", _succeeded(judged, "flips")[0].value, ">=", SUCCESS),
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


def _succeeded(judged: Sequence[Judged], kind: str) -> tuple[Interval, Interval]:
    """Success of the attack over points of all draws, leave-one-out and in-sample."""
    alone, inside = (np.concatenate([each.success[kind][side] for each in judged]) for side in (0, 1))
    return mean_interval(alone), mean_interval(inside)


def _late_scores(each: Judged, name: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    return each.late[name], each.kinds[what]


def _late(each: Judged, name: str, what: str) -> float:
    return auc(*_late_scores(each, name, what))


def _late_rows(judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for kind in judged[0].success:
        for side, interval in zip(("leave-one-out", "in-sample"), _succeeded(judged, kind), strict=True):
            each = each_seed([float(np.nanmean(one.success[kind][side == "in-sample"])) for one in judged])
            rows.append((f"attack success on {kind}", side, interval.value, shown(interval), each))
        bias = mean_interval(np.concatenate([one.success[kind][1] - one.success[kind][0] for one in judged]))
        rows.append((f"attack success on {kind}", "in-sample minus leave-one-out", bias.value, shown(bias), ""))
    for name in judged[0].late:
        for what in PLANTED:
            areas = [_late(each, name, what) for each in judged]
            both = [
                np.concatenate(parts)
                for parts in zip(*(_late_scores(each, name, what) for each in judged), strict=True)
            ]
            interval = attack(both[0], both[1]).auc
            rows.append((f"AUC of {what}, at the end", name, interval.value, shown(interval), each_seed(areas)))
    for kind in ("planted", "others"):
        rate = _share([each.flagged[kind] for each in judged])
        each = each_seed([hits / count for hits, count in (one.flagged[kind] for one in judged)])
        rows.append((f"share of {kind} flagged", "psmi <= 0", rate.value, shown(rate), each))
    for what, side in (("AUC of membership, at the end", "membership"), ("the same, membership shuffled", "null")):
        values = [getattr(each, side) for each in judged]
        interval = mean_interval(np.concatenate(values))
        rows.append((what, "lira", interval.value, shown(interval), each_seed([float(one.mean()) for one in values])))
    return rows


def _details(each: Judged) -> dict[str, Any]:
    return {
        "early": {what: {name: values.tolist() for name, values in row.items()} for what, row in each.early.items()},
        "late": {name: {what: _late(each, name, what) for what in PLANTED} for name in each.late},
        "success": {kind: [float(np.nanmean(side)) for side in sides] for kind, sides in each.success.items()},
        "flagged": each.flagged,
        "membership": each.membership.tolist(),
        "null": each.null.tolist(),
        "not_finite": each.not_finite,
    }
