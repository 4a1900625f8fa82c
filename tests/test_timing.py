import subprocess
import sys
import threading

import pytest

from vestige import timing
from vestige.timing import count_bytes, profile_phases, time_phase


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test lets pass."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_nothing_is_measured_unless_asked_for():
    with profile_phases(False) as profile, time_phase("forward"):
        count_bytes("read", 5)
    assert profile is None


def test_a_phase_does_not_count_the_phases_inside_it(clock):
    with profile_phases(True) as profile:
        with time_phase("backward"):
            clock(0.02)
            with time_phase("compression"):
                clock(0.05)
        count_bytes("read", 5)
        count_bytes("read", 6)
    record = profile.record()
    assert record["seconds"]["backward"] == pytest.approx(0.02)
    assert record["seconds"]["compression"] == pytest.approx(0.05)
    assert sum(record["seconds"].values()) == pytest.approx(record["total_seconds"], abs=1e-5)
    assert record["bytes"] == {"read": 11}
    assert record["peak_memory_bytes"]["memory"] > 0
    assert "compression" in profile.table()


def test_a_phase_may_be_entered_by_the_thread_its_caller_waits_for(clock):
    def hook():
        with time_phase("compression"):
            clock(0.03)

    with profile_phases(True) as profile, time_phase("backward"):
        thread = threading.Thread(target=hook)
        thread.start()
        thread.join()
    assert profile.seconds["compression"] == pytest.approx(0.03)
    assert profile.seconds["backward"] == 0


def test_on_a_gpu_time_is_that_of_its_queue_and_nothing_waits(clock, monkeypatch):
    """The CPU runs ahead: what it launches in a moment takes the card longer, and is charged to the phase."""
    queue, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = queue[0]

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    cuda = type("Cuda", (), {"Event": Event, "is_initialized": lambda: True, "device_count": lambda: 0})
    monkeypatch.setitem(sys.modules, "torch", type("Torch", (), {"cuda": cuda}))
    monkeypatch.setattr(timing, "peak_gpu_memory_bytes", lambda: 0)
    with profile_phases(True) as profile:
        for _ in range(3):
            with time_phase("forward"):
                clock(0.001)
                queue[0] += 0.2
        assert waits == []
    assert profile.seconds["forward"] == pytest.approx(0.6)
    assert profile.total == pytest.approx(0.6)


def test_a_process_does_not_inherit_the_peak_of_its_parent():
    held = b"x" * 400_000_000
    assert timing.peak_memory_bytes() > len(held)
    code = "from vestige.timing import peak_memory_bytes; print(peak_memory_bytes())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1_000_000 < int(printed) < 200_000_000
    del held


def test_an_error_ends_the_phase(clock):
    with profile_phases(True) as profile:
        with pytest.raises(ValueError, match="broken"), time_phase("reading"):
            raise ValueError("broken")
        clock(0.02)
    assert profile.seconds["reading"] == 0
    assert profile.seconds["other"] == pytest.approx(0.02)
