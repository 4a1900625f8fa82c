"""`run_pieces`: every piece is done, wherever the settings want it done, and the result is returned."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from vestige.distributed import broadcast_from_rank0, in_process_group, is_rank0, lost_process
from vestige.errors import PieceFailed, VestigeError, WorkElsewhere
from vestige.jobs._engine import ENGINES, Work, Worker, ending_well, raise_failures, watch_markers
from vestige.jobs._pieces import Compute, Pieces, Result
from vestige.jobs._record import JobFolder, ranges
from vestige.jobs._steps import Stopped, phase, stop_signal, stopping_at_steps
from vestige.jobs._worker import Role, is_alive, require_command, this_role, this_worker
from vestige.progress import announce
from vestige.settings import LaunchSettings
from vestige.storage import remove_strays


def run_pieces(pieces: Pieces[Result], settings: LaunchSettings, command: Sequence[str] | None) -> Result:
    """Return the result of the pieces, once every piece is done.

    Pieces that are done already are left alone; the missing ones are computed in this process, by an engine's workers,
    or shared among the ranks of torchrun. Killed at any moment, the same call continues.

    Args:
        pieces: What to do.
        settings: Where to do it.
        command: Words of a command that comes to the same call in another process, as `worker_command` makes them;
            None if there is none, which does for work in this process.

    Raises:
        PieceFailed: Pieces failed every time they were tried; all others are done.
        UserError: One that computing a piece raised, or something about the settings needs the caller.
        WorkElsewhere: This was a share of the work (`shard`, or `wait=False`), and the rest is not done yet.
        SystemExit: This process is a worker, and has done its part.
    """
    role, job = this_role(), JobFolder.of(pieces.folder, pieces.name)
    if in_process_group():
        return _run_in_process_group(pieces, lambda announcing: _drive(announcing, settings, job, role, command))
    if role.kind in ("worker", "reduce") and Path(role.job) == job.path.resolve():
        work = Work(pieces, settings, job, pieces.missing(), command or ())
        if role.kind == "worker":
            _serve(work, role)
        ENGINES.find(settings.engine).follow_up(work, role)
        return _finish(pieces, settings, job)
    missing = pieces.missing()
    if not missing:
        # A process that was killed while it made the result has left its lock.
        (job.path / "reduce.lock").unlink(missing_ok=True)
        return pieces.reduce()
    if role.kind == "worker":
        raise PieceFailed(f"{pieces.name}: pieces {ranges(missing)} are missing, on which what comes next builds.")
    return _drive(pieces, settings, job, role, command)


def run_with_rate(pieces: Pieces[Result], settings: LaunchSettings, command: Sequence[str] | None) -> Result:
    """Return the result as `run_pieces` does, and print the rate of what was missing."""
    with phase(pieces.name, pieces.unit) as done:
        done.extend(round(pieces.weights[piece]) for piece in pieces.missing())
        return run_pieces(pieces, settings, command)


def _drive(
    pieces: Pieces[Result], settings: LaunchSettings, job: JobFolder, role: Role, command: Sequence[str] | None
) -> Result:
    """Do the work of the process that a person started, or of one rank among several."""
    missing = pieces.missing()
    share = [piece for piece in pieces.share(*(settings.part or (0, 1))) if piece in missing]
    work = Work(pieces, settings, job, share, command or ())
    if role.kind == "rank":
        if role.number == 0:
            _begin(work, missing)
        job.make()
        _work_as_rank(work, role)
    elif settings.engine == "local" and settings.workers == 1:
        _work_here(_begin(work, missing))
    else:
        engine = ENGINES.find(settings.engine)
        work = _begin(replace(work, command=require_command(command)), missing)
        engine.wait(work, engine.submit(work))
        raise_failures(work)
    return _finish(pieces, settings, job)


def _begin(work: Work, missing: Sequence[int]) -> Work:
    """Write what is to be done into the job's record; what failed in an earlier run may be tried again.

    Return the work, from its end where another command is doing the same: the two meet in the middle.
    """
    pieces, job = work.pieces, work.job
    job.make()
    job.forget_failures()
    total = sum(pieces.weights)
    with _one_at_a_time(job):
        before = job.record()
        job.write_job(
            name=pieces.name,
            unit=pieces.unit,
            pieces=pieces.count,
            weight=total,
            begun=time.time(),
            done_before=pieces.count - len(missing),
            weight_before=total - sum(pieces.weights[piece] for piece in missing),
            driver=list(this_worker()),
            ended=None,
            cancelled=None,
        )
    if len(missing) < pieces.count:
        announce(f"{pieces.name}: {pieces.count - len(missing)} of {pieces.count} pieces are already done.")
    driver = None if before is None or before.ended else before.driver
    is_shared = driver is not None and driver != this_worker() and is_alive(driver) is not False
    return replace(work, missing=work.missing[::-1]) if is_shared else work


def _work_here(work: Work) -> None:
    """Compute the missing pieces in this process; raise what failed."""
    with ending_well(work.pieces), work.bar() as bar, Worker(work, bar.advance) as worker:
        worker.compute(work.missing)
    raise_failures(work, worker.last_error, worker.failed)


def _work_as_rank(work: Work, role: Role) -> None:
    """Compute this rank's share of the pieces, and wait for those of the other ranks."""
    # Of all pieces: one rank may find fewer of them missing than another.
    share = work.pieces.share(*(work.settings.part or (0, 1)))[role.number :: role.of]
    _work_here(replace(work, missing=[piece for piece in work.missing if piece in share]))
    with ending_well(work.pieces):
        if left := [piece for piece in work.missing if not work.is_over(piece)]:
            announce(f"{work.pieces.name}: waiting for the other ranks, which have {len(left)} pieces to do.")
            # The first rank removes the folder of a run with its pieces, maybe before this one has noticed the last.
            watch_markers(replace(work, missing=left), work.job.path.exists)
    raise_failures(work)


