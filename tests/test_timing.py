import threading
import time

import pytest

from vestige.timing import count_bytes, profiled, timed


def test_nothing_is_measured_unless_asked_for():
    with profiled(False) as profile, timed("forward"):
        count_bytes("read", 5)
    assert profile is None


def test_a_phase_does_not_count_the_phases_inside_it():
    with profiled(True) as profile:
        with timed("backward"):
            time.sleep(0.02)
            with timed("compression"):
                time.sleep(0.05)
        count_bytes("read", 5)
        count_bytes("read", 6)
    record = profile.record()
    assert 0.02 <= record["seconds"]["backward"] < 0.045
    assert 0.05 <= record["seconds"]["compression"] < 0.09
    assert sum(record["seconds"].values()) == pytest.approx(record["total_seconds"], abs=1e-5)
    assert record["bytes"] == {"read": 11}
    assert record["peak_memory_bytes"]["memory"] > 0
    assert "compression" in profile.table()


def test_a_phase_may_be_entered_by_the_thread_its_caller_waits_for():
    def hook():
        with timed("compression"):
            time.sleep(0.03)

    with profiled(True) as profile, timed("backward"):
        thread = threading.Thread(target=hook)
        thread.start()
        thread.join()
    assert profile.seconds["compression"] >= 0.03
    assert profile.seconds["backward"] < 0.02


def test_an_error_ends_the_phase():
    with profiled(True) as profile:
        with pytest.raises(ValueError, match="broken"), timed("reading"):
            raise ValueError("broken")
        time.sleep(0.02)
    assert profile.seconds["reading"] < 0.01
