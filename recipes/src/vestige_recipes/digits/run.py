"""Linear datamodeling scores of every gradient method on handwritten digits, from one bank of halves.

The evaluation of GraSS (Hu et al. 2025, arXiv:2505.18976) on an MLP, small enough for exact influence beside every
sketch of it. Unlike there, the models that scores are computed on are none of the bank's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev

from vestige.banks import Bank
from vestige.curvature import DAMPING, FisherBlock, FisherBlocks
from vestige.evaluate import Estimate, Lds, ceiling, choose_held_out
from vestige.progress import announce
from vestige_recipes.common.halves import Scored, judge_scores, make_bank, train_halves
from vestige_recipes.digits.scores import (
    CLASSES,
    EXACT,
    PIXELS,
    RECIPE,
    Digits,
    Images,
    accuracy,
    average_models,
    compress_influence,
    digits,
    exact_influence,
    layer_methods,
    losses_of,
    measure_gradients,
    network,
    opponents,
    query_losses,
)
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study, show_interval

PENALTY = 0.01
_CONVERGED = 1e-11


class LeftOut(NamedTuple):
    """Rise of every query's loss when an example is left out of training, in nats."""

    predicted: Float[np.ndarray, "query example"]
    true: Float[np.ndarray, "query example"]

    @property
    def agreement(self) -> float:
        """Pearson correlation over the examples, mean over queries."""
        pairs = zip(self.predicted, self.true, strict=True)
        return float(np.mean([np.corrcoef(predicted, true)[0, 1] for predicted, true in pairs]))


def leave_one_out(digits: Digits, count: int) -> LeftOut:
    """For the first `count` examples, of logistic regression `sum_i loss_i / n + PENALTY / 2 |w|^2`, in float64.

    Predicted: `g_query^T (H + PENALTY I)^-1 g_example / n`, H the Hessian of the mean loss (Koh and Liang 2017,
    arXiv:1703.04730). True: the weights that minimise the sum without the example, to the last digits.
    """
    # A column of ones stands for the bias, which is penalised like the rest.
    train, queries = (
        images._replace(inputs=nn.functional.pad(images.inputs.double(), (0, 1), value=1.0)) for images in digits
    )
    size, everyone = len(train.labels), torch.ones(len(train.labels), dtype=torch.float64)
    weights = torch.zeros(CLASSES * (PIXELS + 1), dtype=torch.float64)
    curvature = _curvature(weights, train)
    # Newton's steps to the optimum, each with the curvature where it is.
    while float((slope := _slope(weights, train, everyone)).norm()) > _CONVERGED:
        weights = weights - curvature.precondition(slope[None], PENALTY)[0]
        curvature = _curvature(weights, train)
    inverse, before, true = curvature.inverse(PENALTY), _losses(weights, queries), []
    for row in range(count):
        kept = everyone.clone()
        kept[row] = 0.0
        # The curvature of all of them points close enough to the optimum for the others.
        other = weights
        while float((slope := _slope(other, train, kept)).norm()) > _CONVERGED:
            other = other - inverse.apply(slope[None])[0]
        true.append(_losses(other, queries) - before)
    examples, asked = (
        jacrev(partial(_losses, images=images))(weights) for images in (train.at(np.arange(count)), queries)
    )
    predicted = curvature.precondition(asked, PENALTY) @ examples.T / size
    return LeftOut(predicted.numpy(), torch.stack(true, dim=1).numpy())


def _losses(weights: Float[Tensor, "n"], images: Images) -> Float[Tensor, "example"]:
    return losses_of(lambda inputs: inputs @ weights.view(CLASSES, -1).T, images)


def _slope(weights: Float[Tensor, "n"], train: Images, kept: Float[Tensor, "example"]) -> Float[Tensor, "n"]:
    """Gradient of the mean loss of those that are kept, over the number of all, with the penalty."""
    return grad(lambda at: (_losses(at, train) * kept).mean() + PENALTY / 2 * at.square().sum())(weights)


def _curvature(weights: Float[Tensor, "n"], train: Images) -> FisherBlocks:
    """Second derivatives of the mean loss; a damping is added to them as it is."""
    matrix = hessian(lambda at: _losses(at, train).mean())(weights)
    return FisherBlocks((FisherBlock("weights", matrix, unit=1.0),), (slice(0, len(weights)),))


