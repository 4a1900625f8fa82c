"""Work in this process, and what every way of working ends with: the pieces that failed, and the result."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vestige.errors import PieceFailed, WorkElsewhere
from vestige.launch._failures import failed, ranges
from vestige.launch._identity import this_worker
from vestige.launch._loop import POLL_SECONDS, Meter, Worker
from vestige.launch._record import Failure, JobFolder
from vestige.launch._stop import Stopped, stop_signal, stopping_at_steps
from vestige.launch._types import WorkPlan
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings
from vestige.storage import remove_strays

Result = TypeVar("Result")


def missing_pieces(plan: WorkPlan[Any]) -> list[int]:
    """Return the pieces that are not done, in order."""
    return [piece for piece in range(plan.pieces) if not plan.is_done(piece)]


def begin(plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, missing: list[int]) -> None:
    """Write what is to be done into the job's record; what failed in an earlier run may be tried again."""
    job.make()
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
        driver=list(this_worker()),
        ended=None,
        cancelled=None,
    )
    if len(missing) < plan.pieces:
        announce(f"{plan.name}: {plan.pieces - len(missing)} of {plan.pieces} pieces are already done.")


def from_own_end(pieces: Sequence[int], number: int, of: int) -> list[int]:
    """Return a worker's order: its own share first, every `of`-th piece, and then the others' to help them."""
    return [*pieces[number::of], *(piece for place, piece in enumerate(pieces) if place % of != number)]


def work_here(plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int]) -> None:
    """Do the pieces, in this process or by others that work on the plan at the same time.

    Raises:
        PieceFailed: Some failed every time.
        SystemExit: The process received a stop signal.
    """
    total = round(sum(plan.weight(piece) for piece in pieces))
    error, noted = None, dict[int, Failure]()

    def work() -> None:
        nonlocal error, noted
        with (
            progress(total, plan.name, plan.unit) as bar,
            Worker(plan, job, settings.retries, Meter(bar.advance)) as worker,
        ):
            worker.work(pieces, stay=True)
            error, noted = worker.last_error, worker.failed

    ending_well(plan, work)
    raise_failures(plan, job, pieces, error, noted)


def ending_well(plan: WorkPlan[Any], work: Callable[[], None]) -> None:
    """Do `work`; if it is stopped, print how to go on."""
    try:
        with stopping_at_steps():
            work()
    except (KeyboardInterrupt, Stopped) as error:
        left = len(missing_pieces(plan))
        announce(
            f"{plan.name}: stopped with {left} of {plan.pieces} pieces missing. "
            "Run the same command again: it computes only these."
        )
        if isinstance(error, Stopped):
            raise SystemExit(128 + (stop_signal() or 0)) from None
        raise


def raise_failures(
    plan: WorkPlan[Any],
    job: JobFolder,
    pieces: Sequence[int],
    cause: BaseException | None = None,
    own: Mapping[int, Failure] = {},
) -> None:
    """Raise if some of the pieces failed for good.

    Args:
        plan: What was to be done.
        job: Where failures are noted.
        pieces: The pieces to check.
        cause: The last error of this process.
        own: Failures in this process, which the disk may not have taken.

    Raises:
        UserError: They did.
    """
    among = set(pieces)
    noted = {**own, **{each.piece: each for each in job.failures()}}
    failures = [noted[piece] for piece in sorted(noted) if piece in among and not plan.is_done(piece)]
    if failures:
        raise failed(plan.name, plan.pieces, failures) from cause


def finish(plan: WorkPlan[Result], settings: LaunchSettings, job: JobFolder) -> Result:
    """Return the result, if every piece is done; one process at a time makes it.

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
        # A worker that was killed while it wrote leaves its temporary file, and no process computes that piece again
        # here.
        remove_strays(plan.folder)
        result = plan.reduce()
        job.write_job(ended=time.time())
    return result
