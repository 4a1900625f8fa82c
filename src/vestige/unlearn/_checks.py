"""What every run says about how far its scores can be trusted."""

from typing import TYPE_CHECKING

from vestige.runs import Check
from vestige.unlearn._rate import STOP_SHARE
from vestige.unlearn._sets import overlaps

if TYPE_CHECKING:
    from vestige.unlearn._untrac import Scored

IDENTITY_WARNS = 0.05
"""Rounding and third-order terms stay below this by far in single precision."""
_SHOWN = 3


def trust_checks(scored: "Scored") -> list[Check]:
    """Return the self-test, slope against curvature, and sources with the same content."""
    return [_identity(scored), _curvature(scored), *_redundant(scored)]


def _identity(scored: "Scored") -> Check:
    worst = max(each.error for each in scored.done.identities)
    reading = f"A small step changes losses as their gradients say, with the right sign, to within {worst:.1%}"
    verdict = "good" if worst <= IDENTITY_WARNS else "warn"
    more = "." if verdict == "good" else ": more than rounding explains. Try --precision float32."
    return Check(name="first-order self-test", value=worst, reading=reading + more, verdict=verdict)


def _curvature(scored: "Scored") -> Check:
    name, share = "curvature against slope", scored.stop.curvature_share
    looks, recipe = scored.recipe.looks, scored.recipe
    read = f"Scores are read after step {looks[scored.stop.point]} of {recipe.steps} at {recipe.learning_rate:g}"
    if share is None:
        return Check(name=name, value=None, reading=f"{read}, as --stop last asks.", verdict="unknown")
    if share <= STOP_SHARE:
        reading = f"{read}, where curvature is {share:.0%} of slope: influence decides them, not damage."
        return Check(name=name, value=share, reading=reading, verdict="good")
    reading = f"{read}, and even there curvature is {share:.0%} of slope. Lower --learning-rate, or leave it out."
    return Check(name=name, value=share, reading=reading, verdict="warn")


def _redundant(scored: "Scored") -> list[Check]:
    job, name = scored.job, "redundant sources"
    if job.settings.level != "source":
        return []
    found = overlaps(job.train.data, job.train.sets)
    if not found:
        return [Check(name=name, value=0.0, reading="No source is half contained in another.", verdict="good")]
    pairs = "; ".join(f"{each.one} and {each.other} ({each.share:.0%})" for each in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more pairs" if len(found) > _SHOWN else ""
    reading = (
        f"Sources share text: {pairs}{more}. Each scores as if it were alone, while leaving one of them out of "
        "training would change little."
    )
    return [Check(name=name, value=found[0].share, reading=reading, verdict="warn")]
