"""Sets of examples, and one ascent: steps up the loss of a set, and what that does to the losses of others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import TokenizedData
from vestige.errors import DataError, ModelError
from vestige.gradients import Reduction
from vestige.methods import Rows, Vector, Weights, compute_losses, loss_weights, shuffle_batches
from vestige.settings import AscentOptimizer

NO_SOURCE = "(no source)"
REDUNDANT = 0.5
"""Half of a source's word sequences are in another one: leaving one of the two out then changes little, although each
scores as if it were alone."""
_WINDOW = 8
_SHINGLES = 200_000
"""Sequences compared per source: enough for a share to within a percent."""

Measure = Callable[[], Float[np.ndarray, "measured"]]
"""Losses of the measured examples under the weights of the moment."""

TESTED_EXAMPLES = 16
"""Of each of the two sets of the self-test: enough for the identity, which holds for any."""
WRONG = 0.25
"""A step that moves the loss by a quarter more or less than its gradient says is not a step along that gradient."""
_RISE = 1e-2
"""How much, in nats, the small step is to raise the loss by: far above rounding, small beside the loss."""
_SAFETY = 4.0
"""Steps are this much shorter than the longest that is stable where every step has other examples."""
_POWER_STEPS = 8
_PROBE = 1e-3
"""Length of a probing step over that of the weights: far above rounding, and curvature stays the same."""


class ExampleSet(NamedTuple):
    """Rows of a data set under one name, which are unlearnt or measured as one."""

    name: str
    rows: Int[np.ndarray, "row"]


class Side(NamedTuple):
    """A data set and the sets in it."""

    data: TokenizedData
    sets: list[ExampleSet]

    @property
    def rows(self) -> Int[np.ndarray, "measured"]:
        """All rows of the sets, ascending, once each."""
        return np.unique(np.concatenate([each.rows for each in self.sets]))

    @property
    def positions(self) -> list[ExampleSet]:
        """The sets with their positions among `rows`."""
        rows = self.rows
        return [ExampleSet(each.name, np.searchsorted(rows, each.rows)) for each in self.sets]


def training_sources(data: TokenizedData, samples: int) -> list[ExampleSet]:
    """Return the sources of the training data, by name, each with at most `samples` rows spread evenly over it.

    Raises:
        DataError: There are fewer than two, so nothing to compare.
    """
    names = np.array([example.source or NO_SOURCE for example in data.examples])
    useful = data.target_counts > 0
    found = [ExampleSet(str(name), np.flatnonzero((names == name) & useful)) for name in sorted(set(names))]
    found = [ExampleSet(each.name, spread(each.rows, samples)) for each in found if len(each.rows)]
    if len(found) < 2:
        raise DataError(
            f"{data.name} has {len(found)} source{'' if len(found) == 1 else 's'} of text, and sources are to be "
            "compared. Give the examples a `source` column, or type --level example to score each of them."
        )
    return found


def test_sets(queries: TokenizedData) -> list[ExampleSet]:
    """Return the queries of each source as a set, in order of appearance; one without a source by itself, under its id.

    Raises:
        DataError: A set has no target token, or an id is also the name of a source.
    """
    members: dict[str, list[int]] = {}
    for row, example in enumerate(queries.examples):
        if example.source is None and example.id in members:
            raise DataError(f"The query {example.id!r} has the name of another test set. Give it another `id`.")
        members.setdefault(example.source or example.id, []).append(row)
    counts = queries.target_counts
    for name, rows in members.items():
        if not counts[rows].any():
            raise DataError(
                f"The test set {name!r} has no token to explain: expected a `text`, or a `prompt` with a `completion`."
            )
    return [ExampleSet(name, np.array(rows)) for name, rows in members.items()]


def set_means(
    values: Float[np.ndarray, "... example"], weights: Float[np.ndarray, "example"], sets: Sequence[ExampleSet]
) -> Float[np.ndarray, "... set"]:
    """Return the sum of the values of each set over the sum of its weights: exact, not a mean of means."""
    return np.stack([values[..., each.rows].sum(-1) / weights[each.rows].sum() for each in sets], axis=-1)


def spread(rows: Int[np.ndarray, "row"], most: int) -> Int[np.ndarray, "row"]:
    """Return at most `most` of the rows, evenly spread."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


