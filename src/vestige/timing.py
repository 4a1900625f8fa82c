"""Seconds of every phase of a job, exclusive of the phases within it, and the bytes moved.

Off by default, and then it costs one comparison per phase. One job is measured at a time; phases nest, and may be
entered by the thread in which autograd runs a backward pass, because its caller waits for it.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vestige.progress import format_bytes

PHASES = ("forward", "backward", "compression", "reading", "writing", "preconditioning", "scoring")
"""In the order of the table; everything else is `OTHER`."""
OTHER = "other"
_MOST_SPANS = 10_000
"""Spans whose time on a GPU is still to be read: reading one waits for it."""


class _Mark(NamedTuple):
    """A moment: on the clock of this process and, where a job uses a GPU, in its queue."""

    time: float
    event: Any = None


def _mark() -> _Mark:
    event = None
    if (torch := _cuda()) is not None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return _Mark(time.perf_counter(), event)


@dataclass
class Profile:
    """Measurements of one job."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds of every phase, without those of phases inside it."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes read and written."""
    total: float = 0.0
    _stack: list[str] = field(default_factory=lambda: [OTHER])
    _since: _Mark = field(default_factory=_mark)
    _spans: list[tuple[str, _Mark, _Mark]] = field(default_factory=list)

    def charge(self) -> None:
        """Count the time since the last call as that of the innermost phase.

        On a GPU that is the time in its queue: work belongs to the phase that launched it, and nothing waits for it.
        """
        before, self._since = self._since, _mark()
        self._spans.append((self._stack[-1], before, self._since))
        if self._since.event is None or len(self._spans) >= _MOST_SPANS:
            self.settle()

    def settle(self) -> None:
        """Add up the spans so far; waits for the GPU where one is used."""
        for phase, before, after in self._spans:
            seconds = after.time - before.time
            if before.event is not None and after.event is not None:
                after.event.synchronize()
                seconds = before.event.elapsed_time(after.event) / 1000
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.total += seconds
        self._spans.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the block as those of a phase."""
        self.charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self.charge()
            self._stack.pop()

    def record(self) -> dict[str, Any]:
        """Return everything in JSON terms."""
        return {
            "seconds": {name: round(self.seconds.get(name, 0.0), 6) for name in (*PHASES, OTHER)},
            "total_seconds": round(self.total, 6),
            "bytes": dict(self.bytes),
            "peak_memory_bytes": _peaks(),
        }

    def table(self) -> str:
        """Return the same as a table to read."""
        lines = [f"{'phase':<16}{'seconds':>10}{'share':>8}"]
        for name in (*PHASES, OTHER):
            if (seconds := self.seconds.get(name, 0.0)) > 0:
                lines.append(f"{name:<16}{seconds:>10.3f}{seconds / max(self.total, 1e-9):>8.0%}")
        lines.append(f"{'total':<16}{self.total:>10.3f}")
        sizes = {**self.bytes, **{f"peak {where}": size for where, size in _peaks().items()}}
        return "\n".join(lines + [f"{name:<16}{format_bytes(size):>10}" for name, size in sizes.items()])


_current: Profile | None = None
"""A variable of the module, not of a context: autograd enters phases in a thread of its own."""


def time_phase(phase: str) -> AbstractContextManager[None]:
    """Count the block's seconds as those of `phase`, when a profile was requested."""
    return nullcontext() if _current is None else _current.phase(phase)


def count_bytes(kind: str, number: int) -> None:
    """Add to the bytes of a kind, such as "read"."""
    if _current is not None:
        _current.bytes[kind] = _current.bytes.get(kind, 0) + number


@contextmanager
def profile_phases(wanted: bool) -> Iterator[Profile | None]:
    """Profile the block; yield None, and measure nothing, unless it is `wanted`."""
    global _current
    if not wanted:
        yield None
        return
    outer, profile = _current, Profile()
    _current = profile
    try:
        yield profile
    finally:
        profile.charge()
        profile.settle()
        _current = outer


def _peaks() -> dict[str, int]:
    """Return the most memory held so far, in bytes: of this process ("memory"), and on a CUDA device ("gpu")."""
    peaks = {"memory": peak_memory_bytes(), "gpu": peak_gpu_memory_bytes()}
    return {where: size for where, size in peaks.items() if size}


def peak_memory_bytes() -> int:
    """Return the most resident memory of this process so far, in bytes; 0 where the system does not report it."""
    try:
        # `ru_maxrss` is inherited by the child on Linux; this line is of the process itself.
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes() -> int:
    """Return the most memory that tensors held at once on one CUDA device, in bytes; 0 where none was used."""
    if (torch := _cuda()) is None:
        return 0
    return max(int(torch.cuda.max_memory_allocated(number)) for number in range(torch.cuda.device_count()))


def _cuda() -> Any:
    """Return torch, where a job has loaded it and uses a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
