"""What the studies of memorization share: what is measured of a target, what a bank proves, and rows of tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.banks import Bank
from vestige.evaluate import estimate_mean
from vestige.measures import (
    MEASURES,
    BankEvidence,
    Interval,
    attack,
    bank_evidence,
    lira,
    lira_in_sample,
    lira_of_members,
    lira_offline,
)
from vestige.progress import announce
from vestige_recipes.memorization.targets import Examples, Targets
from vestige_recipes.studies import StudySettings, show_interval

MEMORIZED = 4.0
"""Likelihood ratio, in nats, from which an example counts as memorized."""
MOST = 0.9
"""Quantile of a target's likelihood ratios above which an example is among its most memorized."""
DRAWS = 2_000


COLUMNS = ("of", "measure", "value", "95 % interval", "single seeds")
"""Of the tables."""


Areas = dict[str, dict[str, Float[np.ndarray, "target"]]]
"""AUC of each predictor for each thing to be found, one per target."""


class Contest(NamedTuple):
    """Examples that should come first, and those that they should be ahead of."""

    wanted: Bool[np.ndarray, "example"]
    others: Bool[np.ndarray, "example"]


class Judged(NamedTuple):
    """What one draw of examples and its targets say."""

    early: Areas
    """AUC of each measure at the trigger for each thing to be found, one per target."""
    late: Areas
    """AUC of membership among the examples of each kind by each measure at the end, one per target."""
    proved: dict[str, Float[np.ndarray, "example"]]
    """By name, what a bank says of each example."""
    kinds: dict[str, Bool[np.ndarray, "example"]]
    """Which examples are of which kind."""
    contests: dict[str, Contest]
    """What proofs should set apart."""
    null: Float[np.ndarray, "target"]
    """AUC of the likelihood ratio for membership in each target when membership is shuffled."""
    uncomputable: int
    """Likelihood ratios that the bank has too few models for."""
    flagged: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """Of each group, the examples with PSMI <= 0, and how many there are."""
    not_finite: int = 0


def judge_targets(
    made: Targets[Any],
    seed: int,
    *,
    signs: Mapping[str, int],
    wanted: Mapping[str, Bool[np.ndarray, "example"]],
    kinds: dict[str, Bool[np.ndarray, "example"]],
    contests: dict[str, Contest],
    more: Mapping[str, Float[np.ndarray, "target example"]] | None = None,
) -> Judged:
    """Return every figure of one draw of examples.

    Args:
        made: The targets.
        seed: Of the shuffled membership.
        signs: Measures at the trigger and which way they point; `early_lira` judges the target by finished models.
        wanted: Examples to be found at the trigger.
        kinds: Kinds of examples, in each of which membership is to be found.
        contests: What proofs should set apart.
        more: Other scores of membership at the end.
    """
    bank, gaps = made.bank, made.bank.values("example_gap")
    evidence = bank_evidence(bank, of="gap")
    early = []
    for number, (own, measures) in enumerate(zip(bank.membership, made.early, strict=True)):
        # The target as it was early on, for its own examples, judged by the finished others.
        target = np.full(len(own), np.nan)
        target[own] = measures["logit_gap"]
        ratios = lira(target, gaps, bank.membership, left_out=np.arange(len(bank)) == number).score[own]
        early.append(measures | {"early_lira": ratios})
    scores = late_scores(bank, made.late, evidence) | dict(more or {})
    rows = enumerate(bank.membership)
    shuffled = np.stack([np.random.default_rng([seed, row]).permutation(own) for row, own in rows])
    return Judged(
        early_areas(bank, early, evidence.lira, wanted, signs),
        late_areas(bank, scores, kinds),
        proofs(bank, evidence),
        kinds,
        contests,
        members_auc(lira_of_members(gaps, shuffled), shuffled),
        evidence.uncomputable,
        not_finite=sum(int((~np.isfinite(values)).sum()) for each in made.early for values in each.values())
        + int((~np.isfinite(evidence.lira)).sum()),
    )


