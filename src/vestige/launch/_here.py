"""A work plan in this process, piece after piece."""

from typing import TypeVar

from vestige.launch._types import WorkPlan
from vestige.progress import announce, progress

Result = TypeVar("Result")


def run_here(plan: WorkPlan[Result]) -> Result:
    """The plan's result; pieces that are done already are not computed again."""
    missing = [piece for piece in range(plan.pieces) if not plan.is_done(piece)]
    if len(missing) < plan.pieces:
        announce(f"{plan.name}: {plan.pieces - len(missing)} of {plan.pieces} pieces are already done.")
    if missing:
        with plan.open() as compute, progress(round(sum(map(plan.weight, missing))), plan.name) as bar:
            for piece in missing:
                compute(piece)
                bar.advance(round(plan.weight(piece)))
    return plan.reduce()
