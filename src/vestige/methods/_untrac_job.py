"""What is unlearnt and what is measured: both directions of the same table of test sets and training sources."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from vestige.data import TokenizedData, load_queries
from vestige.errors import NonFinite, SpecError
from vestige.indexes import batch_tokens, read_data
from vestige.jobs import Tensors, run_pieces, tensor_pieces, worker_command
from vestige.methods import Weights, borrow_weights, compute_losses, digest, loss_weights, read_queries
from vestige.methods._plan import open_files
from vestige.methods._untrac_ascent import (
    NO_SOURCE,
    TESTED_EXAMPLES,
    Ascent,
    AscentRecipe,
    ExampleSet,
    Identity,
    Retained,
    Side,
    ascend,
    first_order_identity,
    set_means,
    spread,
    test_sets,
    training_sources,
)
from vestige.models import LoadedModel, load_model
from vestige.progress import announce
from vestige.settings import LaunchSettings, UntracSettings

INVERSE_STEPS, INVERSE_BATCH = 5, 256
"""Isonuma and Titov (2024): UnTrac-Inv has its answer after a few full batches, and fails with single examples."""
RETAINED_STEPS = 40
"""Of UnTrac-Inv where training data hold it back: directions of little curvature take some steps to show as such."""
FORMAT = 1
"""Raised when a piece of the same settings changes its meaning."""
_IGNORED = {"out", "k", "dense", "overwrite", "learning_rate", "points", "stop", "weigh_by_size"}.union(
    LaunchSettings.model_fields
)
"""Settings that decide no ascent by themselves; the recipe has what it needs of them."""
SELF_TESTED = 4
"""Ascents before which the first-order identity is tried: it holds for the code and the model, not for the data."""

CURVATURE_SHARE = 0.05
"""Curvature at the end of an ascent, over slope: scores then correlate with their slope alone at about
1 / sqrt(1 + 0.05^2) = 0.999, and steps are far above the rounding of float32. At 0.2 they would at 0.98, and what is
lost agrees no better with retraining: on corpora other than those reported, shares below 0.1 were as good or better."""
STOP_SHARE = 2 * CURVATURE_SHARE
"""Where curvature is twice what the rate was chosen for, that choice did not hold, and an earlier point is read."""
_FIRST_RATE = {"adam": 1e-3, "rmsprop": 1e-3, "adafactor": 1e-2, "sgd": 1e-1}
_ROUNDS = 6
_PROBES, _MEASURED, _EXAMPLES = 8, 256, 64
"""Ascents to try, sets to measure and examples in each: shares are means over all of them."""
_STEPS = 200
"""Of a trial; a longer ascent is taken to move in proportion."""
_FEWEST_SOURCES = 3
"""With fewer there is no ranking, and what they have in common is all there is."""


@dataclass(frozen=True)
class UntracJob:
    """Training sources (or single examples), test sets, and the model between them."""

    settings: UntracSettings
    loaded: LoadedModel
    train: Side
    tests: Side
    generated: list[bool]
    """Per query: whether the answer is the model's own."""
    asked: str = ""
    """How questions were put, in words, where they became something else than what was typed."""

    @property
    def ascended(self) -> Side:
        """The sets that are unlearnt, one by one."""
        return self.train if self.settings.direction == "untrac" else self.tests

    @property
    def measured(self) -> Side:
        """The sets that are measured on the way."""
        return self.tests if self.settings.direction == "untrac" else self.train

    @property
    def token_budget(self) -> int:
        """Tokens in one pass of the model."""
        return batch_tokens(self.settings, self.loaded)

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return self.settings.batch_size or (1 if self.settings.direction == "untrac" else INVERSE_BATCH)

    @property
    def steps(self) -> int:
        """Steps of each ascent: the same for all, or longer ones would score higher for being longer."""
        if self.settings.steps is not None:
            return self.settings.steps
        if self.settings.direction == "inverse":
            return INVERSE_STEPS if self.settings.retain is None else RETAINED_STEPS
        mean = np.mean([len(each.rows) for each in self.train.sets])
        return max(1, round(float(mean) / self.batch_size))

    def recipe(self, learning_rate: float, *, steps: int | None = None, points: int | None = None) -> AscentRecipe:
        """Return the recipe of the ascents at this rate."""
        settings = self.settings
        same = {name: getattr(settings, name) for name in ("optimizer", "momentum", "seed", "accelerate")}
        return AscentRecipe(
            learning_rate,
            steps or self.steps,
            self.batch_size,
            reduction=settings.loss,
            points=points or settings.points,
            mirror=settings.stop == "auto" or points is not None,
            token_budget=self.token_budget,
            retain=settings.retain or 0,
            **same,
        )

    def table(self, rises: Float[np.ndarray, "ascent measured"]) -> Float[np.ndarray, "test column"]:
        """Return scores of every training source or example for every test set, from rises of measured losses.

        Positive: unlearning raised the loss, so training on it lowers the loss. Nats per token of what is measured (per
        example for `loss=mean`); for single training examples measured one by one, nats of the example's loss.
        """
        side = self.measured
        counted = loss_weights(side.data, self.settings.loss)[side.rows]
        if self.settings.direction == "untrac":
            return set_means(rises, counted, side.positions).T
        if self.settings.level == "example":
            return rises[:, np.concatenate([each.rows for each in side.positions])]
        return set_means(rises, counted, side.positions)

    def curvature_share(self, done: "Ascents", point: int) -> float:
        """Return curvature over slope in the scores at one point, infinite if losses are not finite.

        It is the median over test sets. What all sources have in common changes no ranking and is left out.
        """
        after, mirrored = done.after[:, point] - done.before, done.mirrored[:, point] - done.before
        slope, bend = (self.table(part) for part in ((after - mirrored) / 2, (after + mirrored) / 2))
        if not (np.isfinite(slope).all() and np.isfinite(bend).all()):
            return float("inf")
        if slope.shape[1] >= _FEWEST_SOURCES:
            slope, bend = slope - slope.mean(1, keepdims=True), bend - bend.mean(1, keepdims=True)
        lengths = np.linalg.norm(slope, axis=1)
        shares = np.linalg.norm(bend, axis=1)[lengths > 0] / lengths[lengths > 0]
        return float(np.median(shares)) if len(shares) else float("inf")

    def thin(self) -> "UntracJob":
        """Return the job with fewer sets, and fewer examples in those that are measured: to choose settings by."""

        def thin(side: Side, sets: int, rows: int) -> Side:
            chosen = spread(np.arange(len(side.sets)), sets)
            return Side(
                side.data, [ExampleSet(name, spread(own, rows)) for name, own in (side.sets[i] for i in chosen)]
            )

        ascended, measured = thin(self.ascended, _PROBES, 2**62), thin(self.measured, _MEASURED, _EXAMPLES)
        train, tests = (ascended, measured) if self.settings.direction == "untrac" else (measured, ascended)
        return replace(self, train=train, tests=tests)