ABOVE_DOT, LIKE_EXACT, NRMSE_ROOT, LEFT_OUT = 1.8, 0.97, 1.3, 0.99
"""Expected of exact influence over grad-dot, of GraSS over exact, of a sketch's NRMSE times the root of its size, and
of predicted against true leave-one-out."""
GRASS_SIZE = 1024
BEST = f"{EXACT}, best damping"
"""Chosen on a tenth of the queries by their truth, judged on the others."""
OPPONENTS = ("grad-dot", "grad-cos", "rep-sim", "random")


@dataclass(frozen=True)
class DigitsPlan:
    """One size of the study."""

    examples: int
    queries: int
    epochs: int
    subsets: int
    sizes: tuple[int, ...]
    """Numbers that a sketch keeps of the whole gradient."""
    models: int
    """That TRAK averages over, each trained on a half of its own."""
    left_out: int
    """Examples that logistic regression is trained without, one at a time."""
    hidden: tuple[int, int] = (64, 32)
    """Widths of the network's hidden layers."""
    draws: int = 1000
    sketches: int = 5
    """Of every kind and size, which differ in their seeds."""


PLANS = {
    "tiny": DigitsPlan(80, 20, 2, 4, (16,), 2, 5, hidden=(8, 8), draws=20, sketches=2),
    "pocket": DigitsPlan(1000, 200, 30, 50, (64, 256, 1024, 4096), 5, 200),
}


class Judged(NamedTuple):
    """A method and how well it predicts retraining."""

    scored: Scored
    """Of the first draw, where it is a sketch; so is `lds`."""
    lds: Lds
    by_draw: tuple[float, ...]
    """Linear datamodeling score of each draw of the sketch; of the only one for other methods."""
    nrmse: tuple[float, ...]
    """Of each draw; empty for other methods."""

    @property
    def row(self) -> tuple[Any, ...]:
        """What the table shows of it."""
        seeds = " ".join(f"{one:.3f}" for one in self.lds.seeds)
        nrmse = f"{np.mean(self.nrmse):.3f}" if self.nrmse else ""
        sketches = over_draws(self.by_draw)
        shown = f"{sketches.value:.3f} ({show_interval(sketches)})" if self.nrmse else ""
        head = (self.scored.name, self.lds.estimate.value, show_interval(self.lds.estimate), seeds, shown, nrmse)
        return (*head, self.scored.numbers, round(self.scored.seconds, 1))