def each_draw(
    settings: StudySettings,
    make: Callable[[int, Path], Targets[Examples]],
    judge: Callable[[Targets[Examples], int], Judged],
    moment: str,
) -> tuple[list[Judged], list[list[int]]]:
    """Make and judge the draws of all seeds, each in a folder of its own; return also when their triggers went off.

    Args:
        settings: First seed, their number, and where the folders are.
        make: From a seed and its folder.
        judge: From what was made, and the seed.
        moment: What the time of the trigger is counted in.
    """
    judged, triggers = [], []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        made = make(seed, settings.out / f"seed-{seed}")
        judged.append(judge(made, seed))
        triggers.append(made.moments.tolist())
        announce(f"Seed {seed}: the trigger went off after {moment} {np.median(triggers[-1]):g} (median).")
    return judged, triggers


def mean_interval(values: Float[np.ndarray, "target"]) -> Interval:
    """Return the mean of the known values with the percentiles of bootstrap draws of them; NaN where none is known."""
    return Interval(*estimate_mean(np.where(np.isfinite(values), values, np.nan), DRAWS, 0))


def show_known(interval: Interval) -> str:
    """Return the ends of an interval in a table; nothing where they are not known."""
    return show_interval(interval) if np.isfinite(interval.low) else ""


def auc(scores: Float[np.ndarray, "example"], wanted: Bool[np.ndarray, "example"]) -> float:
    """Chance that a wanted example is above another; NaN where a side is empty."""
    return attack(scores, wanted).auc.value


def members_auc(
    scores: Float[np.ndarray, "target example"], membership: Bool[np.ndarray, "target example"]
) -> Float[np.ndarray, "target"]:
    """AUC of membership within each target."""
    return np.array([auc(row, own) for row, own in zip(scores, membership, strict=True)])