def open_untrac_job(settings: UntracSettings) -> UntracJob:
    """Load model, training data and queries, tokenised alike; queries without an answer get the model's own.

    Raises:
        UserError: Something about the model or the data needs the caller.
    """
    loaded = load_model(settings.model, **settings.loading)
    train = read_data(settings, settings.data, loaded)
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    name = settings.queries if isinstance(settings.queries, str) else "queries"
    queries, generated, asked = read_queries(settings, loaded, given, train.examples, chat=settings.chat, name=name)
    return replace(make_job(settings, loaded, train, queries), generated=generated, asked=asked)


def make_job(settings: UntracSettings, loaded: LoadedModel, train: TokenizedData, queries: TokenizedData) -> UntracJob:
    """Make a job on data that is tokenised already.

    Raises:
        DataError: There is nothing to compare or to explain.
        SpecError: Training data are to be retained by an optimizer that cannot, or steps accelerated that lead to no
            summit.
    """
    if settings.retain is not None and settings.optimizer != "sgd":
        raise SpecError(
            f"--retain balances two gradients, and {settings.optimizer} rescales what is left of them. Type "
            "--optimizer sgd with it, or leave --retain out."
        )
    if settings.accelerate and (settings.retain is None or settings.direction != "inverse"):
        # In a pass over a source, one example a step, the first examples would count for more than the last.
        raise SpecError(
            "--accelerate is for ascents that climb the same examples again and again towards a summit: with --retain "
            "and --direction inverse. Type these with it, or leave --accelerate out."
        )
    if settings.accelerate and settings.momentum:
        raise SpecError(
            "--accelerate is a momentum of its own, which follows from the number of steps. Drop --momentum."
        )
    if settings.level == "source":
        columns = training_sources(train, settings.samples)
    else:
        columns = [ExampleSet(example.id, np.array([row])) for row, example in enumerate(train.examples)]
    sides = Side(train, columns), Side(queries, test_sets(queries))
    return UntracJob(settings, loaded, *sides, generated=[False] * len(queries))