def over_draws(values: Sequence[float]) -> Estimate:
    """Mean over draws of a sketch with Student's 95 % interval; its ends are NaN for a single draw."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - half, mean + half)


@register_study(PLANS)
def digits_study(settings: StudySettings) -> Outcome:
    """How well each method ranks halves of the data by what networks trained on them lose, with intervals."""
    plan = PLANS[settings.size]
    data = digits(plan.examples, plan.queries, settings.seed)
    truth = _bank(settings, plan, data)
    asked = network(data.train, settings.own_seed, plan.epochs, plan.hidden)
    reading = accuracy(asked, data.queries)
    announce(f"The model that is asked reads {reading:.1%} of the queries rightly.")
    judged = _all_judged(_all_scores(settings, plan, data, asked, truth), truth, plan)
    top = ceiling(truth.query_losses, truth.subsets, truth.seeds)
    left = leave_one_out(data, plan.left_out)
    details = {
        "plan": asdict(plan),
        "accuracy": reading,
        "ceiling": top._asdict(),
        "leave_one_out_agreement": left.agreement,
        "methods": [_details(each) for each in judged],
    }
    intervals = {each.scored.name: each.lds.estimate for each in judged}
    lines = {"ceiling from retraining": top.whole}
    label = "linear datamodeling score (95 % interval)"
    draw_intervals(settings.out, "digits", intervals, label, beside=OPPONENTS, lines=lines)
    rows: list[tuple[Any, ...]] = [("noise ceiling", top.whole, *[""] * 6)]
    rows += [each.row for each in judged]
    over = f"mean of {plan.sketches} sketches"
    columns = ("method", "LDS", "95 % interval", "single seeds", over, "NRMSE", "numbers", "seconds")
    # A few epochs of a few models show that everything runs, and nothing else.
    gates = [] if plan == PLANS["tiny"] else _gates({each.scored.name: each for each in judged}, left.agreement)
    return Outcome(columns, rows, gates, details)


def _bank(settings: StudySettings, plan: DigitsPlan, data: Digits) -> Bank:
    def train(rows: np.ndarray, seed: int) -> np.ndarray:
        return query_losses(network(data.train.at(rows), seed, plan.epochs, plan.hidden), data.queries)

    identity = {"data": data.digest, "hidden": plan.hidden, "epochs": plan.epochs, **RECIPE}
    return make_bank(settings, train, plan.examples, plan.queries, plan.subsets, identity)


def _all_scores(
    settings: StudySettings, plan: DigitsPlan, data: Digits, asked: nn.Module, truth: Bank
) -> Iterator[Scored]:
    """Exact influence at the default damping comes first, its grid after it, then everything else."""
    found, seed = measure_gradients(asked, data), settings.seed
    grid, seconds = exact_influence(found)
    yield from grid.values()
    yield _choose(grid, truth)._replace(seconds=seconds)
    yield from compress_influence(found, plan.sizes, seed, plan.sketches)
    yield from layer_methods(asked, data, found, seed)
    yield from average_models([asked], data, seed, "1 model")

    def fit(rows: np.ndarray, own: int) -> nn.Module:
        return network(data.train.at(rows), own, plan.epochs, plan.hidden)

    halves = train_halves(fit, plan.examples, plan.models, settings.own_seed)
    yield from average_models(halves, data, seed, f"{plan.models} models of halves")
    yield from opponents(asked, data, found, seed)


def _choose(grid: dict[float, Scored], truth: Bank) -> Scored:
    """Exact influence at the damping that does best on a tenth of the queries, which are NaN here."""
    found = list(grid.items())
    best, others = choose_held_out([judge_scores(each.scores, truth, 0).per_query for _, each in found])
    damping, scored = found[best]
    scores = np.full_like(scored.scores, np.nan)
    scores[others] = scored.scores[others]
    return scored._replace(name=f"{BEST} ({damping:g})", scores=scores)


def _all_judged(found: Iterator[Scored], truth: Bank, plan: DigitsPlan) -> list[Judged]:
    """All draws of a sketch together, as the first one; scores are not kept longer than they are looked at."""
    judged: dict[str, Judged] = {}
    for scored in found:
        own = () if scored.nrmse is None else (scored.nrmse,)
        # On the queries that have scores: some chose the damping.
        known = ~np.isnan(scored.scores).any(1)
        lds = judge_scores(scored.scores, truth, 0 if scored.draw else plan.draws, queries=known)
        before = judged.get(scored.name, Judged(scored, lds, (), ()))
        more = {"by_draw": (*before.by_draw, lds.estimate.value), "nrmse": (*before.nrmse, *own)}
        judged[scored.name] = before._replace(**more)
    return list(judged.values())


def _details(each: Judged) -> dict[str, Any]:
    scored = each.scored
    own = {"name": scored.name, "seconds": scored.seconds, "numbers": scored.numbers, "nrmse": each.nrmse}
    own |= {"lds by sketch": each.by_draw if each.nrmse else ()}
    return own | {"lds": each.lds.estimate._asdict(), "seeds": each.lds.seeds, "undefined": each.lds.undefined}


def _gates(judged: dict[str, Judged], agreement: float) -> list[Gate]:
    def of(name: str) -> Estimate:
        return judged[name].lds.estimate

    exact, dot = of(f"{EXACT}, damping {DAMPING:g}"), of("grad-dot")
    grass = float(np.mean(judged[f"influence, GraSS x4 {GRASS_SIZE}"].by_draw))
    worst = max(
        max(each.nrmse) * each.scored.numbers**0.5
        for name, each in judged.items()
        if each.nrmse and name.startswith(("influence, Gauss", "influence, SJLT"))
    )
    over = f"GraSS {GRASS_SIZE}: mean LDS of all sketches over exact influence's, each at the default damping"
    return [
        Gate("exact influence: lower end of its interval above grad-dot's upper end by", exact.low - dot.high, ">="),
        Gate("exact influence: LDS over grad-dot's", exact.value / dot.value, ">=", ABOVE_DOT),
        Gate(over, grass / exact.value, ">=", LIKE_EXACT),
        Gate("Gauss and SJLT: largest NRMSE times the root of the size", worst, "<=", NRMSE_ROOT),
        Gate("logistic regression: predicted with true leave-one-out", agreement, ">=", LEFT_OUT),
    ]
