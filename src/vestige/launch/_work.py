"""The loop that every worker runs: claim a piece, compute it, next; until nothing is left that it could do."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, final

from vestige.errors import PieceFailed, UserError, WorkElsewhere
from vestige.launch._claims import this_worker
from vestige.launch._pieces import (
    Compute,
    Result,
    Stopped,
    WorkPlan,
    check_stop,
    counting,
    stop_signal,
    stopping_at_steps,
)
from vestige.launch._record import Failure, JobFolder, claim_name, make_failure_error, ranges
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings
from vestige.storage import disk_error, remove_strays

POLL_SECONDS = 0.2
"""Between two checks of pieces that others hold."""


@final
class Meter:
    """Turns finished pieces and parts of pieces into units of a progress bar, each counted once."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._sum, self._shown, self._inside = 0.0, 0, 0.0

    def step(self, units: float) -> None:
        """Count `units` of the current piece as done."""
        self._inside += units
        self._move(units)

    def piece(self, weight: float) -> None:
        """Count the current piece of this weight as done, whatever its steps reported."""
        self._move(weight - self._inside)
        self._inside = 0.0

    def undo(self) -> None:
        """Take back the steps of a piece that was left; the bar does not go back, but waits for the piece."""
        self._sum -= self._inside
        self._inside = 0.0

    def _move(self, units: float) -> None:
        self._sum += units
        if (more := round(self._sum) - self._shown) > 0:
            self._shown += more
            self._advance(more)


@final
class Worker:
    """One process's work on one plan; use it as a context, which closes what the plan opened."""

    def __init__(self, plan: WorkPlan[Any], job: JobFolder, retries: int, meter: Meter, *, say: bool = False) -> None:
        self._plan, self._job, self._retries, self._meter, self._say = plan, job, retries, meter, say
        self._stack = ExitStack()
        self._compute: Compute | None = None
        self.last_error: Exception | None = None
        self.failed: dict[int, Failure] = {}
        """How pieces failed in this process."""
        self.stopped_in: int | None = None
        """The piece that was left when the process received a stop signal."""
        self.computed: list[int] = []
        """Pieces that this process finished."""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def work(self, pieces: Sequence[int], *, stay: bool) -> None:
        """Work until every piece is done, given up, or claimed by a live worker.

        Args:
            pieces: Which, in the order in which to try them.
            stay: Also wait for the pieces that others compute, and take them over should they die.

        Raises:
            UserError: One that no retry can fix, from computing a piece.
            Stopped: The process received a stop signal.
        """
        left = list(pieces)
        while left:
            blocked = [piece for piece in left if not self._settle(piece)]
            if len(blocked) == len(left):
                claims = self._job.claims
                if not stay and all(claims.is_beating(claim_name(piece)) for piece in blocked):
                    return
                time.sleep(POLL_SECONDS)
            left = blocked

    def _settle(self, piece: int) -> bool:
        """Return whether nothing more is to be done about the piece; False while another holds it, or to retry it."""
        check_stop()
        if self._is_done(piece):
            return True
        if self._job.is_given_up(piece, self._retries):
            return True
        if piece in self.failed and self.failed[piece].attempts > self._retries:
            return True
        claim = self._job.claims.take(claim_name(piece))
        if claim is None:
            return False
        with claim:
            # Its last owner may have finished it between the two checks.
            return self._is_done(piece) or self._attempt(piece)

    def _is_done(self, piece: int) -> bool:
        done = self._plan.is_done(piece)
        if done:
            self._meter.piece(self._plan.weight(piece))
        return done

    def _attempt(self, piece: int) -> bool:
        weight = self._plan.weight(piece)
        self._print(f"piece {piece}: begun")
        try:
            compute = self._open()
            started = time.perf_counter()
            with counting(self._meter.step):
                compute(piece)
        except UserError as error:
            self._record(piece, error)
            raise
        except Stopped:
            self._meter.undo()
            self.stopped_in = piece
            self._print(f"piece {piece}: left, because the process received a stop signal")
            raise
        except Exception as error:
            if (full := disk_error(error, self._plan.folder)) is not None:
                # It would end every other attempt too, and leave no disk space to count them in.
                self._record(piece, full)
                raise full from error
            self._meter.undo()
            self.last_error = error
            failure = self._record(piece, error)
            self._print(f"piece {piece}: failed\n{failure.traceback}")
            return failure.attempts > self._retries
        seconds = time.perf_counter() - started
        self._job.note(piece, weight, seconds)
        self._job.forget_failure(piece)
        self._meter.piece(weight)
        self.computed.append(piece)
        self._print(f"piece {piece}: done in {seconds:.1f} s")
        return True

    def _record(self, piece: int, error: Exception) -> Failure:
        """Note the failure; its attempts are counted here too, for the disk may not take the note."""
        noted = self._job.record_failure(piece, error)
        before = self.failed[piece].attempts if piece in self.failed else 0
        self.failed[piece] = noted._replace(attempts=max(noted.attempts, before + 1))
        return self.failed[piece]

    def _open(self) -> Compute:
        if self._compute is None:
            started = time.perf_counter()
            self._compute = self._stack.enter_context(self._plan.open())
            self._job.note(-1, 0.0, time.perf_counter() - started)
        return self._compute

    def _print(self, line: str) -> None:
        if self._say:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


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
        raise make_failure_error(plan.name, plan.pieces, failures) from cause


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
