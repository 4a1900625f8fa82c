"""Jobs inside a piece of another job."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vestige.launch._role import is_one_of_several
from vestige.lockstep import ROLE_VARIABLE

_PARTS = (
    ROLE_VARIABLE,
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""What gives a process its part in a job, for Vestige and torch.distributed; of the latter all or nothing: a Trainer
that finds LOCAL_RANK alone makes a process group of one and wraps its model in it."""
_CARDS, _PLACE = "CUDA_VISIBLE_DEVICES", "SLURM_LOCALID"
"""Where the GPU of a rank is set instead: for CUDA, and should CUDA have read it before, for ourselves."""


@contextmanager
def own_jobs() -> Iterator[None]:
    """Let this process start jobs of its own while the block runs, whatever its part in the job around it.

    For a piece that is itself a command: without this, a command inside a worker would take itself for a worker of its
    own job, and wait for a driver that there is not. A rank of torchrun keeps its GPU and uses no other.
    """
    card = _card(os.environ) if is_one_of_several() else {}
    before = {name: os.environ.pop(name) for name in (*_PARTS, *card) if name in os.environ}
    os.environ.update(card)
    try:
        yield
    finally:
        for name in (*_PARTS, *card):
            os.environ.pop(name, None)
        os.environ.update(before)


def _card(environment: Mapping[str, str]) -> dict[str, str]:
    import torch

    place = environment.get("LOCAL_RANK", "")
    # Counting them does not make CUDA read its environment, which it does once.
    count = torch.cuda.device_count()
    if not place.isdigit() or not count:
        return {}
    visible = environment.get(_CARDS, ",".join(map(str, range(count)))).split(",")
    return {_CARDS: visible[int(place) % len(visible)], _PLACE: place}
