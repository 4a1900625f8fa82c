"""Planted memorization: flipped labels and outliers among clean points, found by each measure.

Small networks are trained on random halves of the points as a bank. Each is a target once: its measures are taken
early, when the median training loss falls below 5 % of its start, on the points it is trained on; what it has memorized
at the end is what the likelihood ratio says, by the models of the other subsets.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from vestige import audit
from vestige.bank import Bank, bank_of

PREDICTORS = ("psmi", "loss", "logit_gap", "mahalanobis")
MEMORIZED = 4.0
"""Likelihood ratio, in nats, from which an example counts as memorized."""


class Size(NamedTuple):
    points: int = 1000
    planted: int = 30
    """Flipped labels, and as many outliers."""
    models: int = 24
    epochs: int = 60
    directions: int = 2000


QUICK = Size(points=240, planted=12, models=8, epochs=30, directions=200)


class Points(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor
    flipped: np.ndarray
    outlying: np.ndarray


def draw_points(size: Size, seed: int) -> Points:
    """Four Gaussian classes in 40 dimensions; the first points flipped, the next far from every class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, size.points)
    centres = draw.normal(size=(4, 40)) * 0.7
    inputs = centres[labels] + draw.normal(size=(size.points, 40))
    rows = np.arange(size.points)
    flipped, outlying = rows < size.planted, (rows >= size.planted) & (rows < 2 * size.planted)
    labels = np.where(flipped, (labels + draw.integers(1, 4, size.points)) % 4, labels)
    inputs[outlying] = 3 * draw.normal(size=(size.planted, 40))
    return Points(torch.from_numpy(inputs).float(), torch.from_numpy(labels), flipped, outlying)


