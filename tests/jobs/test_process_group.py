"""Pieces of a process group: rank 0 drives, the others compute what it broadcasts, and nothing is tried again.

Here the processes follow one another: what the first would send is kept, and the second is given it.
"""

import pytest

from tests.jobs.toy import Toy
from tests.ranks import become as become, sent as sent
from vestige.errors import DataError, PieceFailed, WorkElsewhere
from vestige.jobs import Role, this_role


def test_the_others_compute_what_the_first_computes_and_have_the_result(tmp_path, sent, become):
    become(0)
    first = Toy(tmp_path / "first", count=4)
    assert first.run() == first.expected()
    become(1)
    other = Toy(tmp_path / "other", count=4)
    assert other.run() == other.expected()
    assert other.computed() == first.computed() == [0, 1, 2, 3]
    assert other.opened == [1]
    assert sent == []
    assert not (tmp_path / "other" / "launch").exists(), "records are the first one's"


def test_what_is_done_is_not_computed_again(tmp_path, sent, become):
    plan = Toy(tmp_path, count=3)
    plan.run()
    become(0)
    assert plan.run() == plan.expected()
    become(1)
    assert plan.run() == plan.expected()
    assert plan.computed() == [0, 1, 2]
    assert sent == []


def test_a_piece_that_fails_ends_the_work_at_once(tmp_path, sent, become):
    become(0)
    with pytest.raises(PieceFailed, match=r"piece 1 of 4 .* ArithmeticError: cannot square 1\n.*same command again"):
        Toy(tmp_path, count=4, fail_once=(1,)).run(retries=2)
    # After the piece nothing was sent: the others may be in the middle of it.
    assert sent[-1][0] == 1
    become(1)
    with pytest.raises(PieceFailed, match="cannot square 1"):
        Toy(tmp_path / "other", count=4, fail=(1,)).run()
    become(0)
    with pytest.raises(DataError, match="e2 is not a number"):
        Toy(tmp_path, count=4, refuse=(2,)).run()


def test_a_share_ends_in_all_processes_with_the_same_note(tmp_path, sent, become):
    become(0)
    with pytest.raises(WorkElsewhere) as note:
        Toy(tmp_path / "first", count=5).run(shard="2/2")
    become(1)
    other = Toy(tmp_path / "other", count=5)
    with pytest.raises(WorkElsewhere, match="share 2/2 is done") as same:
        other.run(shard="2/2")
    assert other.computed() == [1, 3]
    assert str(same.value) == str(note.value)


def test_roles_in_a_process_group(become):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2"}
    assert this_role(torchrun) == Role("rank", number=1, of=2)
    become(0)
    assert this_role(torchrun | {"RANK": "0"}) == Role("driver")
    become(1)
    assert this_role(torchrun) == Role("driver")
