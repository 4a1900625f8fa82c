"""How far to climb, without any ground truth: as far as the slope, and not the curvature, decides the scores.

After an ascent from θ to θ+Δ the losses are measured there and at θ-Δ. Half the difference of the two rises is what
the slope contributed (all odd orders in Δ), half their sum what the curvature did (all even orders). The first-order
identity says that influence is the former; curvature grows with the square of the step and takes over in the end, when
the weights are damaged and everything's loss rises alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.errors import NonFinite
from vestige.progress import announce
from vestige.unlearn._job import UntracJob, smaller
from vestige.unlearn._plan import AscentPlan, Ascents

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


class Stop(NamedTuple):
    """The point at which scores are read."""

    point: int
    curvature_share: float | None
    """There; None where nothing was measured on the other side."""


def choose_rate(job: UntracJob) -> float:
    """Choose the learning rate at which curvature changes the scores by a twentieth of what the slope does.

    Trials are ascents of a few sets; from each, the share of curvature at another rate follows in proportion.

    Raises:
        NonFinite: No rate was found at which losses stay finite and change.
    """
    trial = smaller(job, _PROBES, _MEASURED, _EXAMPLES)
    steps = min(job.steps, _STEPS)

    def share_at(rate: float, number: int) -> float:
        plan = AscentPlan(f"Rate {number}", trial, job.recipe(rate, steps=steps, points=1), self_tested=0)
        return curvature_share(trial, plan.run(), -1) * job.steps / steps

    try:
        rate = settled_rate(share_at, _FIRST_RATE[job.settings.optimizer])
    except NonFinite as error:
        if not job.settings.accelerate:
            raise
        raise NonFinite(
            "With --accelerate the losses run away at any learning rate: the training loss curves downwards somewhere, "
            "as that of a model does which is not trained to the end. Leave --accelerate out."
        ) from error
    announce(f"Learning rate: {rate:g}, at which curvature is about {CURVATURE_SHARE:.0%} of slope.")
    return rate


def settled_rate(share_at: Callable[[float, int], float], first: float) -> float:
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


def curvature_share(job: UntracJob, done: Ascents, point: int) -> float:
    """Return curvature over slope in the scores at one point: median over test sets; infinite if losses are not finite.

    What all sources have in common changes no ranking and is left out.
    """
    after, mirrored = done.after[:, point] - done.before, done.mirrored[:, point] - done.before
    slope, bend = _centred(job.table((after - mirrored) / 2)), _centred(job.table((after + mirrored) / 2))
    if not (np.isfinite(slope).all() and np.isfinite(bend).all()):
        return float("inf")
    lengths = np.linalg.norm(slope, axis=1)
    shares = np.linalg.norm(bend, axis=1)[lengths > 0] / lengths[lengths > 0]
    return float(np.median(shares)) if len(shares) else float("inf")


def stopping_point(job: UntracJob, done: Ascents) -> Stop:
    """Return the last point at which the slope still decides the scores; the first one where it never does."""
    points = done.after.shape[1]
    if job.settings.stop == "last":
        return Stop(points - 1, None)
    shares = [curvature_share(job, done, point) for point in range(points)]
    good = [point for point, share in enumerate(shares) if share <= STOP_SHARE]
    point = good[-1] if good else 0
    return Stop(point, shares[point])


def _centred(table: Float[np.ndarray, "test column"]) -> Float[np.ndarray, "test column"]:
    return table - table.mean(1, keepdims=True) if table.shape[1] >= _FEWEST_SOURCES else table
