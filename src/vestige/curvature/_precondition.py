"""`vestige precondition`: the curvature of an index, and its damped inverse applied to the gradients."""

from vestige.curvature._cache import fisher_of
from vestige.curvature._fisher import DampedInverse, FisherBlocks
from vestige.curvature._ifvp import PreconditionedPlan
from vestige.indexes import Index
from vestige.launch import phase, profile, run_plan, worker_command, write_profile
from vestige.settings import PreconditionSettings, verb


@verb(PreconditionSettings)
def precondition(settings: PreconditionSettings) -> FisherBlocks:
    """Compute the Fisher matrix of every component of an index; with `out` also `(F + d I)^-1 g` of every row.

    The matrices are kept beside the index. `vestige attribute --method influence` does the first by itself when it is
    missing, and never needs the second. Killed at any moment, the same call continues.

    Raises:
        UserError: Something about the index, the damping or the disk needs the caller.
    """
    index, command = Index.open(settings.index), worker_command(settings, "precondition")
    with profile(settings.profile) as measured:
        fisher = fisher_of(index, settings, command)
        with phase("Inverse", "components") as done:
            inverse = fisher.inverse(settings.damping)
            done.append(len(fisher.blocks))
        if settings.out is not None:
            _precondition_rows(index, inverse, settings, command)
    write_profile(measured, settings.out or index.folder / "curvature")
    return fisher


def _precondition_rows(
    index: Index, inverse: DampedInverse, settings: PreconditionSettings, command: list[str] | None
) -> None:
    assert settings.out is not None
    plan = PreconditionedPlan(index, inverse, settings.damping, settings.out, settings.dtype)
    plan.prepare()
    with phase(plan.name, plan.unit) as done:
        done.extend(round(plan.weight(piece)) for piece in range(plan.pieces) if not plan.is_done(piece))
        run_plan(plan, settings, command)
