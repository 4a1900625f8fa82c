"""The process group that holds one model: ranks, broadcasts from rank 0, exchange of rows.

Where a model is larger than one GPU, torchrun starts a process for each GPU, and every process holds a part of every
layer. A forward pass gathers the layers one by one, so all processes make it at once. They run the same program
on the same data: rank 0 alone reads the disk, decides and writes, and broadcasts its decisions
(`broadcast_from_rank0`); batches are distributed round-robin, and their rows exchanged (`exchange_rows`).

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
TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others: longer than any of them writes a piece or draws up a plan."""
_LOST = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "timed out", "socket")

Item = TypeVar("Item")
Value = TypeVar("Value")


class Rank(NamedTuple):
    """This process in its process group."""

    rank: int
    world_size: int


class _State:
    """State of the process, one for each, like the process group itself."""

    def __init__(self) -> None:
        self.rank: Rank | None = None
        self.lost = False
        """Whether the process group has lost a process, so that none may wait for the others when it ends."""
        self.reported: VestigeError | None = None
        """The error that rank 0 has broadcast, and prints: this process need not."""


_STATE = _State()


def in_process_group() -> bool:
    """Return whether this process is one of a process group that holds one model."""
    return _STATE.rank is not None


def this_rank() -> Rank:
    """Return the rank of this process and the size of its group; alone it is rank 0 of one."""
    return _STATE.rank or Rank(0, 1)


def is_rank0() -> bool:
    """Return whether this process decides and writes, as one that works alone always does."""
    return this_rank().rank == 0


def launched_rank(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Return the rank that torchrun or accelerate gave this process among several, None if it started alone."""
    rank, world_size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    several = rank.isdigit() and world_size.isdigit() and int(world_size) > 1
    return Rank(int(rank), int(world_size)) if several else None


def is_helper(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether another process is responsible for the result: the driver of this worker, or torchrun's rank 0."""
    launched = launched_rank(environment)
    return ROLE_VARIABLE in environment or (launched is not None and launched.rank > 0)


@contextmanager
def process_group(wanted: bool = True) -> Iterator[None]:
    """Join all processes that torchrun started into a process group while the block runs, if that is `wanted`.

    Raises:
        SpecError: This process is alone.
        UserError: Another process ended.
    """
    if not wanted or in_process_group():
        yield
        return
    _STATE.rank = _join()
    try:
        # Rank 0 alone prints what all processes would print.
        with quiet(not is_rank0()), warnings.catch_warnings():
            # Writing into it would be wrong; nothing writes into what a model without its head returns.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
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
        _STATE.rank = None


def lost_process(error: Exception) -> UserError | None:
    """Return the error to show where another process of the group is gone; None for any other error."""
    kind = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    words = str(error).lower() if isinstance(error, RuntimeError) else ""
    if not (kind is not None and isinstance(error, kind)) and not any(word in words for word in _LOST):
        return None
    rank, world_size = this_rank()
    return UserError(
        f"Process {rank + 1} of {world_size} ends, because another one that held a part of the model has ended. If it "
        "could, it has printed the reason. Run the same command again: what is finished is kept."
    )


def broadcast_from_rank0(decide: Callable[[], Value]) -> Value:
    """Return what `decide` returns in rank 0, in all processes; the others wait for it and call nothing.

    Raises:
        VestigeError: What deciding raised, in all of them; a command ends with the message of rank 0.
    """
    if not in_process_group():
        return decide()
    if not is_rank0():
        value, error = _broadcast(None)
        if error is not None:
            _STATE.reported = error
            raise error
        return value
    try:
        value = decide()
    except VestigeError as error:
        _broadcast((None, error))
        raise
    return _broadcast((value, None))[0]


def round_robin(items: Iterable[Item]) -> Iterator[tuple[int, Item, bool]]:
    """Yield the items of this process, round-robin, with their positions: of every round each process has one.

    In the last round there may be fewer items than processes. A process without one repeats the last, which does not
    count (False), because a pass over the model needs all processes.
    """
    rank, world_size = this_rank()
    round_: list[Item] = []
    first = 0
    for item in items:
        round_.append(item)
        if len(round_) == world_size:
            yield first + rank, round_[rank], True
            first += world_size
            round_.clear()
    if round_:
        position = min(rank, len(round_) - 1)
        yield first + position, round_[position], position == rank


def compute_round_robin(items: Iterable[Item], compute: Callable[[Item], Value]) -> Iterator[tuple[Item, Value]]:
    """Yield every item with its result: each is computed by one process, and broadcast to all.

    For small values: scores, not gradients (`exchange_rows`). The results lie on the CPU.
    """
    waiting: list[Item] = []

    def note_items() -> Iterator[Item]:
        for item in items:
            waiting.append(item)
            yield item

    for _, item, counts in round_robin(note_items()):
        value = compute(item)
        size = this_rank().world_size
        round_, waiting[:] = waiting[:size], waiting[size:]
        if not in_process_group():
            yield item, value
            continue
        for source, known in enumerate(round_):
            yield known, _broadcast(value if counts else None, source)


def exchange_rows(tensors: Sequence["Tensor"], sizes: Sequence[int]) -> None:
    """Exchange rows so that every process holds all of them; before, each held those of its own batches.

    Args:
        tensors: Each `[row, ...]`, on the CPU, the same shape everywhere; filled in place.
        sizes: Rows of each batch, which lie one after another.
    """
    if not in_process_group():
        return
    import torch
    import torch.distributed as distributed

    rank, world_size = this_rank()
    owner = torch.repeat_interleave(torch.arange(len(sizes)) % world_size, torch.as_tensor(sizes))
    for source in range(world_size):
        rows = (owner == source).nonzero()[:, 0]
        if not len(rows):
            continue
        for tensor in tensors:
            part = tensor[rows].contiguous()
            distributed.broadcast(part, source)
            if source != rank:
                tensor[rows] = part


def _join() -> Rank:
    launched = launched_rank()
    if launched is None:
        raise SpecError(
            f"--device {FSDP} spreads a model over several processes, and this is one alone. Type: "
            "torchrun --nproc-per-node 2 -m vestige ..., with as many processes as there are GPUs."
        )
    import torch
    import torch.distributed as distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(_leave)
    return launched


def _leave() -> None:
    """Destroy the group when the process ends, unless a process of it is lost."""
    import torch.distributed as distributed

    if distributed.is_initialized() and not _STATE.lost:
        distributed.destroy_process_group()


def _broadcast(message: Any, source: int = 0) -> Any:
    """Return the message of the process `source`, in all of them."""
    import torch
    import torch.distributed as distributed

    box = [message]
    distributed.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]
