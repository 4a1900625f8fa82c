"""`run_plan`: every piece is done, wherever the settings want it done, and the result is returned."""

import time
from collections.abc import Sequence
from typing import Any, TypeVar

from vestige.errors import PieceFailed, WorkElsewhere
from vestige.launch._failures import failed, ranges
from vestige.launch._loop import POLL_SECONDS, Meter, Worker
from vestige.launch._record import JobFolder
from vestige.launch._role import Role, this_role
from vestige.launch._stop import Stopped, stop_signal, stopping_at_steps
from vestige.launch._types import WorkPlan
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings

Result = TypeVar("Result")


def run_plan(plan: WorkPlan[Result], settings: LaunchSettings, command: Sequence[str] | None) -> Result:
    """The plan's result, once every piece is done.

    Pieces that are done already are left alone; the missing ones are computed in this process, in local worker
    processes, on SLURM, or shared among the ranks of torchrun. Killed at any moment, the same call continues.

    Args:
        plan: What to do.
        settings: Where to do it.
        command: Words of a command that comes to the same call of `run_plan` in another process, as
            `worker_command` makes them; None if there is none, which does for work in this process.

    Raises:
        PieceFailed: Pieces failed every time they were tried; all others are done.
        UserError: One that computing a piece raised, or something about the settings needs the caller.
        WorkElsewhere: This was a share of the work (`shard`, or `wait=False`), and the rest is not done yet.
        SystemExit: This process is a worker, and has done its part.
    """
    role = this_role()
    job = JobFolder.of(plan.folder, plan.name)
    missing = missing_pieces(plan)
    if not missing:
        return plan.reduce()
    job.make()
    return _drive(plan, settings, job, role, missing)


def missing_pieces(plan: WorkPlan[Any]) -> list[int]:
    """Pieces that are not done, in order."""
    return [piece for piece in range(plan.pieces) if not plan.is_done(piece)]


def _drive(plan: WorkPlan[Result], settings: LaunchSettings, job: JobFolder, role: Role, missing: list[int]) -> Result:
    begin(plan, settings, job, missing)
    share = _share(missing, settings.part)
    announce_resumed(plan, missing)
    work_here(plan, settings, job, share, first=role.number)
    return finish(plan, settings, job)


def begin(plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, missing: list[int]) -> None:
    """The job's record says what is to be done; what failed in an earlier run may be tried anew."""
    job.forget_failures()
    weights = [plan.weight(piece) for piece in range(plan.pieces)]
    job.write_job(
        name=plan.name,
        unit=plan.unit,
        pieces=plan.pieces,
        weight=sum(weights),
        engine=settings.engine,
        workers=settings.workers,
        retries=settings.retries,
        begun=time.time(),
        done_before=plan.pieces - len(missing),
        weight_before=sum(weights) - sum(weights[piece] for piece in missing),
        ended=None,
    )


def announce_resumed(plan: WorkPlan[Any], missing: list[int]) -> None:
    """A person sees that earlier work counts."""
    if len(missing) < plan.pieces:
        announce(f"{plan.name}: {plan.pieces - len(missing)} of {plan.pieces} pieces are already done.")


def work_here(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], *, first: int = 0
) -> None:
    """The pieces are done, in this process or by others who work on the plan at the same time.

    Raises:
        PieceFailed: Some failed every time.
    """
    order = [*pieces[first:], *pieces[:first]]
    total = round(sum(plan.weight(piece) for piece in pieces))
    try:
        with (
            stopping_at_steps(),
            progress(total, plan.name, plan.unit) as bar,
            Worker(plan, job, settings.retries, Meter(bar.advance)) as worker,
        ):
            worker.work(order, stay=True)
    except (KeyboardInterrupt, Stopped) as error:
        left = len(missing_pieces(plan))
        announce(
            f"{plan.name}: stopped with {left} of {plan.pieces} pieces missing. "
            "Run the same command again: it computes only these."
        )
        if isinstance(error, Stopped):
            raise SystemExit(128 + (stop_signal() or 0)) from None
        raise
    if failures := [failure for failure in job.failures() if failure.piece in set(pieces)]:
        raise failed(plan.name, plan.pieces, failures) from worker.last_error


def finish(plan: WorkPlan[Result], settings: LaunchSettings, job: JobFolder) -> Result:
    """The result, if every piece is done; one process at a time makes it.

    Raises:
        WorkElsewhere: Pieces of other shares are missing.
        PieceFailed: Pieces are missing though every one was tried.
    """
    missing = missing_pieces(plan)
    if missing and settings.part is not None:
        raise WorkElsewhere(
            f"{plan.name}: share {settings.shard} is done. {len(missing)} of {plan.pieces} pieces belong to other "
            f"shares ({ranges(missing)}). When all shares are done, run the command once without --shard."
        )
    if missing:
        raise PieceFailed(
            f"{plan.name}: {len(missing)} of {plan.pieces} pieces are missing ({ranges(missing)}) though all were "
            "computed: their files vanished. Run the same command again."
        )
    while (claim := job.claims.take("reduce")) is None:
        time.sleep(POLL_SECONDS)
    with claim:
        result = plan.reduce()
        job.write_job(ended=time.time())
    return result


def _share(missing: list[int], part: tuple[int, int] | None) -> list[int]:
    return missing if part is None else [piece for piece in missing if piece % part[1] == part[0]]