class Overlap(NamedTuple):
    """Two sources and how much of the smaller one is in the larger one."""

    one: str
    other: str
    share: float


def find_overlaps(data: TokenizedData, sources: Sequence[ExampleSet]) -> list[Overlap]:
    """Return pairs of sources of which the smaller one is at least half in the larger, most alike first.

    Compared are all sequences of eight tokens (whole examples where they are shorter), or for large sources those with
    the smallest hashes, which are the same ones in every source.
    """
    hashes = {}
    for each in sources:
        distinct = np.unique(np.concatenate([_hash_windows(data.input_ids[row]) for row in each.rows]))
        hashes[each.name] = distinct[:_SHINGLES]
    found = []
    for one, other in combinations(hashes, 2):
        left, right = hashes[one], hashes[other]
        # What both would hold had they been cut at the same hash.
        last = min((side[-1] for side in (left, right) if len(side) == _SHINGLES), default=None)
        if last is not None:
            left, right = left[left <= last], right[right <= last]
        if size := min(len(left), len(right)):
            found.append(Overlap(one, other, len(np.intersect1d(left, right, assume_unique=True)) / size))
    return sorted((each for each in found if each.share >= REDUNDANT), key=lambda each: -each.share)


def _hash_windows(tokens: np.ndarray) -> np.ndarray:
    width = min(_WINDOW, len(tokens))
    if not width:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), width)
    code = np.full(len(windows), width, dtype=np.uint64)
    for column in range(width):
        # The mixing of splitmix64, whose products wrap around on purpose.
        code = (code ^ windows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
    return code


@dataclass(frozen=True)
class AscentRecipe:
    """How the weights climb."""

    learning_rate: float
    steps: int
    batch_size: int
    optimizer: AscentOptimizer = "adam"
    momentum: float = 0.0
    """Of sgd and rmsprop."""
    reduction: Reduction = "sum"
    points: int = 1
    """How often the losses are measured, evenly over the steps and always at the last."""
    mirror: bool = True
    """Also measure the losses on the other side of the start, which separates slope from curvature."""
    seed: int = 0
    token_budget: int = 1024
    """Tokens in one pass; gradients of a larger batch are added up, which changes no step."""
    retain: int = 0
    """Training examples in each step that hold the ascent back; 0 for none."""
    accelerate: bool = False
    """Give steps Nesterov's momentum: towards a summit, where every step has the same examples or many of them."""

    @property
    def looks(self) -> list[int]:
        """The steps after which losses are measured."""
        count = min(self.points, self.steps)
        return sorted({round(self.steps * number / count) for number in range(1, count + 1)})

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return an optimizer that adds what it would subtract: gradients stay the loss's, so the sign is set once."""
        chosen, common = list(parameters), {"lr": self.learning_rate, "maximize": True}
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(chosen, betas=(0.9, 0.999), **common)
            case "rmsprop":
                return torch.optim.RMSprop(chosen, momentum=self.momentum, **common)
            case "adafactor":
                return torch.optim.Adafactor(chosen, weight_decay=0.0, **common)
            case "sgd":
                return torch.optim.SGD(chosen, momentum=self.momentum, **common)


@dataclass(frozen=True)
class Retained:
    """Training data D that an ascent on Z is to leave as it is, apart from what Z itself means to it.

    What is climbed then is `L_Z(θ) - c [L_D(θ) - L_D(θ0) - <∇L_D(θ0), θ - θ0>]`, a Bregman divergence subtracted (the
    proximal objective of Bae et al. 2022, arXiv:2209.05364). Near the start its summit is at θ0 + H^-1 ∇L_Z / c with H
    the curvature of the training loss: the influence function, of which an ascent without it has the gradient alone.
    """

    data: TokenizedData
    rows: Rows
    size: int
    """Examples that are drawn for each step."""
    pull: float
    """Learning rate times c: the share of a direction of curvature 1 that a step takes back."""

    def hold(self, weights: Weights, step: int, recipe: AscentRecipe) -> None:
        """Turn the gradients in `grad` into those of what is climbed; in the first step they are that already."""
        if step == 0:
            return
        climbed = weights.take_gradients()
        here = self._slope(weights, step, recipe)
        with weights.at(weights.start):
            there = self._slope(weights, step, recipe)
        strength = self.pull / recipe.learning_rate
        for name, parameter in weights.parameters.items():
            if name in climbed or name in here:
                nothing = torch.zeros_like(parameter)
                pulled = here.get(name, nothing) - there.get(name, nothing)
                parameter.grad = climbed.get(name, nothing) - strength * pulled

    def _slope(self, weights: Weights, step: int, recipe: AscentRecipe) -> Vector:
        """Return the gradient of the loss of the examples that are drawn for a step."""
        drawn = np.random.default_rng([recipe.seed, step])
        rows = np.sort(drawn.choice(self.rows, min(self.size, len(self.rows)), replace=False))
        return weights.gradient(self.data, rows, recipe.reduction, recipe.token_budget)

    @classmethod
    def measure(cls, weights: Weights, data: TokenizedData, recipe: AscentRecipe) -> "Retained":
        """Measure the largest stable pull: a quarter of the inverse of the largest curvature, by power iteration."""
        rows = np.flatnonzero(data.target_counts > 0)
        probe = cls(data, rows, recipe.retain, 0.0)
        return cls(data, rows, recipe.retain, 1 / (_SAFETY * probe.largest_curvature(weights, recipe)))

    def largest_curvature(self, weights: Weights, recipe: AscentRecipe) -> float:
        """Estimate the largest absolute eigenvalue of the loss's Hessian, from differences of gradients."""
        generator = torch.Generator().manual_seed(recipe.seed)
        reach = _PROBE * max(_product(weights.start, weights.start) ** 0.5, 1.0)
        direction = {
            name: torch.randn(each.shape, generator=generator).to(each) for name, each in weights.parameters.items()
        }
        found = 0.0
        for number in range(_POWER_STEPS):
            scale = reach / _product(direction, direction) ** 0.5
            with weights.at(weights.step(direction, scale)):
                above = self._slope(weights, number, recipe)
            with weights.at(weights.step(direction, -scale)):
                below = self._slope(weights, number, recipe)
            direction = {name: (above[name] - below[name]) / (2 * reach) for name in above}
            found = _product(direction, direction) ** 0.5
        return found


def _product(left: Vector, right: Vector) -> float:
    return float(sum(torch.sum(one.double() * right[name].double()) for name, one in left.items() if name in right))


class Ascent(NamedTuple):
    """What one ascent did; everything is NaN from the step on at which the loss of a batch was not finite."""

    batch_loss: Float[Tensor, "step"]
    """Loss of each step's batch before the step: mean over its weights."""
    after: Float[Tensor, "point measured"]
    mirrored: Float[Tensor, "point measured"]
    """The same with weights as far on the other side of the start; without rows if not requested."""


def ascend(
    weights: Weights,
    data: TokenizedData,
    rows: Rows,
    measure: Measure,
    recipe: AscentRecipe,
    retained: Retained | None = None,
) -> Ascent:
    """Climb the loss of `rows` from the start, measure on the way, and restore the weights.

    Each step is θ ← optimizer(θ, +∇L_batch), L_batch the sum of the losses of the batch's examples over their weights
    (Isonuma and Titov 2024, arXiv:2401.15241, Eq. 5); no clipping, no weight decay, no dropout. With `retained`, the
    loss of training data is held during the ascent. With `recipe.accelerate` steps have Nesterov's momentum, whose
    coefficient is k / (k + 3) after k of them: on a quadratic n steps come as close as about n^2 plain ones, and no
    least curvature need be known (Nesterov 1983; Su, Boyd and Candès 2014, arXiv:1503.01243).
    """
    batches = shuffle_batches(data, rows, recipe.batch_size, recipe.steps, recipe.seed)
    losses = torch.full((recipe.steps,), torch.nan, dtype=torch.float64)
    after: list[np.ndarray] = []
    mirrored: list[np.ndarray] = []
    try:
        last = weights.copy()
        optimizer = recipe.make_optimizer(weights.parameters.values())
        for number, batch in enumerate(batches):
            losses[number] = weights.backward(data, batch, recipe.reduction, recipe.token_budget)
            if not torch.isfinite(losses[number]):
                break
            if retained is not None:
                retained.hold(weights, number, recipe)
            optimizer.step()
            if number + 1 in recipe.looks:
                after.append(measure())
                if recipe.mirror:
                    with weights.at(weights.mirror()):
                        mirrored.append(measure())
            if recipe.accelerate:
                now = weights.copy()
                with torch.no_grad():
                    for name, parameter in weights.parameters.items():
                        parameter.add_(now[name] - last[name], alpha=(number + 1) / (number + 4))
                last = now
    finally:
        weights.restore()
    return Ascent(losses, _fill(after, recipe, measure), _fill(mirrored, recipe, measure, recipe.mirror))


def _fill(found: list[np.ndarray], recipe: AscentRecipe, measure: Measure, wanted: bool = True) -> Tensor:
    """Return the measurements as [point, measured], NaN for those that were not reached."""
    if not wanted:
        return torch.zeros(0, 0, dtype=torch.float64)
    width = len(found[0]) if found else len(measure())
    missing = [np.full(width, np.nan)] * (len(recipe.looks) - len(found))
    return torch.from_numpy(np.stack([*found, *missing]))


class Identity(NamedTuple):
    """Change of loss for each unit of step, over what the gradients say; 1 is right, -1 is descent."""

    own: float
    """For the set that is ascended: its squared gradient is positive, so this has a sign that cannot be doubted."""
    cross: float
    """For another set, as a cosine: its change over the product of the two gradients' lengths."""
    cosine: float
    """Of the two gradients: what `cross` should be."""

    @property
    def error(self) -> float:
        """The distance of both from what they should be."""
        return max(abs(self.own - 1), abs(self.cross - self.cosine))


def first_order_identity(
    weights: Weights, ascended: tuple[TokenizedData, Rows], other: tuple[TokenizedData, Rows], recipe: AscentRecipe
) -> Identity:
    """Test one step of the scoring ascent, with plain SGD: (L(θ+Δ) - L(θ-Δ)) / 2η against <∇L, ∇L_ascended>.

    Raises:
        ModelError: They do not agree: the step goes the wrong way, or not as far as it should.
    """
    own, others = ((data, rows[data.target_counts[rows] > 0][:TESTED_EXAMPLES]) for data, rows in (ascended, other))
    passes = recipe.reduction, recipe.token_budget
    slope = weights.gradient(*own, *passes)
    squared = _product(slope, slope)
    if squared == 0:
        raise ModelError("The gradient of what is to be unlearnt is zero, so nothing would move. Is the model trained?")
    same = {name: getattr(recipe, name) for name in ("reduction", "token_budget", "seed")}
    step = AscentRecipe(_RISE / squared, 1, len(own[1]), "sgd", **same)

    def climb(data: TokenizedData, rows: Rows) -> float:
        """Return the change of the rows' loss per unit of step; even powers of the step cancel."""
        counted = loss_weights(data, step.reduction)[rows].sum()
        losses = partial(compute_losses, weights.model, data, *passes, rows)
        done = ascend(weights, *own, losses, step)
        return float((done.after - done.mirrored).sum()) / counted / 2 / step.learning_rate

    left = weights.gradient(*others, *passes)
    scale = (_product(left, left) * squared) ** 0.5
    cross, cosine = (climb(*others) / scale, _product(left, slope) / scale) if scale else (0.0, 0.0)
    found = Identity(climb(*own) / squared, cross, cosine)
    if found.error <= WRONG:
        return found
    way = "down, not up: it would turn the sign of every score" if found.own < 0 else "not as its gradient says"
    raise ModelError(
        f"The self-test failed: one small step moved the loss {way} (measured / expected: {found.own:.3f} for what is "
        f"unlearnt; for the other set {found.cross:.3f} against {found.cosine:.3f}). Weights in half precision round "
        "small steps away: try --precision float32. Otherwise the model's loss or backward pass is not what it seems."
    )
