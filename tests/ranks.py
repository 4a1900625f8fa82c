"""A process that takes the place of one of several: ranks follow one another, and what rank 0 would send is kept."""

from contextlib import ExitStack

import pytest
import torch

from vestige.distributed import is_rank0, process_group


@pytest.fixture
def become(monkeypatch):
    """Makes this process one of several, until it becomes another."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with ExitStack() as stack:

        def call(rank, world_size=2):
            stack.close()
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            stack.enter_context(process_group())

        call.leave = stack.close
        yield call


@pytest.fixture
def sent(monkeypatch):
    """Messages of rank 0, in order; another rank takes them away."""
    messages = []

    def broadcast(box, src, device):
        assert src == 0
        if is_rank0():
            messages.append(box[0])
        else:
            assert box == [None]
            box[0] = messages.pop(0)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    return messages