class Ascents(NamedTuple):
    """What all ascents did."""

    batch_loss: Float[np.ndarray, "ascent step"]
    before: Float[np.ndarray, "measured"]
    """Losses at the start."""
    after: Float[np.ndarray, "ascent point measured"]
    mirrored: Float[np.ndarray, "ascent point measured"]
    """Losses on the other side of the start; without points if not requested."""
    identities: list[Identity]
    moved: int
    """How many weights moved."""


def run_ascents(name: str, job: UntracJob, recipe: AscentRecipe, tested: int = SELF_TESTED) -> Ascents:
    """Return what one ascent for each set did, each a piece of work, computed from the same start.

    After a kill, the same call continues. Before each of the first `tested` ascents the first-order identity is tried.
    """
    settings, ascended, measured = job.settings, job.ascended, job.measured

    @contextmanager
    def begin() -> Iterator[Callable[[int], Tensors]]:
        lora = {"lora_rank": settings.lora_rank, "seed": settings.seed}
        with borrow_weights(job.loaded, **lora, checkpointing=settings.gradient_checkpointing) as weights:

            def measure() -> Float[np.ndarray, "measured"]:
                return compute_losses(weights.model, measured.data, settings.loss, recipe.token_budget, measured.rows)

            before = torch.from_numpy(measure())
            retained = Retained.measure(weights, job.train.data, recipe) if recipe.retain else None

            def compute(piece: int) -> Tensors:
                rows = ascended.sets[piece].rows
                identity = _test_identity(job, weights, rows, recipe) if piece < tested else ()
                done = ascend(weights, ascended.data, rows, measure, recipe, retained)
                known = {"identity": torch.tensor(identity, dtype=torch.float64), "moved": torch.tensor(weights.count)}
                return {"before": before, **known, **done._asdict()}

            yield compute

    def weigh(piece: int) -> int:
        """Return the number of examples that pass through the model."""
        size, looks = len(ascended.sets[piece].rows), len(recipe.looks) * (2 if recipe.mirror else 1)
        steps = recipe.steps * (min(recipe.batch_size, size) + 2 * recipe.retain)
        return steps + looks * len(measured.rows) + (9 * TESTED_EXAMPLES if piece < tested else 0)

    def collect(pieces: Iterator[Tensors]) -> Ascents:
        read = list(pieces)
        stacked = {name: np.stack([each[name].numpy() for each in read]) for name in Ascent._fields}
        identities = [Identity(*each["identity"].tolist()) for each in read if len(each["identity"])]
        moved = int(read[0]["moved"])
        return Ascents(before=read[0]["before"].numpy(), identities=identities, moved=moved, **stacked)

    recorded = {name: value for name, value in settings.record().items() if name not in _IGNORED}
    sides = [
        (one.data.fingerprint, [(each.name, each.rows.tolist()) for each in one.sets]) for one in (ascended, measured)
    ]
    key = digest(FORMAT, version("vestige"), recorded, job.loaded.fingerprint, sides, asdict(recipe))
    weights = [weigh(piece) for piece in range(len(ascended.sets))]
    pieces = tensor_pieces(name, open_files(settings.out, name, key, len(weights)), weights, begin, collect)
    return run_pieces(pieces, settings, worker_command(settings, "untrac"))


def _test_identity(job: UntracJob, weights: Weights, rows: np.ndarray, recipe: AscentRecipe) -> Identity:
    """Test the first-order identity with the measured set that has most tokens."""
    measured = job.measured
    other = max(measured.sets, key=lambda each: measured.data.target_counts[each.rows].sum())
    return first_order_identity(weights, (job.ascended.data, rows), (measured.data, other.rows), recipe)


class Stop(NamedTuple):
    """The point at which scores are read."""

    point: int
    curvature_share: float | None
    """There; None where nothing was measured on the other side."""


