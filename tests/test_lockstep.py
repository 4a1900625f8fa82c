"""Who does what among processes in step; what passes between them is tested with two, in `models/test_in_parts.py`."""

import pytest

from vestige import lockstep
from vestige.errors import DataError, SpecError, UserError


@pytest.fixture
def become(monkeypatch):
    """Makes this process one of several."""
    return lambda number, of: monkeypatch.setattr(lockstep._STATE, "together", lockstep.Together(number, of))


@pytest.mark.parametrize("of", [1, 2, 3, 4])
@pytest.mark.parametrize("items", range(10))
def test_every_item_is_the_turn_of_one_process_and_all_take_as_many_turns(become, of, items):
    turns = []
    for number in range(of):
        if of > 1:
            become(number, of)
        turns.append(list(lockstep.in_turns(iter(range(items)))))
    counted = [(place, item) for each in turns for place, item, counts in each if counts]
    assert sorted(counted) == [(number, number) for number in range(items)]
    assert len({len(each) for each in turns}) == 1
    assert all(place % of == number for number, each in enumerate(turns) for place, _, counts in each if counts)


def test_alone_a_process_decides_and_is_the_first_of_one():
    assert not lockstep.in_step()
    assert lockstep.is_first()
    assert lockstep.decided(lambda: 7) == 7
    assert list(lockstep.dealt("ab", str.upper)) == [("a", "A"), ("b", "B")]


@pytest.mark.parametrize("of", [2, 3])
def test_what_is_dealt_comes_back_to_all_in_order(become, monkeypatch, of):
    items = list(range(5))
    for number in range(of):
        become(number, of)
        asked = []

        def exchanged(value, source, number=number, asked=asked):
            asked.append(source)
            # What the other processes would send.
            place = len(asked) - 1
            assert value == 10 * items[place] if source == number else True
            return 10 * items[place]

        monkeypatch.setattr(lockstep, "_exchanged", exchanged)
        assert list(lockstep.dealt(items, lambda item: 10 * item)) == [(item, 10 * item) for item in items]
        assert asked == [place % of for place in range(5)]


def test_an_error_of_the_first_is_that_of_all_and_said_once(become, monkeypatch):
    sent = []
    monkeypatch.setattr(lockstep, "_exchanged", lambda message: sent.append(message) or message)
    become(0, 2)

    def refuse():
        raise DataError("no such file")

    with pytest.raises(DataError, match="no such file"):
        lockstep.decided(refuse)
    monkeypatch.setattr(lockstep._STATE, "together", None)
    monkeypatch.setattr(lockstep, "_joined", lambda: lockstep.Together(1, 2))
    monkeypatch.setattr(lockstep, "_exchanged", lambda _: sent[0])
    with pytest.raises(SystemExit), lockstep.together():
        lockstep.decided(refuse)
    assert not lockstep.in_step()
    monkeypatch.setattr(lockstep._STATE, "lost", False)


def test_a_process_that_is_gone_is_told_in_words_and_other_errors_are_left_alone(monkeypatch):
    monkeypatch.setattr(lockstep, "_joined", lambda: lockstep.Together(0, 2))
    with pytest.raises(UserError, match=r"Process 1 of 2 ends, .* Run the same command again"), lockstep.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20173")
    with pytest.raises(RuntimeError, match="shapes"), lockstep.together():
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(lockstep._STATE, "lost", False)


def test_alone_one_is_told_how_to_start_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SpecError, match="torchrun --nproc-per-node 2 -m vestige"), lockstep.together():
        pass
    with lockstep.together(False):
        assert not lockstep.in_step()
