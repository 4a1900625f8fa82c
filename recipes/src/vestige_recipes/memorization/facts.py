"""Facts that a tiny GPT reads once, 4 or 16 times, and wrong answers, among multiple-choice prompts of a rule.

What measures at the trigger say of what will be memorized, what every measure says of membership at the end, and how
the likelihood ratio rises with repetition: the set-up of Dentan et al. 2024 (arXiv:2409.18858) on generated prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import numpy as np

from vestige.measures import Interval, blind
from vestige_recipes.common.registry import Gate, Outcome, StudySettings, registered
from vestige_recipes.common.steps import draw_intervals
from vestige_recipes.memorization.judging import (
    COLUMNS,
    LIRA_OF_MEMBERS,
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
)
from vestige_recipes.memorization.shadows import REPEATS, Facts, FactsPlan, cast_shadows
from vestige_recipes.memorization.targets import Targets

EARLY = {
    "psmi": -1, "answer_loss": 1, "loss": 1, "logit_gap": -1, "margin": -1, "brier": 1, "accuracy": -1, "min_k": -1,
    "min_k_plus_plus": -1, "zlib_ratio": 1, "perplexity_ratio": 1, "extraction": -1, "exposure": -1, "mahalanobis": 1,
    "early_lira": 1,
}  # fmt: skip
"""Measures at the trigger and which way they point to what will be memorized."""
FOUND, NULL = 0.9, 0.05
"""Expected: AUC of flips by PSMI at the trigger, distance of the null from one half."""

PLANS = {
    "tiny": FactsPlan(rule=64, flips=6, facts=4, models=6, epochs=2, directions=50, width=16, layers=1),
    "pocket": FactsPlan(rule=1400, flips=42, facts=24, models=20, epochs=12, directions=2000),
}


@registered(PLANS)
def memorization_facts(settings: StudySettings) -> Outcome:
    """Likelihood ratios by repetition, and AUCs of every measure at the trigger and at the end, over targets."""
    plan = PLANS[settings.size]
    judged, steps = each_draw(settings, partial(cast_shadows, plan), judge, "step")
    early, late = (over_targets([getattr(each, side) for each in judged]) for side in ("early", "late"))
    rows = [
        *proof_rows(judged),
        null_row(judged),
        *area_rows(early, [each.early for each in judged]),
        *area_rows(late, [each.late for each in judged], "at the end"),
    ]
    ratios = {kind: _ratio(judged, kind) for kind in judged[0].kinds}
    draw_intervals(settings.out, "facts", ratios, "mean LiRA of members, nats (95 % interval)")
    details = {
        "plan": asdict(plan),
        "trigger_steps": steps,
        "uncomputable": [each.uncomputable for each in judged],
        "null": [each.null.tolist() for each in judged],
        "early": [areas_json(each.early) for each in judged],
        "late": [areas_json(each.late) for each in judged],
    }
    # A few steps of a few models show that everything runs, and nothing else.
    gates = [] if settings.size == "tiny" else gates_of(ratios, early, judged)
    return Outcome(COLUMNS, rows, gates, details)


def judge(made: Targets[Facts], seed: int) -> Judged:
    """Return every figure of one draw of prompts."""
    kinds = made.examples.kinds
    once = {"flips": kinds["flips"], "facts x1": kinds["facts x1"]}
    texts = [example.display for example in made.examples.prompts.data.examples]
    return judge_targets(
        made,
        seed,
        signs=EARLY,
        wanted=once | {"flips + facts x1": once["flips"] | once["facts x1"]},
        kinds=kinds,
        # Prompts that no rule tells the answer of, against those that follow the rule.
        contests={f"{kind} among the rule": Contest(kinds[kind], kinds["rule"]) for kind in [*kinds][1:]},
        more={"blind": np.stack([blind(texts, own) for own in made.bank.membership])},
    )


def gates_of(
    ratios: Mapping[str, Interval], early: Mapping[str, Mapping[str, Interval]], judged: Sequence[Judged]
) -> list[Gate]:
    """Return what was expected, over all draws of prompts; of the null, the worst of them."""
    rising = [
        Gate(
            f"LiRA of members: facts x{more} above facts x{fewer} by, nats",
            ratios[f"facts x{more}"].value - ratios[f"facts x{fewer}"].value,
            ">=",
            0.0,
        )
        for fewer, more in pairwise(REPEATS)
    ]
    worst = max(abs(float(each.null.mean()) - 0.5) for each in judged)
    return [
        *rising,
        Gate("PSMI at the trigger: AUC of flips", early["flips"]["psmi"].value, ">=", FOUND),
        Gate("membership shuffled: AUC away from 0.5 by", worst, "<=", NULL),
    ]


def _ratio(judged: Sequence[Judged], kind: str) -> Interval:
    return mean_interval(np.concatenate([each.proved[LIRA_OF_MEMBERS][each.kinds[kind]] for each in judged]))
