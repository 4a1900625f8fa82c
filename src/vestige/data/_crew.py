"""Processes that encode parts: each is busy with one chunk, and the answers come in the order of the chunks."""

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, NamedTuple, final

from vestige.data._parts import Chunk, PackedPart, PartEncoder
from vestige.errors import UserError, VestigeError

_PATIENCE_SECONDS = 10.0


class Answer(NamedTuple):
    """A chunk and its encoded part."""

    chunk: Chunk
    part: PackedPart | None
    """None if it was not requested, because it is there already."""


def in_this_process(encoder: PartEncoder, requests: Iterable[tuple[Chunk, bool]]) -> Iterator[Answer]:
    """Yield answers for chunks of which some (True) have to be encoded."""
    for chunk, wanted in requests:
        yield Answer(chunk, encoder.packed(chunk) if wanted else None)


def in_processes(encoder: PartEncoder, requests: Iterable[tuple[Chunk, bool]], workers: int) -> Iterator[Answer]:
    """Yield the same, encoded by several processes; two chunks more than there are processes are in memory.

    Raises:
        DataError: The first chunk that cannot be encoded, after the answers before it.
        UserError: A process ended.
    """
    crew = _Crew(encoder, workers)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="vestige-tokenise") as threads:
            coming: deque[tuple[Chunk, Future[PackedPart] | None]] = deque()
            for chunk, wanted in requests:
                coming.append((chunk, threads.submit(crew.ask, chunk) if wanted else None))
                if len(coming) > workers + 1:
                    yield _first(coming)
            while coming:
                yield _first(coming)
    finally:
        crew.end()


def _first(coming: deque[tuple[Chunk, Future[PackedPart] | None]]) -> Answer:
    chunk, future = coming.popleft()
    return Answer(chunk, None if future is None else future.result())


@final
class _Crew:
    """Processes that wait for chunks."""

    def __init__(self, encoder: PartEncoder, count: int) -> None:
        content = pickle.dumps(encoder, protocol=pickle.HIGHEST_PROTOCOL)
        self._processes = [_start(content) for _ in range(count)]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def ask(self, chunk: Chunk) -> PackedPart:
        """Return the part, from the first process that is idle."""
        process = self._idle.get()
        try:
            pickle.dump(chunk, _pipe(process.stdin), protocol=pickle.HIGHEST_PROTOCOL)
            _pipe(process.stdin).flush()
            answer = pickle.load(_pipe(process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"A process that turns text into tokens ended (exit status {process.poll()}), often for lack of "
                "memory. Finished parts are kept: run the same command again, with fewer --workers if memory is short."
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, VestigeError):
            raise answer
        if isinstance(answer, str):
            raise VestigeError(f"A process that turns text into tokens failed:\n{answer}")
        return answer

    def end(self) -> None:
        """End all processes."""
        for process in self._processes:
            with suppress(OSError):
                _pipe(process.stdin).close()
        for process in self._processes:
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()


def _start(content: bytes) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "VESTIGE_QUIET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vestige.data._worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    # A process that ends before it has read this is noticed at its first chunk.
    with suppress(OSError):
        _pipe(process.stdin).write(content)
        _pipe(process.stdin).flush()
    return process


def _pipe(stream: IO[bytes] | None) -> Any:
    assert stream is not None
    return stream