def _serve(work: Work, role: Role) -> NoReturn:
    """Compute the share of one of several workers, and end the process: with 128 + the signal that stopped it, or 0."""
    worker = Worker(work)
    try:
        with stopping_at_steps(role.parent), worker:
            listed = json.loads(Path(role.shares).read_bytes()) if role.shares else range(work.pieces.count)
            worker.compute(listed[role.number :: role.of])
    except Stopped:
        ENGINES.find(work.settings.engine).restart(work.job, worker)
        number = stop_signal() or 0
        print(f"stopped by signal {number} after {worker.computed} pieces", flush=True)
        raise SystemExit(128 + number) from None
    raise SystemExit(0)


def _finish(pieces: Pieces[Result], settings: LaunchSettings, job: JobFolder) -> Result:
    """Return the result, if every piece is done; one process at a time makes it."""
    missing = pieces.missing()
    if missing and settings.part is not None:
        raise WorkElsewhere(
            f"{pieces.name}: share {settings.shard} is done. {len(missing)} of {pieces.count} pieces belong to other "
            f"shares ({ranges(missing)}). When all shares are done, run the command once without --shard."
        )
    if missing:
        raise PieceFailed(
            f"{pieces.name}: {len(missing)} of {pieces.count} pieces are missing ({ranges(missing)}) though all were "
            "computed: their files vanished. Run the same command again."
        )
    with _one_at_a_time(job):
        # A worker that was killed while it wrote leaves its temporary file, and no process computes that piece again
        # here.
        remove_strays(pieces.folder)
        result = pieces.reduce()
        job.write_job(ended=time.time())
    return result


@contextmanager
def _one_at_a_time(job: JobFolder) -> Iterator[None]:
    """Hold a lock of the system, which goes with the process; where the disk has none, go on without."""
    path = job.path / "reduce.lock"
    with ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)


def _run_in_process_group(pieces: Pieces[Result], drive: Callable[[Pieces[Result]], Result]) -> Result:
    """Return the result of pieces that each take all processes, because the model is sharded over them.

    Rank 0 drives as it would alone, and broadcasts what the others do next: the number of a piece, None when nothing
    is left, or the message when the rest is for others. Failures and the record of the job are rank 0's. A piece that
    fails is not tried again: the others may be in the middle of it, so the command ends.
    """
    if not broadcast_from_rank0(pieces.missing):
        return pieces.reduce()

    @contextmanager
    def open_and_announce() -> Iterator[Compute]:
        with _open_late(pieces) as compute:

            def announce_and_compute(piece: int) -> None:
                _broadcast(piece)
                compute(piece)

            yield announce_and_compute

    if is_rank0():
        try:
            result = drive(replace(pieces, open=open_and_announce))
        except WorkElsewhere as note:
            _broadcast(str(note))
            raise
        _broadcast(None)
        return result
    with _open_late(pieces) as compute:
        while isinstance(order := _broadcast(None), int):
            compute(order)
    if order is not None:
        raise WorkElsewhere(order)
    return pieces.reduce()


@contextmanager
def _open_late(pieces: Pieces[Any]) -> Iterator[Compute]:
    """Open what computes a piece with the first piece: placing hooks may take a pass over the model by all."""
    with ExitStack() as stack:
        opened: list[Compute] = []

        def compute(piece: int) -> None:
            try:
                if not opened:
                    opened.append(stack.enter_context(pieces.open()))
                opened[0](piece)
            except VestigeError:
                raise
            except Exception as error:
                raise lost_process(error) or PieceFailed(
                    f"{pieces.name}: piece {piece} of {pieces.count} failed in one of the processes that hold the "
                    f"model, and so for all: {type(error).__name__}: {error}\n"
                    "Fix the cause and run the same command again: what is finished is kept."
                ) from error

        yield compute


def _broadcast(order: int | str | None) -> int | str | None:
    return broadcast_from_rank0(lambda: order)
