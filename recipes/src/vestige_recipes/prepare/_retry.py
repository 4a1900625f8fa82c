"""When a request is sent again, and when it is not: what a failure says, and how long to wait."""

import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any

from pydantic import BaseModel, ValidationError

from vestige.parsing import parse_json
from vestige.progress import announce, format_seconds
from vestige_recipes.prepare._replies import Finish, Reply

FIRST_DELAY = 0.5
"""Seconds before a failed request is sent again; twice as long after each further failure."""
LONGEST_DELAY = 60.0
_LONGEST_ASKED = 24 * 3600.0
"""Who asks for a longer wait, or one that is no number, is not listened to."""
_ANNOUNCED = 15.0
"""Seconds of waiting that a person is told of."""

PASSING = (408, 409, 425, 429)
"""Refusals by status that pass, as everything from 500 does."""
OF_THIS_TEXT: Mapping[str, Finish] = {
    "content_filter": "refused",
    "content_policy_violation": "refused",
    "context_length_exceeded": "too-long",
}
"""Refusals by code that concern the text and nothing else: the reply to it, as it were."""
NEVER_PASSING = ("insufficient_quota", "billing_hard_limit_reached")


class Again(Exception):
    """The request failed in a way that passes."""

    def __init__(self, reason: str, wait: float | None = None, *, maybe_billed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the endpoint asks for."""
        self.maybe_billed = maybe_billed


class Stopped(Exception):
    """Other requests showed that there is no point in going on, or somebody pressed Ctrl-C."""


class Pace:
    """What all requests share: whether to go on, and until when the endpoint wants none."""

    def __init__(self) -> None:
        self.stop = Event()
        self._lock = Lock()
        self._not_before = 0.0

    def turn(self) -> None:
        """Returns when a request may be sent.

        Raises:
            Stopped: None may.
        """
        while (wait := self._not_before - time.monotonic()) > 0 and not self.stop.is_set():
            # Not all at the same moment.
            self.stop.wait(wait + random.uniform(0, min(wait, 1.0) / 4))
        if self.stop.is_set():
            raise Stopped

    def rest(self, attempt: int, wait: float | None) -> None:
        """Waits after a failure: exponentially with jitter, and all requests as long as the endpoint asks for."""
        if wait is not None:
            with self._lock:
                until = time.monotonic() + wait
                if wait > _ANNOUNCED and until > self._not_before + 1:
                    announce(f"The endpoint asks to wait {format_seconds(wait)}.")
                self._not_before = max(self._not_before, until)
            return
        self.stop.wait(min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0))


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds in a Retry-After header, which may also hold a date; None if there is none that can be read."""
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            wait = float(milliseconds) / 1000
        elif text is None:
            return None
        else:
            wait = _seconds_until(text)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return max(0.0, wait) if wait <= _LONGEST_ASKED else None


def _seconds_until(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return parsedate_to_datetime(text).timestamp() - time.time()


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Body(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


def read_reply(text: str) -> Reply:
    """The reply in the body of an answer.

    Raises:
        Again: It is broken, or not what was announced.
    """
    try:
        body = _Body.model_validate(parse_json(text))
        choice = body.choices[0]
    except (ValueError, ValidationError, IndexError, RecursionError):
        raise Again("broken reply", maybe_billed=True) from None
    usage = body.usage or _Usage()
    refused = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
    finish: Finish = "refused" if refused else "length" if choice.finish_reason == "length" else "stop"
    said = choice.message.content or choice.message.refusal or ""
    return Reply(text=said, finish=finish, sent=usage.prompt_tokens, received=usage.completion_tokens)


def code_of(body: Any) -> str:
    """The code or type of an error's body, such as insufficient_quota."""
    error = body.get("error", body) if isinstance(body, Mapping) else {}
    found = [error.get(name) for name in ("code", "type")] if isinstance(error, Mapping) else []
    return next((str(each) for each in found if isinstance(each, str)), "")
