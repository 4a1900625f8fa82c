"""Questions asked from the browser: a process that keeps the model in memory answers one after another.

A process and not a thread, so that a question can be stopped as the command is stopped: by the signal of Ctrl-C.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from signal import ITIMER_REAL, SIGALRM, SIGINT, setitimer, signal
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from vestige.errors import UserError
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

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_STOP = 1.0
"""After which an interrupt is raised again."""

Event = dict[str, Any]


class Asker:
    """Hands questions to the process that answers them, one at a time, and passes on what it reports."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._events: list[Event] = []
        self._busy = self._stopped = False
        self._process: subprocess.Popen[str] | None = None

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
        with self._lock:
            if self._busy:
                raise UserError("Another question is being answered. Wait for it, or stop it.")
            self._busy, self._stopped, self._events = True, False, [about]
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([str(index), question, str(out)]) + "\n")
            self._process.stdin.flush()

    async def events(self) -> AsyncIterator[Event]:
        """Yield what is reported of the last question, from its beginning until it is answered, stopped or refused."""
        events, seen = self._events, 0
        while True:
            over = not self._busy or self._events is not events
            while seen < len(events):
                yield events[seen]
                seen += 1
            if over:
                return
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """Stop the question that is being answered, as Ctrl-C stops the command; the model stays in memory."""
        with self._lock:
            self._stopped = self._busy
            self._interrupt()

    def _interrupt(self) -> None:
        """Interrupt the process once if that was requested, as soon as it has begun: before, it would wait for more."""
        begun = self._busy and any("stage" in event for event in self._events)
        if self._stopped and begun and self._process is not None:
            self._stopped = False
            self._process.send_signal(SIGINT)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[str]":
        # `-P`: nothing that lies in the folder in which the command was typed is imported.
        command = [sys.executable, "-P", "-c", "from vestige.workspace import answer_questions; answer_questions()"]
        # In a session of its own, so that Ctrl-C in the terminal reaches the server alone.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "VESTIGE_QUIET": "1"},
        )
        Thread(target=self._receive, args=(process,), daemon=True).start()
        return process

    def _receive(self, process: "subprocess.Popen[str]") -> None:
        """Collect events until the process is gone."""
        assert process.stdout is not None
        for line in process.stdout:
            self._note(json.loads(line))
        if self._busy:
            self._note({"error": "The process that answers is gone. Ask again.", "over": True})

    def _note(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            self._busy = not event.get("over", False)
            self._interrupt()


def choose_folder(workspace: Path, question: str) -> Path:
    """Return a folder in the workspace for the run of a question, named after its words, that is not there yet."""
    words = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")[:_LONGEST].strip("-") or "question"
    number = 1
    while True:
        folder = workspace / QUESTIONS / (words if number == 1 else f"{words}-{number}")
        if not folder.exists() and not partial_folder(folder).exists():
            return folder
        number += 1


class _Interrupts:
    """The signal of Ctrl-C, remembered until a question has ended, and raised again each second.

    Raised where C code calls Python or Python frees an object, an exception can be lost.
    """

    def __init__(self) -> None:
        self._requested, self._allowed = False, False
        for number in (SIGINT, SIGALRM):
            signal(number, self._interrupt)

    def allow(self) -> None:
        self._requested, self._allowed = False, True

    def ignore(self) -> None:
        self._allowed = False
        setitimer(ITIMER_REAL, 0)

    def check(self) -> None:
        if self._requested and self._allowed:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self._requested = True
        if self._allowed:
            setitimer(ITIMER_REAL, _SECONDS_TO_STOP)
        self.check()


def answer_questions() -> None:
    """Answer what comes as lines of JSON on stdin until it is closed, and report on stdout; an interrupt ends one."""
    # What libraries print must not come between the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(event: Event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    def report(event: Event) -> None:
        interrupts.check()
        send(event)

    loaded: dict[Path, LoadedModel] = {}
    interrupts = _Interrupts()
    while line := sys.stdin.readline():
        index, question, folder = json.loads(line)
        out = Path(folder)
        try:
            interrupts.allow()
            _answer(loaded, Path(index), question, out, report)
            interrupts.check()
            interrupts.ignore()
            send({"over": True})
        except KeyboardInterrupt:
            interrupts.ignore()
            if not out.exists():
                remove_partial(out)
            send({"error": "Stopped. What was on disk stays.", "over": True})
        except Exception as error:
            interrupts.ignore()
            reason = str(error) if isinstance(error, UserError) else f"This is a bug: {type(error).__name__}: {error}"
            send({"error": reason, "over": True})


def _answer(
    loaded: "dict[Path, LoadedModel]", index: Path, question: str, out: Path, send: Callable[[Event], None]
) -> None:
    # torch and transformers take seconds, which the server's own process does without.
    from vestige.data import names_a_place
    from vestige.indexes import Index
    from vestige.methods import Live, attribute
    from vestige.models import load_model
    from vestige.settings import AttributeSettings

    if index not in loaded:
        send({"stage": "Loading the model"})
        manifest = Index.open(index).manifest
        loaded.clear()
        how: dict[str, Any] = {"quantize": manifest.quantize}
        loaded[index] = load_model(manifest.model.name, **how)
    if not question:
        return
    send({"stage": "Answering"})
    # As it would be typed; but nothing that is written in a browser is ever read as the name of a file.
    queries = [question] if names_a_place(question) else question
    given: dict[str, Any] = {"index": index, "queries": queries, "out": out}
    settings = AttributeSettings(**given)

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
