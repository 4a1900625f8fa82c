import io
import sys

import pytest

from vestige.progress import announce, format_bytes, format_seconds, format_units, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _audible(monkeypatch):
    monkeypatch.delenv("VESTIGE_QUIET", raising=False)


def test_lines_go_to_stderr_and_leave_stdout_to_the_answer(capsys):
    announce("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_quiet_silences_lines_and_progress(capsys, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    announce("hello")
    with progress(3, "Indexing") as bar:
        bar.advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_quick_job_prints_its_first_and_last_line(capsys):
    with progress(3, "Indexing") as bar:
        for _ in range(3):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Indexing: 3 examples"
    assert lines[1].startswith("Indexing: 3 of 3 examples in ")
    assert len(lines) == 2


def test_a_long_job_prints_at_most_one_line_in_ten_seconds(capsys):
    seconds = iter(range(0, 1000, 1))
    with progress(100, "Scoring", "rows", clock=lambda: float(next(seconds))) as bar:
        for _ in range(100):
            bar.advance()
    between = capsys.readouterr().err.splitlines()[1:-1]
    assert between[0] == "Scoring: 10 of 100 rows, 1.0 rows/s, 1 min 30 s left"
    assert len(between) == 9


def test_work_that_fails_does_not_claim_to_be_finished(capsys):
    with pytest.raises(ZeroDivisionError), progress(5, "Indexing"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == "Indexing: 5 examples\n"


def test_a_terminal_gets_a_bar_with_count_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(4, "Indexing") as bar:
        bar.advance(4)
    assert "Indexing" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1.0 MB"), (20e9, "20 GB"), (3e15, "3.0 PB")],
)
def test_bytes_read_in_decimal_units(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.31, "0.3 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.8, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_in_two_units(seconds, text):
    assert format_seconds(seconds) == text


def test_a_measurement_stands_beside_the_rate(capsys):
    seconds = iter(range(0, 1000, 1))
    with progress(20, "Training", "steps", clock=lambda: float(next(seconds))) as bar:
        for step in range(20):
            bar.note(f"loss {20 - step}")
            bar.advance()
    first, between, last = capsys.readouterr().err.splitlines()
    assert first == "Training: 20 steps"
    assert between == "Training: 10 of 20 steps, 1.0 steps/s, loss 11, 10 s left"
    assert last.startswith("Training: 20 of 20 steps in ")
    assert last.endswith(", loss 1")


def test_one_unit_is_in_the_singular():
    assert [format_units(count, "layers") for count in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert format_units(1, "queries") == "1 query"
    assert format_units(1234, "examples") == "1,234 examples"
