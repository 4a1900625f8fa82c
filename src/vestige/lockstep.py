"""The process group that holds one model: ranks, decisions of the first process, exchange of rows.

Where a model is larger than one GPU, torchrun starts a process for each GPU, and every process holds a part of every
layer. A forward pass gathers the layers one by one, so all processes make it at once. They run the same program
on the same data: the first one alone reads the disk, decides and writes, and broadcasts its decisions (`decided`);
batches are distributed round-robin (`in_turns`), and their rows exchanged (`exchange_rows`).

No process goes on alone: one that ends, for whatever reason, ends the command. What was finished stays.
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
"""Environment variable in which a driver gives its workers, which run the same command, their role."""
PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: longer than any of them writes a piece or draws up a plan."""
_LOST = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "timed out", "socket")

Item = TypeVar("Item")
Value = TypeVar("Value")


class Together(NamedTuple):
    """This process in its process group."""

    number: int
    of: int


class _State:
    """State of the process, one for each, like the process group itself."""

    def __init__(self) -> None:
        self.together: Together | None = None
        self.lost = False
        """Whether the process group has lost a process, so that none may wait for the others when it ends."""
        self.reported: VestigeError | None = None
        """The error that the first process has broadcast, and prints: this one need not."""


_STATE = _State()


def in_step() -> bool:
    """Return whether this process is one of a process group that holds one model."""
    return _STATE.together is not None


def this_process() -> Together:
    """Return the rank of this process and the size of its group; alone it is the first of one."""
    return _STATE.together or Together(0, 1)


def is_first() -> bool:
    """Return whether this process decides and writes, as one that works alone always does."""
    return this_process().number == 0


def is_helper(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether another process is responsible for the result: the driver of this worker, or torchrun's rank 0."""
    ranks = environment.get("WORLD_SIZE", "1")
    is_rank = ranks.isdigit() and int(ranks) > 1
    return ROLE_VARIABLE in environment or (is_rank and environment.get("RANK", "0") != "0")


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """Join all processes that torchrun started into a process group while the block runs, if that is `wanted`.

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
        if error is _STATE.reported:
            raise SystemExit(2) from None
        if isinstance(error, Exception) and (explained := lost_process(error)) is not None:
            raise explained from error
        raise
    finally:
        _STATE.together = None


def lost_process(error: Exception) -> UserError | None:
    """Return the error to show where another process of the group is gone; None for any other error."""
    kind = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    if not (kind is not None and isinstance(error, kind)) and not any(word in words for word in _LOST):
        return None
    number, of = this_process()
    return UserError(
        f"Process {number + 1} of {of} ends, because another one that held a part of the model has ended. If it could, "
        "it has printed the reason. Run the same command again: what is finished is kept."
    )


def decided(decide: Callable[[], Value]) -> Value:
    """Return the decision of the first process, in all of them; the others wait for it and call nothing.

    Raises:
        VestigeError: What deciding raised, in all of them; a command ends with the message of the first.
    """
    if not in_step():
        return decide()
    if not is_first():
        value, error = _exchanged(None)
        if error is not None:
            _STATE.reported = error
            raise error
        return value
    try:
        value = decide()
    except VestigeError as error:
        _exchanged((None, error))
        raise
    return _exchanged((value, None))[0]


def in_turns(items: Iterable[Item]) -> Iterator[tuple[int, Item, bool]]:
    """Yield the items of this process, round-robin, with their positions: of every round each process has one.

    In the last round there may be fewer items than processes. A process without one repeats the last, which does not
    count (False), because a pass over the model needs all processes.
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
    """Yield every item with its result: each is computed by one process, and broadcast to all.

    For small values: scores, not gradients (`exchange_rows`). The results lie on the CPU.
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
    """Exchange rows so that every process holds all of them; before, each held those of its own batches.

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
    """Print from the first process alone what all processes would print."""
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
    """Destroy the group when the process ends, unless a process of it is lost."""
    import torch.distributed as distributed

    if distributed.is_initialized() and not _STATE.lost:
        distributed.destroy_process_group()


def _exchanged(message: Any, source: int = 0) -> Any:
    """Return the message of the process `source`, in all of them."""
    import torch
    import torch.distributed as distributed

    box = [message]
    distributed.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]
