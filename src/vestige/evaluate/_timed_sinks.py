"""What each of several sinks costs while one backward pass feeds them all."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vestige.gradients import FactorSink, Side


class TimedSinks:
    """Hands every factor to several sinks, and notes the seconds that each of them takes."""

    def __init__(self, sinks: Sequence[FactorSink]) -> None:
        self._sinks = sinks
        self.seconds = [0.0] * len(sinks)

    def reduce(self, component: int, side: Side, factor: Any) -> tuple[Any, ...]:
        """Return what each of the sinks keeps."""
        return tuple(
            self._timed(number, lambda sink=sink: sink.reduce(component, side, factor))
            for number, sink in enumerate(self._sinks)
        )

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Let each sink add its share, of what it kept."""
        for number, sink in enumerate(self._sinks):
            self._timed(
                number,
                lambda sink=sink, number=number: sink.accumulate(component, examples, left[number], right[number]),
            )

    def _timed(self, number: int, work: Callable[[], Any]) -> Any:
        wait_for_device()
        started = time.perf_counter()
        result = work()
        wait_for_device()
        self.seconds[number] += time.perf_counter() - started
        return result


def wait_for_device() -> None:
    """Wait for the GPU, which works in the background; a clock has to wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