def train(points: Points, size: Size, rows: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One network: the gaps of all points at the end, and its measures of its own points at the trigger."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    head = nn.Linear(128, 4)
    optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
    inputs, labels = points.inputs[rows], points.labels[rows]
    start, early = None, {}
    for epoch in range(size.epochs + 1):
        with torch.no_grad():
            states = body(inputs)
            losses = nn.functional.cross_entropy(head(states), labels, reduction="none")
        start = losses.median() if start is None else start
        if not early and (losses.median() < 0.05 * start or epoch == size.epochs):
            early = _early(states, head(states).detach(), losses, labels, size) | {"epoch": np.full(len(rows), epoch)}
        if epoch < size.epochs:
            for batch in torch.randperm(len(rows)).split(32):
                optimiser.zero_grad()
                nn.functional.cross_entropy(head(body(inputs[batch])), labels[batch]).backward()
                optimiser.step()
    with torch.no_grad():
        gaps = audit.logit_gap(head(body(points.inputs)), points.labels).numpy()
    return gaps, early


def _early(states, logits, losses, labels, size: Size) -> dict[str, np.ndarray]:
    found = audit.psmi(states.numpy(), labels.numpy(), directions=size.directions)
    return {
        "psmi": found.mean,
        "loss": losses.double().numpy(),
        "logit_gap": audit.logit_gap(logits, labels).numpy(),
        "mahalanobis": audit.mahalanobis(states.numpy()),
    }


class Planted(NamedTuple):
    points: Points
    bank: Bank
    early: list[dict[str, np.ndarray]]
    """Of each member: measures of the points that it is trained on, in ascending order, at the trigger."""


def plant(size: Size, seed: int, out: Path) -> Planted:
    """The bank, trained here and now in an empty folder: what is early is not part of a bank and kept aside."""
    points, seen = draw_points(size, seed), {}

    def run(rows: np.ndarray, run_seed: int) -> dict[str, np.ndarray]:
        gaps, seen[rows.tobytes()] = train(points, size, rows, run_seed)
        return {"query_loss": np.zeros(1), "example_gap": gaps}

    settings = {"size": list(size), "points seed": seed}
    bank = bank_of(
        run, examples=size.points, queries=1, out=out, settings=settings, subsets=size.models, seeds=1, seed=seed
    )
    return Planted(points, bank, [seen[np.flatnonzero(row).tobytes()] for row in bank.membership])


def areas(made: Planted, evidence: audit.BankEvidence) -> dict[str, dict[str, np.ndarray]]:
    """AUC of each predictor for each thing to be found, one per target."""
    points, planted = made.points, made.points.flipped | made.points.outlying
    found: dict[str, dict[str, list[float]]] = {}
    for own, score, early in zip(made.bank.membership, evidence.lira, made.early, strict=True):
        wanted = {
            "top 10 % LiRA": score[own] >= np.nanquantile(score[own], 0.9),
            f"LiRA >= {MEMORIZED:g}": score[own] >= MEMORIZED,
            "flips": points.flipped[own],
            "flips + outliers": planted[own],
        }
        for name in PREDICTORS:
            values = audit.EARLY_SIGNS[name] * early[name]
            for what, positives in wanted.items():
                found.setdefault(what, {}).setdefault(name, []).append(audit.attack(values, positives).auc.value)
    return {what: {name: np.array(each) for name, each in row.items()} for what, row in found.items()}


def mean_interval(values: np.ndarray, seed: int = 0) -> str:
    """Mean over targets with the percentiles of 2,000 bootstrap draws of targets."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "none"
    draws = np.random.default_rng(seed).choice(known, (2000, len(known))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{known.mean():.3f} [{low:.3f}, {high:.3f}]"


def untuned(made: Planted) -> tuple[audit.Interval, audit.Interval]:
    """True and false positive rate, over all targets, of flagging PSMI <= 0."""
    planted = made.points.flipped | made.points.outlying
    truth = np.concatenate([planted[own] for own in made.bank.membership])
    flagged = np.concatenate([early["psmi"] <= 0 for early in made.early])
    return (
        audit.share(int(flagged[truth].sum()), int(truth.sum())),
        audit.share(int(flagged[~truth].sum()), int((~truth).sum())),
    )


def report(size: Size, seed: int) -> None:
    with TemporaryDirectory() as folder:
        made = plant(size, seed, Path(folder) / "bank")
    points, bank = made.points, made.bank
    evidence = audit.bank_evidence(bank, of="gap")
    inside = audit.lira_in_sample(bank.values("example_gap"), bank.membership)
    kinds = {"clean": ~(points.flipped | points.outlying), "flips": points.flipped, "outliers": points.outlying}
    epochs = [early["epoch"][0] for early in made.early]
    print(
        f"{size}, seed {seed}; trigger after epoch {int(np.median(epochs))} (median); LiRA not computable: "
        f"{evidence.uncomputable}\n"
    )
    print("| AUC, mean over targets | " + " | ".join(PREDICTORS) + " |\n|:--|" + ":--|" * len(PREDICTORS))
    for what, row in areas(made, evidence).items():
        print(f"| {what} | " + " | ".join(mean_interval(row[name]) for name in PREDICTORS) + " |")
    print("\n| points | attack success, leave-one-out | in-sample | counterfactual gap |\n|:--|:--|:--|:--|")
    for name, rows in kinds.items():
        success, judges = evidence.success.success[rows], inside.success[rows]
        print(
            f"| {name} | {mean_interval(success)} | {np.nanmean(judges):.3f} | "
            f"{np.nanmean(evidence.counterfactual[rows]):.1f} |"
        )
    draw = np.random.default_rng(seed)
    shuffled = np.stack([draw.permutation(row) for row in bank.membership])
    null = audit.lira_of_members(bank.values("example_gap"), shuffled)
    lines = {
        "PSMI <= 0 on planted, TPR": untuned(made)[0],
        "PSMI <= 0 on the others, FPR": untuned(made)[1],
        "counterfactual, AUC of planted": audit.attack(evidence.counterfactual, ~kinds["clean"]).auc,
        "LiRA, AUC of membership": audit.attack(evidence.lira.ravel(), bank.membership.ravel()).auc,
        "the same, membership shuffled": audit.attack(null.ravel(), shuffled.ravel()).auc,
    }
    print()
    for name, (value, low, high) in lines.items():
        print(f"- {name}: {value:.3f} [{low:.3f}, {high:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    report(QUICK if chosen.quick else Size(), chosen.seed)


if __name__ == "__main__":
    main()
