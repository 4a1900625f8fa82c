"""The leaderboard in its tiny size: every registered method is in the table, or listed with its reason."""

import pytest

from vestige.methods import METHODS
from vestige_recipes import study


@pytest.mark.slow
def test_every_method_is_on_the_board_or_has_a_reason_and_a_second_call_keeps_all(tmp_path):
    report = study("leaderboard", size="tiny", seeds=1, out=tmp_path / "board")
    names = [row[0] for row in report.rows]
    assert names[0] == "noise ceiling"
    reasons = report.details["not_on_the_board"]
    for method in METHODS:
        assert any(name.replace(",", " ").split()[0] == method.name for name in (*names, *reasons))
    assert "vestige untrac" in reasons["untrac"]
    assert [row[1] for row in report.rows[1:]] == sorted((row[1] for row in report.rows[1:]), reverse=True)
    replays = [name for name in names if name.startswith("replay")]
    assert [("mean of 2" in name) for name in sorted(replays, key=len)] == [False, True]
    indexed = next(row for row in report.rows if row[0].startswith("influence"))
    assert indexed[-1] > 0
    assert (tmp_path / "board" / "leaderboard.png").exists()
    again = study("leaderboard", size="tiny", seeds=1, out=tmp_path / "board")
    # As texts: a ceiling that so few models have not is NaN.
    assert str(again.rows) == str(report.rows)