def choose_rate(job: UntracJob) -> float:
    """Choose the learning rate at which curvature changes the scores by a twentieth of what the slope does.

    After an ascent from θ to θ+Δ the losses are measured there and at θ-Δ. Half the difference of the two rises is what
    the slope contributed (all odd orders in Δ), half their sum what the curvature did (all even orders). The
    first-order identity says that influence is the former; curvature grows with the square of the step and takes over
    in the end, when the weights are damaged and everything's loss rises alike. Trials are ascents of a few sets; from
    each, the share of curvature at another rate follows in proportion.

    Raises:
        NonFinite: No rate was found at which losses stay finite and change.
    """
    trial = job.thin()
    steps = min(job.steps, _STEPS)

    def share_at(rate: float, number: int) -> float:
        done = run_ascents(f"Rate {number}", trial, job.recipe(rate, steps=steps, points=1), tested=0)
        return trial.curvature_share(done, -1) * job.steps / steps

    try:
        rate = settle_rate(share_at, _FIRST_RATE[job.settings.optimizer])
    except NonFinite as error:
        if not job.settings.accelerate:
            raise
        raise NonFinite(
            "With --accelerate the losses run away at any learning rate: the training loss curves downwards somewhere, "
            "as that of a model does which is not trained to the end. Leave --accelerate out."
        ) from error
    announce(f"Learning rate: {rate:g}, at which curvature is about {CURVATURE_SHARE:.0%} of slope.")
    return rate


def settle_rate(share_at: Callable[[float, int], float], first: float) -> float:
    """Return the rate at which `share_at(rate, round)`, which grows with the rate, is `CURVATURE_SHARE`, to two digits.

    Raises:
        NonFinite: It is not found.
    """
    rate = first
    for number in range(1, _ROUNDS + 1):
        share = share_at(rate, number)
        factor = CURVATURE_SHARE / share if share > 0 else 100.0
        if 0.5 <= factor <= 2:
            return float(f"{rate * factor:.1e}")
        # Far from the start the losses are no parabola, and an infinite one says nothing but "less".
        rate *= float(np.clip(factor, 0.01, 100)) if np.isfinite(share) else 0.1
    raise NonFinite(
        f"No learning rate was found at which losses change as their slopes say (last tried: {rate:g}). Give one: "
        "--learning-rate 5e-5; or try --precision float32."
    )


def stopping_point(job: UntracJob, done: Ascents) -> Stop:
    """Return the last point at which the slope still decides the scores; the first one where it never does."""
    points = done.after.shape[1]
    if job.settings.stop == "last":
        return Stop(points - 1, None)
    shares = [job.curvature_share(done, point) for point in range(points)]
    good = [point for point, share in enumerate(shares) if share <= STOP_SHARE]
    point = good[-1] if good else 0
    return Stop(point, shares[point])


class Unlearning:
    """Scores, and everything that they were read from."""

    def __init__(self, job: UntracJob) -> None:
        """Run the ascents, at a rate that is chosen first unless it was given.

        Raises:
            NonFinite: A loss overflowed.
            ModelError: The self-test failed, or nothing can move.
        """
        self.job = job
        self.recipe = job.recipe(job.settings.learning_rate or choose_rate(job))
        self.done = run_ascents("Unlearning", job, self.recipe)
        self.stop = stopping_point(job, self.done)
        scores = job.table(self.done.after[:, self.stop.point] - self.done.before)
        if not np.isfinite(scores).all():
            raise NonFinite(
                f"Losses overflowed at the learning rate {self.recipe.learning_rate:g}. Lower it, or leave "
                "--learning-rate out: then one is chosen."
            )
        self.scores: Float[np.ndarray, "test column"] = scores
        if job.settings.weigh_by_size:
            self.scores = scores * _source_shares(job)


def _source_shares(job: UntracJob) -> Float[np.ndarray, "column"]:
    """Return the share of each source in the training data, all of its examples counted, over the mean share."""
    counted = loss_weights(job.train.data, job.settings.loss)
    if job.settings.level == "example":
        sizes = set_means(counted, np.ones_like(counted), job.train.sets)
    else:
        names = np.array([example.source or NO_SOURCE for example in job.train.data.examples])
        sizes = np.array([counted[names == each.name].sum() for each in job.train.sets])
    return sizes / sizes.mean()
