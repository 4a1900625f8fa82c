"""Questions asked from the browser: a process that keeps the model in memory answers one after another.

A process and not a thread, so that a question can be stopped as the command is stopped: by the signal of Ctrl-C.
"""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from vestige.errors import UserError
from vestige.progress import quiet
from vestige.storage import partial_folder, remove_partial

if TYPE_CHECKING:
    from vestige.data import TokenizedData
    from vestige.models import LoadedModel
    from vestige.runs import Scores

QUESTIONS = "questions"
"""Folder, in the workspace, of the runs that questions become."""
SOURCES = 5
"""Training examples that are shown beside an answer; the run has more."""
_LONGEST = 48
"""Letters of a run's name."""

Event = dict[str, Any]


class Asker:
    """Hands questions to the process that answers them, one at a time, and passes on what it reports."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._events: list[Event] = []
        self._busy = False
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, index: Path, question: str, out: Path, about: Event) -> None:
        """Begin to answer a question; without one, load the index's model.

        Args:
            index: Of the training data.
            question: As `vestige attribute` takes it.
            out: Folder of the run, which does not exist.
            about: What the first event says of it.

        Raises:
            UserError: Another question is being answered.
        """
        with self._changed:
            if self._busy:
                raise UserError("Another question is being answered. Wait for it, or stop it.")
            self._busy, self._events = True, [about]
            if self._process is None or not self._process.is_alive():
                self._start()
        assert self._pipe is not None
        self._pipe.send((index, question, out))

    def events(self) -> Iterator[Event]:
        """Yield what is reported of the last question, from its beginning until it is answered, stopped or refused."""
        events, seen = self._events, 0
        while True:
            with self._changed:
                while len(events) == seen and self._busy and self._events is events:
                    self._changed.wait()
                new, over = events[seen:], not self._busy or self._events is not events
            yield from new
            seen += len(new)
            if over:
                return

    def stop(self) -> None:
        """Stop the question that is being answered, as Ctrl-C stops the command; the model stays in memory."""
        with self._changed:
            if self._busy and self._process is not None and self._process.is_alive():
                os.kill(self._process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()
        Thread(target=self._receive, args=(self._pipe,), daemon=True).start()

    def _receive(self, pipe: Connection) -> None:
        """Collect events until the process is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                event = pipe.recv()
                with self._changed:
                    self._events.append(event)
                    self._busy = not event.get("over", False)
                    self._changed.notify_all()
        with self._changed:
            if self._busy:
                self._events.append({"error": "The process that answers is gone. Ask again.", "over": True})
            self._busy = False
            self._changed.notify_all()


def choose_folder(workspace: Path, question: str) -> Path:
    """Return a folder in the workspace for the run of a question, named after its words, that is not there yet."""
    words = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")[:_LONGEST].strip("-") or "question"
    number = 1
    while True:
        folder = workspace / QUESTIONS / (words if number == 1 else f"{words}-{number}")
        if not folder.exists() and not partial_folder(folder).exists():
            return folder
        number += 1


def _work(pipe: Connection) -> None:
    """Answer what comes through the pipe until its other end is closed; an interrupt ends one question."""
    loaded: dict[Path, LoadedModel] = {}
    with quiet():
        while True:
            out: Path | None = None
            try:
                index, question, out = pipe.recv()
                _answer(loaded, index, question, out, pipe.send)
                pipe.send({"over": True})
            except EOFError:
                return
            except KeyboardInterrupt:
                if out is not None:
                    if not out.exists():
                        remove_partial(out)
                    pipe.send({"error": "Stopped. What was on disk stays.", "over": True})
            except UserError as error:
                pipe.send({"error": str(error), "over": True})
            except Exception as error:
                pipe.send({"error": f"This is a bug: {type(error).__name__}: {error}", "over": True})


def _answer(
    loaded: "dict[Path, LoadedModel]", index: Path, question: str, out: Path, send: Callable[[Event], None]
) -> None:
    # torch and transformers take seconds, which the server's own process does without.
    from vestige.indexes import Index
    from vestige.methods import Live, attribute
    from vestige.models import load_model
    from vestige.settings import AttributeSettings

    if index not in loaded:
        send({"stage": "Loading the model"})
        manifest = Index.open(index).manifest
        loaded.clear()
        loaded[index] = load_model(manifest.model.name, quantize=manifest.quantize)
    if not question:
        return
    send({"stage": "Answering"})
    settings = AttributeSettings(index=index, queries=[question], out=out)

    def show_answer(queries: "TokenizedData", _: object) -> None:
        send({"answer": queries.examples[0].answer, "stage": "Looking for its sources"})

    def show_ranking(scores: "Scores") -> None:
        send({"sources": _describe_sources(scores), "stage": "Checking how far to trust them"})

    live = Live(loaded[index], lambda text: send({"answer": text}))
    vars(attribute)["run"](settings, on_answers=show_answer, on_ranking=show_ranking, live=live)


def _describe_sources(scores: "Scores") -> Event:
    """Return the strongest rows behind an answer, and what they say of it in words."""
    from vestige.runs import conclude

    ends = {"proponents": scores.top(0, SOURCES), "opponents": scores.bottom(0, SOURCES)}
    names = ("example_id", "text", "source", "score", "strength", "turns")
    rows = {end: [{name: getattr(row, name) for name in names} for row in rows] for end, rows in ends.items()}
    return {"conclusion": conclude(scores, 0).sentences, "sign": scores.meaning.sign, **rows}
