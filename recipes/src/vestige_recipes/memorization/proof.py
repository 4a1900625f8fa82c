"""What is told at the end: membership by every measure of a target, and what a bank proves of each example."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.audit import SIGNS, BankEvidence, attack, lira_in_sample, lira_offline
from vestige.bank import Bank
from vestige_recipes.memorization.judging import Areas, auc, each_seed, mean_interval, members_auc, shown

LATE_SIGNS = SIGNS | {"psmi": 1, "mahalanobis": -1}
"""A member that was learnt lies where its label is expected, and among the others."""
LIRA_OF_MEMBERS, SUCCESS = "LiRA of members, nats", "attack success, leave-one-out"


class Contest(NamedTuple):
    """Examples that should come first, and those that they should be ahead of."""

    wanted: Bool[np.ndarray, "example"]
    others: Bool[np.ndarray, "example"]


Proofs = dict[str, Float[np.ndarray, "example"]]
"""By name, what a bank says of each example."""


def late_scores(
    bank: Bank, late: Sequence[Mapping[str, Float[np.ndarray, "example"]]], evidence: BankEvidence
) -> dict[str, Float[np.ndarray, "target example"]]:
    """Every measure of every target at the end, oriented so that high speaks for membership.

    Args:
        bank: Whose members are the targets.
        late: Measures of each target at the end, of all examples.
        evidence: Of the gaps of the bank.
    """
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


def proofs(bank: Bank, evidence: BankEvidence) -> Proofs:
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
"""Proofs that rank examples, and which way they point to what is known by heart."""


def proof_rows(
    proved: Sequence[Proofs], kinds: Sequence[Mapping[str, np.ndarray]], contests: Sequence[Mapping[str, Contest]]
) -> list[tuple[Any, ...]]:
    """Rows of a table: means of each proof over the examples of each kind, and how well it sets some apart.

    Args:
        proved: Of each draw of examples.
        kinds: The kinds of its examples.
        contests: What is to be set apart in it.
    """
    rows: list[tuple[Any, ...]] = []
    for name in proved[0]:
        for kind in kinds[0]:
            values = [each[name][chosen[kind]] for each, chosen in zip(proved, kinds, strict=True)]
            interval = mean_interval(np.concatenate(values))
            single = each_seed([mean_interval(each).value for each in values])
            rows.append((f"{name}: mean", kind, interval.value, shown(interval), single))
    for name, sign in TELLING.items():
        for what in contests[0]:
            parts = [_part(sign * each[name], chosen[what]) for each, chosen in zip(proved, contests, strict=True)]
            interval = attack(*(np.concatenate(side) for side in zip(*parts, strict=True))).auc
            single = each_seed([auc(*part) for part in parts])
            rows.append((f"AUC of {what}, at the end", name, interval.value, shown(interval), single))
    return rows


def null_row(null: Sequence[Float[np.ndarray, "target"]]) -> tuple[Any, ...]:
    """Row of a table: AUC of membership by likelihood ratios when membership is shuffled, over the targets of draws."""
    interval = mean_interval(np.concatenate(null))
    single = each_seed([float(each.mean()) for each in null])
    return ("AUC of shuffled membership, at the end", "lira", interval.value, shown(interval), single)


def _part(scores: np.ndarray, contest: Contest) -> tuple[np.ndarray, np.ndarray]:
    chosen = contest.wanted | contest.others
    return scores[chosen], contest.wanted[chosen]
