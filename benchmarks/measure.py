"""CPU seconds, wall seconds and peak memory of a piece of work, on one pinned thread."""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """What one run of one engine cost."""

    cpu_seconds: float
    """User and system time of all threads of the process."""
    wall_seconds: float
    peak_bytes: int
    """Most memory resident at once while it ran, interpreter and model included."""
    disk_bytes: int = 0
    """What it left on disk."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def pin(core: int | None = None) -> None:
    """Keep this process and the ones it starts on one core with one thread; call before torch is imported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if core is None else core})


def pinned_core() -> int:
    """The core that `pin` chose."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def measure(work: Callable[[], object], leaves: Path | None = None) -> Measurement:
    """Run `work` once; `leaves` is the folder whose size it is charged with."""
    _forget_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measurement(cpu, wall, _peak_bytes(), folder_bytes(leaves) if leaves else 0)


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _forget_peak() -> None:
    """Start the kernel's high-water mark of resident memory anew, after handing free memory back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    # Elsewhere the mark cannot be reset: this is the peak since the process started (bytes on macOS).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