def early_areas(
    bank: Bank,
    early: Sequence[Mapping[str, Float[np.ndarray, "own"]]],
    scores: Float[np.ndarray, "target example"],
    kinds: Mapping[str, Bool[np.ndarray, "example"]],
    signs: Mapping[str, int],
) -> Areas:
    """How well measures of each target's own examples at the trigger find examples of some kinds, and the memorized.

    `scores` are likelihood ratios at the end, `kinds` are of all examples, `signs` say which way each measure points.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for own, score, measures in zip(bank.membership, scores, early, strict=True):
        ratios = score[own]
        wanted = {what: rows[own] for what, rows in kinds.items()}
        # What of its own examples a target has memorized, by its likelihood ratios.
        wanted |= {
            "top 10 % LiRA": ratios >= np.nanquantile(ratios, MOST),
            f"LiRA >= {MEMORIZED:g}": ratios >= MEMORIZED,
        }
        for name, sign in signs.items():
            for what, positives in wanted.items():
                found.setdefault(what, {}).setdefault(name, []).append(auc(sign * measures[name], positives))
    return {what: {name: np.array(each) for name, each in row.items()} for what, row in found.items()}


def over_targets(areas: Sequence[Areas]) -> dict[str, dict[str, Interval]]:
    """Means over the targets of all seeds."""
    return {
        what: {name: mean_interval(np.concatenate([each[what][name] for each in areas])) for name in row}
        for what, row in areas[0].items()
    }


def area_rows(areas: Sequence[Areas], moment: str) -> list[tuple[Any, ...]]:
    """Return rows of a table, of which each is a mean over the targets of all seeds."""
    return [
        mean_row(f"AUC of {what}, {moment}", name, [each[what][name] for each in areas])
        for what, row in areas[0].items()
        for name in row
    ]


def areas_json(areas: Areas) -> dict[str, dict[str, list[float]]]:
    """In JSON terms."""
    return {what: {name: values.tolist() for name, values in row.items()} for what, row in areas.items()}


def table_row(what: Any, name: str, interval: Interval, values: Sequence[float]) -> tuple[Any, ...]:
    """Return a row of `COLUMNS`; the values are of single seeds."""
    return what, name, interval.value, show_known(interval), " ".join(f"{value:.3f}" for value in values)


def mean_row(what: str, name: str, values: Sequence[Float[np.ndarray, "value"]]) -> tuple[Any, ...]:
    """Return a row of `COLUMNS`: the mean of the values of all seeds."""
    return table_row(what, name, mean_interval(np.concatenate(values)), [mean_interval(each).value for each in values])


LATE_SIGNS = {each.name: each.sign for each in MEASURES if each.sign} | {"exposure": 1, "psmi": 1, "mahalanobis": -1}
"""A member that was learnt lies where its label is expected, and among the others."""
LIRA_OF_MEMBERS, SUCCESS = "LiRA of members, nats", "attack success, leave-one-out"


def late_scores(
    bank: Bank, late: Sequence[Mapping[str, Float[np.ndarray, "example"]]], evidence: BankEvidence
) -> dict[str, Float[np.ndarray, "target example"]]:
    """Every measure of every target at the end, of all examples, oriented so that high speaks for membership."""
    gaps = bank.values("example_gap")
    found = {name: np.stack([LATE_SIGNS[name] * each[name] for each in late]) for name in late[0]}
    offline = [
        lira_offline(row, gaps, bank.membership, left_out=np.arange(len(gaps)) == number).score
        for number, row in enumerate(gaps)
    ]
    return found | {"lira": evidence.lira, "lira_offline": np.stack(offline)}


def late_areas(
    bank: Bank, scores: Mapping[str, Float[np.ndarray, "target example"]], kinds: Mapping[str, np.ndarray]
) -> Areas:
    """How well each measure tells the members among the examples of each kind, and among all."""
    kinds = {**kinds, "all": np.ones(bank.membership.shape[1], dtype=bool)}
    return {
        f"membership of {kind}": {
            name: members_auc(each[:, chosen], bank.membership[:, chosen]) for name, each in scores.items()
        }
        for kind, chosen in kinds.items()
    }


def proofs(bank: Bank, evidence: BankEvidence) -> dict[str, Float[np.ndarray, "example"]]:
    """Likelihood ratio (mean over the targets that have the example), counterfactual memorization, and what else."""
    of_members = np.where(bank.membership & np.isfinite(evidence.lira), evidence.lira, np.nan)
    counts = np.isfinite(of_members).sum(0)
    success, inside = evidence.success.success, lira_in_sample(bank.values("example_gap"), bank.membership).success
    return {
        LIRA_OF_MEMBERS: np.nansum(of_members, axis=0) / np.where(counts > 0, counts, np.nan),
        "counterfactual memorization": evidence.counterfactual,
        SUCCESS: success,
        "attack success, in-sample": inside,
        "attack success, in-sample minus leave-one-out": inside - success,
        "simplicity": evidence.simplicity,
    }


TELLING = {LIRA_OF_MEMBERS: 1, "counterfactual memorization": 1, SUCCESS: 1, "simplicity": -1}
"""Proofs that rank examples, and which way they point to what is memorized."""


def proof_rows(judged: Sequence[Judged]) -> list[tuple[Any, ...]]:
    """Return rows of a table: means of each proof over the examples of each kind, and how well it sets some apart."""
    rows: list[tuple[Any, ...]] = []
    for name in judged[0].proved:
        for kind in judged[0].kinds:
            rows.append(mean_row(f"{name}: mean", kind, [each.proved[name][each.kinds[kind]] for each in judged]))
    for name, sign in TELLING.items():
        for what in judged[0].contests:
            parts = [_part(sign * each.proved[name], each.contests[what]) for each in judged]
            interval = attack(*(np.concatenate(side) for side in zip(*parts, strict=True))).auc
            rows.append(table_row(f"AUC of {what}, at the end", name, interval, [auc(*part) for part in parts]))
    return rows


def null_row(judged: Sequence[Judged]) -> tuple[Any, ...]:
    """Return the row of a table: AUC of membership by likelihood ratios when membership is shuffled, over targets."""
    return mean_row("AUC of shuffled membership, at the end", "lira", [each.null for each in judged])


def _part(scores: np.ndarray, contest: Contest) -> tuple[np.ndarray, np.ndarray]:
    chosen = contest.wanted | contest.others
    return scores[chosen], contest.wanted[chosen]
