"""A plan whose every piece takes all processes of a group, because the model is sharded over them (`--device fsdp`)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vestige.errors import PieceFailed, VestigeError, WorkElsewhere
from vestige.launch._here import missing_pieces
from vestige.launch._types import Compute, WorkPlan
from vestige.lockstep import decided, is_first, lost_process

Result = TypeVar("Result")


class _Order(NamedTuple):
    """What the first process makes the others do next."""

    piece: int | None = None
    """Compute it; None: nothing more is to be done."""
    elsewhere: str | None = None
    """The message when the rest of the work is for others."""


def run_in_step(plan: WorkPlan[Result], drive: Callable[[WorkPlan[Result]], Result]) -> Result:
    """Return the plan's result in every process: the first one drives as it would alone, the others follow it.

    Claims, failures and the record of the job are the first one's. A piece that fails is not tried again: the others
    may be in the middle of it, so the command ends.

    Raises:
        PieceFailed: A piece raised what no caller can fix.
        UserError: What computing a piece raised, or another process ended.
        WorkElsewhere: The rest is for other shares.
    """
    if not decided(lambda: missing_pieces(plan)):
        return plan.reduce()
    return _first(plan, drive) if is_first() else _other(plan)


def _first(plan: WorkPlan[Result], drive: Callable[[WorkPlan[Result]], Result]) -> Result:
    try:
        result = drive(_Announcing(plan))
    except WorkElsewhere as note:
        _tell(_Order(elsewhere=str(note)))
        raise
    _tell(_Order())
    return result


def _other(plan: WorkPlan[Result]) -> Result:
    with _opened_late(plan) as compute:
        while (order := decided(_Order)).piece is not None:
            compute(order.piece)
    if order.elsewhere is not None:
        raise WorkElsewhere(order.elsewhere)
    return plan.reduce()


class _Announcing(WorkPlan[Result]):
    """A plan that announces a piece to the other processes before it computes its own part of it."""

    def __init__(self, plan: WorkPlan[Result]) -> None:
        self._plan = plan

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def unit(self) -> str:
        return self._plan.unit

    @property
    def folder(self) -> Path:
        return self._plan.folder

    @property
    def pieces(self) -> int:
        return self._plan.pieces

    def is_done(self, piece: int) -> bool:
        return self._plan.is_done(piece)

    def weight(self, piece: int) -> float:
        return self._plan.weight(piece)

    def reduce(self) -> Result:
        return self._plan.reduce()

    def open(self) -> AbstractContextManager[Compute]:
        return self._announcing()

    @contextmanager
    def _announcing(self) -> Iterator[Compute]:
        with _opened_late(self._plan) as compute:

            def announced(piece: int) -> None:
                _tell(_Order(piece))
                compute(piece)

            yield announced


@contextmanager
def _opened_late(plan: WorkPlan[Any]) -> Iterator[Compute]:
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
                raise lost_process(error) or _failed(plan, piece, error) from error

        yield compute


def _failed(plan: WorkPlan[Any], piece: int, error: Exception) -> PieceFailed:
    return PieceFailed(
        f"{plan.name}: piece {piece} of {plan.pieces} failed in one of the processes that hold the model, and so for "
        f"all: {type(error).__name__}: {error}\n"
        "Fix the cause and run the same command again: what is finished is kept."
    )


def _tell(order: _Order) -> None:
    decided(lambda: order)
