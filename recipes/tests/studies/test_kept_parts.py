"""What is kept of a finished part, and when it is not believed."""

import json

import pytest

from vestige_recipes.select_or_project import protocol as _kept_parts
from vestige_recipes.select_or_project.protocol import Part, keep_part
from vestige_recipes.studies import Gate

MADE_OF = {"plan": {"steps": 3}, "seed": 0}
FOUND = Part([("a", 0.1, 7)], [Gate("a", 0.1, ">=", 0.0)], {"each": [1.5, None]})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    (tmp_path / "launch").mkdir()
    return tmp_path


def done(folder, made_of=MADE_OF):
    """Whether the work was done, which must give the same either way."""
    times = []

    def work():
        times.append(1)
        (folder / "table.md").write_text("a 0.1 7")
        return FOUND

    assert keep_part(folder, made_of, work) == FOUND
    return bool(times)


def test_it_is_read_back_as_it_was(folder):
    assert done(folder)
    assert not done(folder)
    (folder / "launch" / "log").write_text("what a worker said")
    assert not done(folder)


@pytest.mark.parametrize("made_of", [{**MADE_OF, "seed": 1}, {**MADE_OF, "plan": {"steps": 4}}, {}])
def test_of_other_things_it_is_done_again(folder, made_of):
    assert done(folder)
    assert done(folder, made_of)
    assert not done(folder, made_of)


def test_by_another_version_it_is_done_again(folder, monkeypatch):
    assert done(folder)
    monkeypatch.setattr(_kept_parts, "version", lambda name: "another")
    assert done(folder)


def _change(folder):
    (folder / "model" / "weights").write_bytes(b"Weights")


def _lose(folder):
    (folder / "table.md").unlink()


def _add(folder):
    (folder / "more").write_text("")


def _damage(folder):
    path = folder / "part.json"
    path.write_text(path.read_text().replace("0.1", "0.9"))


def _cut(folder):
    path = folder / "part.json"
    path.write_text(path.read_text()[:-20])


def _replace(folder):
    (folder / "part.json").write_text(json.dumps(["another file"]))


@pytest.mark.parametrize("harm", [_change, _lose, _damage, _cut, _replace, _add])
def test_damaged_it_is_done_again(folder, harm):
    assert done(folder)
    harm(folder)
    assert done(folder)
    assert not done(folder)


def test_who_only_follows_writes_nothing(folder, monkeypatch):
    monkeypatch.setattr(_kept_parts, "is_follower", lambda: True)
    assert done(folder)
    assert not (folder / "part.json").exists()


def test_numbers_that_are_none_are_kept_too(folder):
    part = Part([("a", float("nan"))], [], {})
    keep_part(folder, MADE_OF, lambda: part)
    again = keep_part(folder, MADE_OF, lambda: FOUND)
    assert str(again.rows) == "[('a', nan)]"
