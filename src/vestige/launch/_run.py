"""`run_plan`: every piece is done, wherever the settings want it done, and the result is returned."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from vestige.distributed import broadcast_from_rank0, in_process_group, is_rank0, lost_process
from vestige.errors import PieceFailed, VestigeError, WorkElsewhere
from vestige.launch._local import require_command, work_in_processes
from vestige.launch._pieces import Compute, Result, Stopped, WorkPlan, is_kept, stop_signal, stopping_at_steps
from vestige.launch._record import JobFolder, ranges
from vestige.launch._role import Role, this_role
from vestige.launch._slurm import reduce_job, requeue_unless_cancelled, work_on_slurm
from vestige.launch._work import Meter, Worker, begin, finish, from_own_end, missing_pieces, work_here
from vestige.settings import LaunchSettings


def run_in_process_group(plan: WorkPlan[Result], drive: Callable[[WorkPlan[Result]], Result]) -> Result:
    """Return the result of a plan whose every piece takes all processes, because the model is sharded over them.

    The first process drives as it would alone, and broadcasts what the others do next: the number of a piece, None when
    nothing is left, or the message when the rest is for others. Claims, failures and the record of the job are the
    first one's. A piece that fails is not tried again: the others may be in the middle of it, so the command ends.

    Raises:
        PieceFailed: A piece raised what no caller can fix.
        UserError: What computing a piece raised, or another process ended.
        WorkElsewhere: The rest is for other shares.
    """
    if not broadcast_from_rank0(lambda: missing_pieces(plan)):
        return plan.reduce()
    if is_rank0():
        try:
            result = drive(_Announcing(plan))  # pyright: ignore[reportArgumentType]
        except WorkElsewhere as note:
            _broadcast(str(note))
            raise
        _broadcast(None)
        return result
    with _open_late(plan) as compute:
        while isinstance(order := _broadcast(None), int):
            compute(order)
    if order is not None:
        raise WorkElsewhere(order)
    return plan.reduce()


class _Announcing:
    """The plan of the first process, which announces a piece to the others before it computes its own part of it."""

    def __init__(self, plan: WorkPlan[Any]) -> None:
        self._plan = plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    @contextmanager
    def open(self) -> Iterator[Compute]:
        with _open_late(self._plan) as compute:

            def announce_and_compute(piece: int) -> None:
                _broadcast(piece)
                compute(piece)

            yield announce_and_compute


@contextmanager
def _open_late(plan: WorkPlan[Any]) -> Iterator[Compute]:
    """Open what computes a piece with the first piece: placing hooks may take a pass over the model by all."""
    with ExitStack() as stack:
        opened: list[Compute] = []

        def compute(piece: int) -> None:
            try:
                if not opened:
                    opened.append(stack.enter_context(plan.open()))
                opened[0](piece)
            except VestigeError:
                raise
            except Exception as error:
                raise lost_process(error) or PieceFailed(
                    f"{plan.name}: piece {piece} of {plan.pieces} failed in one of the processes that hold the model, "
                    f"and so for all: {type(error).__name__}: {error}\n"
                    "Fix the cause and run the same command again: what is finished is kept."
                ) from error

        yield compute


def _broadcast(order: int | str | None) -> int | str | None:
    return broadcast_from_rank0(lambda: order)


def run_plan(plan: WorkPlan[Result], settings: LaunchSettings, command: Sequence[str] | None) -> Result:
    """Return the plan's result, once every piece is done.

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
    if in_process_group():
        return run_in_process_group(plan, lambda announcing: _drive(announcing, settings, job, role, command))
    missing = missing_pieces(plan)
    if role.kind == "worker" and role.is_for(job.path):
        serve(plan, settings, job, role, missing)
    if role.kind == "reduce" and role.is_for(job.path):
        return reduce_job(plan, settings, job, role, command)
    if not missing:
        return plan.reduce()
    if role.kind == "worker":
        raise PieceFailed(f"{plan.name}: pieces {ranges(missing)} are missing, on which what comes next builds.")
    return _drive(plan, settings, job, role, command)


def _drive(
    plan: WorkPlan[Result], settings: LaunchSettings, job: JobFolder, role: Role, command: Sequence[str] | None
) -> Result:
    """Do the work of the process that a person started, or of one rank among several."""
    missing = missing_pieces(plan)
    share = missing if settings.part is None else [one for one in missing if one % settings.part[1] == settings.part[0]]
    if role.kind == "rank":
        if role.number == 0:
            begin(plan, settings, job, missing)
        job.make()
        work_here(plan, settings, job, from_own_end(share, role.number, role.of))
    elif settings.engine == "slurm":
        words = require_command(command)
        begin(plan, settings, job, missing)
        work_on_slurm(plan, settings, job, share, words)
    elif settings.workers > 1:
        words = require_command(command)
        begin(plan, settings, job, missing)
        work_in_processes(plan, settings, job, share, words)
    else:
        begin(plan, settings, job, missing)
        work_here(plan, settings, job, share)
    return finish(plan, settings, job)


def serve(plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, role: Role, missing: list[int]) -> NoReturn:
    """Work through what is missing, as one of several workers, and end the process.

    Raises:
        SystemExit: Always: 0 when nothing is left to do, 128 + the signal that stopped it otherwise.
    """
    worker = Worker(plan, job, settings.retries, Meter(lambda _: None), say=True)
    try:
        with stopping_at_steps(role.parent), worker:
            worker.work(from_own_end(missing, role.number % role.of, role.of), stay=False)
    except Stopped:
        number = stop_signal() or 0
        print(f"stopped by signal {number} after {len(worker.computed)} pieces", flush=True)
        progressed = bool(worker.computed) or is_kept()
        requeue_unless_cancelled(number, job, worker.stopped_in, progressed=progressed)
        raise SystemExit(128 + number) from None
    raise SystemExit(0)
