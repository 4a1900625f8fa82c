"""Facts that a tiny GPT is told once, 4 or 16 times, and wrong answers, among multiple-choice prompts of a rule.

What measures at the trigger say of what will be memorized, what every measure says of membership at the end, and how
the likelihood ratio rises with repetition: the set-up of Dentan et al. 2024 (arXiv:2409.18858) on generated prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.audit import (
    SIGNS,
    BankEvidence,
    Interval,
    bank_evidence,
    blind,
    lira_in_sample,
    lira_of_members,
    lira_offline,
    perplexity_ratio,
)
from vestige.evaluate import Mark, interval_figure
from vestige.files import write_durably
from vestige.progress import announce
from vestige.settings import StudySettings
from vestige.studies._memorization_judging import (
    Areas,
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
from vestige.studies._memorization_shadows import FactsPlan, Shadows, cast_shadows
from vestige.studies._memorization_words import REPEATS
from vestige.studies._registry import Gate, Outcome, registered

EARLY = {
    "psmi": -1, "answer_loss": 1, "loss": 1, "logit_gap": -1, "brier": 1, "min_k": -1, "min_k_plus_plus": -1,
    "mahalanobis": 1, "early_lira": 1,
}  # fmt: skip
"""Measures at the trigger and which way they point to what will be memorized."""
LATE = ("answer_loss", "loss", "logit_gap", "brier", "min_k", "min_k_plus_plus", "zlib_ratio", "perplexity_ratio",
        "lira", "lira_offline", "blind")  # fmt: skip
"""Measures of membership at the end; `blind` never sees a model."""
FOUND, NULL = 0.9, 0.05
"""Expected: AUC of flips by PSMI at the trigger, distance of the null from one half."""

PLANS = {
    "tiny": FactsPlan(rule=64, flips=6, facts=4, models=6, epochs=2, directions=50, width=16, layers=1),
    "pocket": FactsPlan(rule=1400, flips=42, facts=24, models=20, epochs=12, directions=2000),
}


class Judged(NamedTuple):
    """What one draw of prompts and its bank say."""

    early: Areas
    late: Areas
    """AUC of membership among the prompts of each kind by each measure at the end, one per target."""
    values: dict[str, dict[str, Float[np.ndarray, "example"]]]
    """Of each prompt of each kind: likelihood ratio (mean over the targets that have it), counterfactual, success."""
    null: Float[np.ndarray, "target"]
    uncomputable: int


@registered("memorization-facts", list(PLANS))
def memorization_facts(settings: StudySettings) -> Outcome:
    """Likelihood ratios by repetition, and AUCs of every measure at the trigger and at the end, over targets."""
    plan, judged, steps = PLANS[settings.size], [], []
    for number in range(settings.seeds):
        seed = settings.seed + number
        made = cast_shadows(plan, seed, settings.out / f"seed-{seed}")
        judged.append(judge(made, seed))
        steps.append(made.steps.tolist())
        announce(f"Prompts {seed}: the trigger went off after step {np.median(made.steps):g} (median of targets).")
    early, late = (over_targets([getattr(each, side) for each in judged]) for side in ("early", "late"))
    proved = {name: {kind: _over_prompts(judged, name, kind) for kind in row} for name, row in judged[0].values.items()}
    rows = [
        *_proved_rows(proved, judged),
        *area_rows(early, [each.early for each in judged]),
        *area_rows(late, [each.late for each in judged], "at the end"),
    ]
    marks = [Mark(kind, estimate(interval)) for kind, interval in proved["LiRA of members, nats"].items()]
    for name, content in interval_figure("facts", marks, "mean LiRA of members, nats (95 % interval)").items():
        write_durably(settings.out / name, [content])
    details = {
        "plan": asdict(plan),
        "trigger_steps": steps,
        "uncomputable": [each.uncomputable for each in judged],
        "proved": {name: {kind: interval_json(each) for kind, each in row.items()} for name, row in proved.items()},
        "null": [each.null.tolist() for each in judged],
        "early": _details([each.early for each in judged]),
        "late": _details([each.late for each in judged]),
    }
    # A few steps of a few models show that everything runs, and nothing else.
    gates = [] if settings.size == "tiny" else gates_of(proved, early, judged)
    return Outcome(("of", "measure", "value", "95 % interval", "single seeds"), rows, gates, details)


def judge(made: Shadows, seed: int) -> Judged:
    """Every figure of one draw of prompts."""
    bank, kinds = made.bank, made.facts.kinds
    membership, gaps = bank.membership, bank.values("example_gap")
    evidence = bank_evidence(bank, of="gap")
    ratios = early_ratios(bank, made.early)
    early = [each | {"early_lira": score} for each, score in zip(made.early, ratios, strict=True)]
    once = {"flips": kinds["flips"], "facts x1": kinds["facts x1"]}
    wanted = once | {"flips + facts x1": once["flips"] | once["facts x1"]}
    scores = _late_scores(made, evidence)
    every = np.ones(len(made.facts.repeats), dtype=bool)
    shuffled = np.stack([np.random.default_rng([seed, row]).permutation(own) for row, own in enumerate(membership)])
    return Judged(
        early_areas(bank, early, evidence.lira, wanted, EARLY),
        {
            f"membership of {kind}": {
                name: np.array([auc(row[chosen], own[chosen]) for row, own in zip(each, membership, strict=True)])
                for name, each in scores.items()
            }
            for kind, chosen in {**kinds, "all": every}.items()
        },
        _values(evidence, lira_in_sample(gaps, membership).success, membership, kinds),
        members_auc(lira_of_members(gaps, shuffled), shuffled),
        evidence.uncomputable,
    )


def _late_scores(made: Shadows, evidence: BankEvidence) -> dict[str, Float[np.ndarray, "target example"]]:
    """Every measure at the end, oriented so that high speaks for membership."""
    bank, texts = made.bank, [example.display for example in made.facts.prompts.data.examples]
    gaps, membership = bank.values("example_gap"), bank.membership
    found = {name: np.stack([SIGNS[name] * each[name] for each in made.late]) for name in LATE if name in made.late[0]}
    ratios = [perplexity_ratio(each["loss"], made.reference) for each in made.late]
    found["perplexity_ratio"] = SIGNS["perplexity_ratio"] * np.stack(ratios)
    found["lira"] = evidence.lira
    found["lira_offline"] = np.stack(
        [
            lira_offline(row, gaps, membership, left_out=np.arange(len(gaps)) == number).score
            for number, row in enumerate(gaps)
        ]
    )
    found["blind"] = np.stack([blind(texts, own) for own in membership])
    return {name: found[name] for name in LATE}


def _values(
    evidence: BankEvidence,
    inside: Float[np.ndarray, "example"],
    membership: Bool[np.ndarray, "target example"],
    kinds: Mapping[str, Bool[np.ndarray, "example"]],
) -> dict[str, dict[str, np.ndarray]]:
    of_members = np.where(membership & np.isfinite(evidence.lira), evidence.lira, np.nan)
    counts = np.isfinite(of_members).sum(0)
    ratio = np.nansum(of_members, axis=0) / np.where(counts > 0, counts, np.nan)
    found = {
        "LiRA of members, nats": ratio,
        "counterfactual memorization": evidence.counterfactual,
        "attack success, leave-one-out": evidence.success.success,
        "attack success, in-sample minus leave-one-out": inside - evidence.success.success,
    }
    return {name: {kind: values[rows] for kind, rows in kinds.items()} for name, values in found.items()}


def gates_of(
    proved: Mapping[str, Mapping[str, Interval]], early: Mapping[str, Mapping[str, Interval]], judged: Sequence[Judged]
) -> list[Gate]:
    """What was expected, over all draws of prompts; of the null, the worst of them."""
    ratios = proved["LiRA of members, nats"]
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


def _over_prompts(judged: Sequence[Judged], name: str, kind: str) -> Interval:
    return mean_interval(np.concatenate([each.values[name][kind] for each in judged]))


def _proved_rows(proved: Mapping[str, Mapping[str, Interval]], judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, row in proved.items():
        for kind, interval in row.items():
            single = [mean_interval(each.values[name][kind]).value for each in judged]
            rows.append((name, kind, interval.value, shown(interval), each_seed(single)))
    null = mean_interval(np.concatenate([each.null for each in judged]))
    single = [float(each.null.mean()) for each in judged]
    rows.append(("AUC of shuffled membership", "lira", null.value, shown(null), each_seed(single)))
    return rows


def _details(areas: Sequence[Areas]) -> list[dict[str, Any]]:
    return [
        {what: {name: values.tolist() for name, values in row.items()} for what, row in each.items()} for each in areas
    ]
