"""Processes that hold one model together and therefore do everything in step: who they are, who decides, who writes.

Where a model is larger than one GPU, torchrun starts a process for each GPU, and every process holds a part of every
layer. A forward pass gathers the layers one by one, so it is made by all processes at once. They run the same program
on the same data: the first one alone looks at the disk, decides and writes, and tells the others (`decided`); batches
are dealt out in turns (`in_turns`), and their rows exchanged (`exchange_rows`).

Nobody goes on alone: a process that ends, for whatever reason, ends the command. What was finished stays.
"""

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vestige.errors import SpecError, UserError, VestigeError, WorkElsewhere
from vestige.progress import quiet

if TYPE_CHECKING:
    from torch import Tensor

FSDP = "fsdp"
"""The word for a model in parts, among those for devices."""
ROLE_VARIABLE = "VESTIGE_LAUNCH"
"""Environment variable in which a driver tells its workers, who run the same command, what they are."""
PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: longer than any of them writes a piece or draws up a plan."""
_LOST = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "timed out", "socket")

Item = TypeVar("Item")
Value = TypeVar("Value")


class Together(NamedTuple):
    """This process among those that work in step."""

    number: int
    of: int


class _State:
    """One for the process, like the process group itself."""

    def __init__(self) -> None:
        self.together: Together | None = None
        self.lost = False
        """Whether the processes are no longer together, so that none may wait for the others when it ends."""
        self.told: VestigeError | None = None
        """The error that the first process has told, and shows: this one need not."""


_STATE = _State()


def in_step() -> bool:
    """Whether this process is one of several that do everything together."""
    return _STATE.together is not None


def this_process() -> Together:
    """Which of how many this process is; alone it is the first of one."""
    return _STATE.together or Together(0, 1)


def is_first() -> bool:
    """Whether this process decides and writes, as one that works alone always does."""
    return this_process().number == 0


def is_helper(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process answers for the result: the driver of this worker, or the first rank of torchrun."""
    ranks = environment.get("WORLD_SIZE", "1")
    is_rank = ranks.isdigit() and int(ranks) > 1
    return ROLE_VARIABLE in environment or (is_rank and environment.get("RANK", "0") != "0")


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """While the block runs, all processes that torchrun started work in step, if that is `wanted`.

    Raises:
        SpecError: This process is alone.
        UserError: Another process ended.
    """
    if not wanted or in_step():
        yield
        return
    _STATE.together = _joined()
    try:
        with _quiet_but_first():
            yield
    except WorkElsewhere:
        raise
    except BaseException as error:
        _STATE.lost = True
        if error is _STATE.told:
            raise SystemExit(2) from None
        if isinstance(error, Exception) and (explained := lost_process(error)) is not None:
            raise explained from error
        raise
    finally:
        _STATE.together = None


def lost_process(error: Exception) -> UserError | None:
    """What a person reads where an error says that another process is gone; None for any other error."""
    kind = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    if not (kind is not None and isinstance(error, kind)) and not any(word in words for word in _LOST):
        return None
    number, of = this_process()
    return UserError(
        f"Process {number + 1} of {of} ends, because another one that held a part of the model has ended. If it could, "
        "it has said why. Run the same command again: what is finished is kept."
    )


def decided(decide: Callable[[], Value]) -> Value:
    """What the first process decides, for all of them; the others wait for it and call nothing.

    Raises:
        VestigeError: What deciding raised, in all of them; a verb ends with the words of the first.
    """
    if not in_step():
        return decide()
    if not is_first():
        value, error = _exchanged(None)
        if error is not None:
            _STATE.told = error
            raise error
        return value
    try:
        value = decide()
    except VestigeError as error:
        _exchanged((None, error))
        raise
    return _exchanged((value, None))[0]


def in_turns(items: Iterable[Item]) -> Iterator[tuple[int, Item, bool]]:
    """The items that fall to this process, with their places: of every round each process has one.

    In the last round there may be fewer items than processes. Who has none repeats the last, which does not count
    (False), because a pass over the model needs everybody.
    """
    number, of = this_process()
    round_: list[Item] = []
    first = 0
    for item in items:
        round_.append(item)
        if len(round_) == of:
            yield first + number, round_[number], True
            first += of
            round_.clear()
    if round_:
        place = min(number, len(round_) - 1)
        yield first + place, round_[place], place == number


def dealt(items: Iterable[Item], compute: Callable[[Item], Value]) -> Iterator[tuple[Item, Value]]:
    """Every item with what becomes of it: each is computed by one process, and known to all.

    For small values: scores, not gradients (`exchange_rows`). What is computed lies on the CPU.
    """
    _, of = this_process()
    waiting: list[Item] = []

    def noted() -> Iterator[Item]:
        for item in items:
            waiting.append(item)
            yield item

    for _, item, counts in in_turns(noted()):
        value = compute(item)
        round_, waiting[:] = waiting[:of], waiting[of:]
        if not in_step():
            yield item, value
            continue
        for source, known in enumerate(round_):
            yield known, _exchanged(value if counts else None, source)


def exchange_rows(tensors: Sequence["Tensor"], sizes: Sequence[int]) -> None:
    """Every process holds all rows of the tensors; before, each held those of the batches that were its turn.

    Args:
        tensors: Each `[row, ...]`, on the CPU, the same shape everywhere; filled in place.
        sizes: Rows of each batch, which lie one after another.
    """
    if not in_step():
        return
    import torch
    import torch.distributed as distributed

    number, of = this_process()
    owner = torch.repeat_interleave(torch.arange(len(sizes)) % of, torch.as_tensor(sizes))
    for source in range(of):
        rows = (owner == source).nonzero()[:, 0]
        if not len(rows):
            continue
        for tensor in tensors:
            part = tensor[rows].contiguous()
            distributed.broadcast(part, source)
            if source != number:
                tensor[rows] = part


@contextmanager
def _quiet_but_first() -> Iterator[None]:
    """What all processes would say is said by the first."""
    with quiet(not is_first()), warnings.catch_warnings():
        # Writing into it would be wrong; nothing writes into what a model without its head returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield


def _joined() -> Together:
    number, of = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (number.isdigit() and of.isdigit() and int(of) > 1):
        raise SpecError(
            f"--device {FSDP} spreads a model over several processes, and this is one alone. Type: "
            "torchrun --nproc-per-node 2 -m vestige ..., with as many processes as there are GPUs."
        )
    import torch
    import torch.distributed as distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_part)
    return Together(int(number), int(of))


def _part() -> None:
    """The group ends with the process, unless somebody is missing to take leave of."""
    import torch.distributed as distributed

    if distributed.is_initialized() and not _STATE.lost:
        distributed.destroy_process_group()


def _exchanged(message: Any, source: int = 0) -> Any:
    """The message of the process `source`, in all of them."""
    import torch
    import torch.distributed as distributed

    box = [message]
    distributed.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]
