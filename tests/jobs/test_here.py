"""Work in this process: every piece once, failures retried, what was done is left alone."""

import errno
import os
import signal

import pytest

from tests.jobs.toy import Toy
from vestige.errors import DataError, DiskSpaceError, PieceFailed, SpecError, UserError, WorkElsewhere
from vestige.jobs import JobFolder, ranges, run_pieces
from vestige.settings import LaunchSettings


def test_every_piece_is_computed_once_and_the_plan_opened_once(tmp_path):
    plan = Toy(tmp_path)
    assert plan.run() == plan.expected()
    assert plan.computed() == list(range(12))
    assert plan.opened == [1]


def test_what_is_done_is_left_alone(tmp_path):
    Toy(tmp_path).run()
    for piece in (3, 7):
        (tmp_path / f"{piece:05d}.json").unlink()
    plan = Toy(tmp_path)
    assert plan.run() == plan.expected()
    assert plan.computed()[12:] == [3, 7]
    again = Toy(tmp_path)
    assert again.run() == plan.expected()
    assert again.opened == []


def test_a_piece_that_fails_once_is_tried_again(tmp_path):
    plan = Toy(tmp_path, fail_once=(2, 5))
    assert plan.run() == plan.expected()
    assert sorted(plan.computed()) == sorted([*range(12), 2, 5])


def test_a_piece_that_always_fails_is_reported_after_all_others_are_done(tmp_path):
    plan = Toy(tmp_path, fail=(2, 3, 9))
    with pytest.raises(PieceFailed, match=r"3 of 12 pieces failed every time \(2-3,9\)") as caught:
        plan.run(retries=1)
    assert "ArithmeticError: cannot square 9" in str(caught.value)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert [plan.computed().count(piece) for piece in range(12)] == [1, 1, 2, 2, 1, 1, 1, 1, 1, 2, 1, 1]
    mended = Toy(tmp_path)
    assert mended.run() == mended.expected()


def test_an_error_that_the_user_has_to_mend_is_not_retried(tmp_path):
    plan = Toy(tmp_path, refuse=(4,))
    with pytest.raises(DataError, match="e4 is not a number"):
        plan.run()
    assert plan.computed() == [0, 1, 2, 3, 4]


def test_shares_are_disjoint_and_whoever_is_last_reduces(tmp_path):
    plan = Toy(tmp_path, count=7)
    with pytest.raises(WorkElsewhere, match=r"share 2/3 is done. 5 of 7 pieces .*\(0,2-3,5-6\)"):
        plan.run(shard="2/3")
    assert plan.computed() == [1, 4]
    with pytest.raises(WorkElsewhere):
        plan.run(shard="1/3")
    assert plan.run(shard="3/3") == plan.expected()
    assert sorted(plan.computed()) == list(range(7))


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_refused(shard):
    with pytest.raises(SpecError, match="i/n"):
        LaunchSettings(shard=shard)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_work_between_two_batches_and_leaves_nothing_at_work(tmp_path, number, monkeypatch, capsys):
    plan = Toy(tmp_path, seconds=0.4, steps=4)
    import threading

    threading.Timer(0.25, os.kill, (os.getpid(), number)).start()
    with pytest.raises(SystemExit) as caught:
        plan.run()
    assert caught.value.code == 128 + number
    assert not plan.is_done(0)
    assert [each.at_work for each in JobFolder.of(tmp_path, plan.name).journals()] == [None]
    assert "12 of 12 pieces missing. Run the same command again" in capsys.readouterr().err
    quick = Toy(tmp_path)
    assert quick.run() == quick.expected()


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    plan = Toy(tmp_path)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    object.__setattr__(plan, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.run()
    assert "Run the same command again" in capsys.readouterr().err
    assert Toy(tmp_path).run() == plan.expected()


def test_a_full_disk_is_an_instruction(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError):
        Toy(tmp_path).run()
    monkeypatch.undo()
    assert Toy(tmp_path).run() == Toy(tmp_path).expected()


def test_a_file_in_the_way_is_an_instruction(tmp_path):
    (tmp_path / "launch").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        Toy(tmp_path).run()


def test_progress_counts_weights(tmp_path, capsys):
    Toy(tmp_path, steps=3).run()
    assert "Squaring: 24 of 24 numbers in" in capsys.readouterr().err


def test_ranges_are_compressed():
    assert ranges([5, 1, 2, 3, 9, 8]) == "1-3,5,8-9"
    assert ranges([]) == ""


def test_other_processes_need_a_command(tmp_path):
    with pytest.raises(UserError, match="live Python object"):
        run_pieces(Toy(tmp_path).pieces, LaunchSettings(workers=2), None)
