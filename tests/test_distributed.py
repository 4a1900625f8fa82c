"""Who does what in a process group; what passes between processes is tested with two, in `models/test_in_parts.py`."""

import pytest
import torch

from tests.ranks import become as become, sent as sent
from vestige.distributed import (
    broadcast_from_rank0,
    compute_round_robin,
    in_process_group,
    is_rank0,
    process_group,
    round_robin,
    this_rank,
)
from vestige.errors import DataError, SpecError, UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("items", range(10))
def test_every_item_is_the_turn_of_one_process_and_all_take_as_many_turns(become, size, items):
    turns = []
    for rank in range(size):
        if size > 1:
            become(rank, size)
        turns.append(list(round_robin(iter(range(items)))))
    counted = [(place, item) for each in turns for place, item, counts in each if counts]
    assert sorted(counted) == [(number, number) for number in range(items)]
    assert len({len(each) for each in turns}) == 1
    assert all(place % size == rank for rank, each in enumerate(turns) for place, _, counts in each if counts)


def test_alone_a_process_decides_and_is_rank_0_of_one():
    assert not in_process_group()
    assert is_rank0()
    assert this_rank() == (0, 1)
    assert broadcast_from_rank0(lambda: 7) == 7
    assert list(compute_round_robin("ab", str.upper)) == [("a", "A"), ("b", "B")]


@pytest.mark.parametrize("size", [2, 3])
def test_results_come_back_to_all_in_order(become, monkeypatch, size):
    items = list(range(5))
    for rank in range(size):
        become(rank, size)
        sources = []

        def broadcast(box, src, device, rank=rank, sources=sources):
            # What the other processes would send.
            expected = 10 * items[len(sources)]
            assert box == [expected] if src == rank else True
            box[0] = expected
            sources.append(src)

        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
        assert list(compute_round_robin(items, lambda item: 10 * item)) == [(item, 10 * item) for item in items]
        assert sources == [place % size for place in range(5)]


def test_an_error_of_rank_0_is_that_of_all_and_printed_once(become, sent, monkeypatch):
    def refuse():
        raise DataError("no such file")

    become(0)
    with pytest.raises(DataError, match="no such file"):
        broadcast_from_rank0(refuse)
    become.leave()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), process_group():
        broadcast_from_rank0(refuse)
    assert not in_process_group()


def test_a_process_that_is_gone_is_reported_in_words_and_other_errors_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"Process 1 of 2 ends, .* Run the same command again"), process_group():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20173")
    with pytest.raises(RuntimeError, match="shapes"), process_group():
        raise RuntimeError("shapes do not match")


def test_alone_one_learns_how_to_start_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SpecError, match="torchrun --nproc-per-node 2 -m vestige"), process_group():
        pass
    with process_group(False):
        assert not in_process_group()
