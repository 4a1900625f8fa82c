"""Other words through an OpenAI-compatible endpoint: several requests at a time, sent again when they fail."""

import base64
import importlib.util
import os
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from vestige.data import repair
from vestige.errors import MissingExtra, SpecError, UserError
from vestige.parsing import parse_json
from vestige.progress import Progress, announce, format_seconds, progress
from vestige.terminal import shorten
from vestige_recipes.commands import ParaphraseSettings
from vestige_recipes.prepare.replies import Finish, Keep, Reply, Request

DEFAULT_ADDRESS = "https://api.openai.com/v1"
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
"""Seconds before a failed request is sent again: the first, doubled after each further failure up to the longest."""
_LONGEST_ASKED = 24 * 3600.0
"""A longer wait that an endpoint asks for, or one that is no number, is ignored."""
_ANNOUNCED = 15.0
"""Seconds of waiting that are announced."""
_FEWEST_GIVEN_UP = 3

_PASSING = (408, 409, 425, 429)
"""Refusals by status that pass, as everything from 500 does."""
_OF_THIS_TEXT: Mapping[str, Finish] = {
    "content_filter": "refused",
    "content_policy_violation": "refused",
    "context_length_exceeded": "too-long",
}
"""Refusals by code that concern the text and nothing else: they stand for its reply."""
_NEVER_PASSING = ("insufficient_quota", "billing_hard_limit_reached")


class Again(Exception):
    """The request failed in a way that passes."""

    def __init__(self, reason: str, wait: float | None = None, *, maybe_billed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the endpoint asks for."""
        self.maybe_billed = maybe_billed


class Pace:
    """What all requests share: whether to go on, and until when the endpoint wants none."""

    def __init__(self) -> None:
        self.stop = Event()
        self._lock = Lock()
        self._not_before = 0.0

    def wait_for_turn(self) -> bool:
        """Return when a request may be sent: True, or False when none may any more."""
        while (wait := self._not_before - time.monotonic()) > 0 and not self.stop.is_set():
            # Not all at the same moment.
            self.stop.wait(wait + random.uniform(0, min(wait, 1.0) / 4))
        return not self.stop.is_set()

    def rest(self, attempt: int, wait: float | None) -> None:
        """Wait after a failure: exponentially with jitter, and all requests as long as the endpoint asks for."""
        if wait is None:
            self.stop.wait(min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0))
            return
        with self._lock:
            until = time.monotonic() + wait
            if wait > _ANNOUNCED and until > self._not_before + 1:
                announce(f"The endpoint asks to wait {format_seconds(wait)}.")
            self._not_before = max(self._not_before, until)


class Endpoint:
    """Asks a model behind an address. What was sent and what failed is counted in `sent` and `failed`."""

    def __init__(self, settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._address = _check_address(os.environ.get("OPENAI_BASE_URL") or DEFAULT_ADDRESS)
        self.address = _without_secrets(self._address)
        """As it is shown and recorded."""
        self.identity: Mapping[str, Any] = {
            "paraphraser": "endpoint",
            "address": self.address,
            "model": settings.api_model,
            "instruction": settings.instruction,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_new_tokens": settings.max_new_tokens,
        }
        self.sent = 0
        self.failed: Counter[str] = Counter()
        self.maybe_billed = 0
        """Requests without a usable reply that the endpoint may have charged for."""
        self._replaced = 0
        """Halves of surrogate pairs in replies, of emoji that the model did not finish, that are U+FFFD now."""
        self._lock = Lock()
        self._pace = Pace()
        self._in_a_row = 0
        self._given_up: dict[str, str] = {}

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request.

        Replies that are under way when Ctrl-C is pressed are waited for, since they are paid for.
        """
        if not requests:
            return
        client = _client(self._address, self._settings.timeout)
        shown = progress(len(requests), "Paraphrasing", unit="texts")
        with client, shown as counter, ThreadPoolExecutor(self._settings.concurrency, "vestige-endpoint") as pool:
            futures = [pool.submit(self._answer, client, request, keep, counter) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                announce("Waiting for the replies under way, which are paid for; Ctrl-C once more does not wait.")
                raise
            finally:
                self._pace.stop.set()
                for future in futures:
                    future.cancel()
        if self._replaced:
            announce(f"Replies: {self._replaced:,} halves of surrogate pairs (cut emoji) were replaced with U+FFFD.")
        for future in futures:
            if not future.cancelled():
                future.result()
        if self._given_up:
            text, reason = next(iter(self._given_up.items()))
            raise UserError(
                f"{len(self._given_up):,} of {len(requests):,} texts got no reply in {self._settings.retries + 1} "
                f"attempts each, such as {text[:60]!r} ({reason}). The other replies are kept: run the same command "
                "again to ask for these alone, with more --retries or fewer at a time (--concurrency)."
            )

    def _answer(self, client: Any, request: Request, keep: Keep, counter: Progress) -> None:
        reason = ""
        for attempt in range(self._settings.retries + 1):
            if not self._pace.wait_for_turn():
                return
            with self._lock:
                self.sent += 1
            try:
                reply = self._send(client, request)
            except Again as failure:
                reason = str(failure)
                with self._lock:
                    self.failed[reason] += 1
                    self.maybe_billed += failure.maybe_billed
                if attempt < self._settings.retries:
                    self._pace.rest(attempt, failure.wait)
                continue
            text, halves = repair(reply.text)
            keep(request, reply.model_copy(update={"text": text}))
            with self._lock:
                self._in_a_row = 0
                self._replaced += len(halves)
                counter.advance()
            return
        self._give_up(request, reason)

    def _send(self, client: Any, request: Request) -> Reply:
        import openai

        given = self._settings
        settings: dict[str, Any] = {} if given.max_new_tokens is None else {"max_tokens": given.max_new_tokens}
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=given.api_model,
                messages=[{"role": "system", "content": given.instruction}, {"role": "user", "content": request.text}],
                temperature=given.temperature,
                seed=given.seed + request.number - 1,
                # A server that knows this header answers a request that is sent again without charging again.
                extra_headers={"Idempotency-Key": request.key},
                **settings,
            )
            return read_reply(raw.text)
        except openai.APITimeoutError:
            raise Again(f"no word for {given.timeout:g} s", maybe_billed=True) from None
        except openai.APIConnectionError:
            raise Again("connection lost", maybe_billed=True) from None
        except openai.APIStatusError as error:
            return self._resolve_refusal(error)
        except openai.OpenAIError as error:
            raise Again(f"broken answer ({self._mask(str(error))})", maybe_billed=True) from None

    def _resolve_refusal(self, error: Any) -> Reply:
        """Return the reply that a refusal (an `openai.APIStatusError`) amounts to."""
        status, code = error.status_code, _code_of(error.body)
        if code in _OF_THIS_TEXT:
            return Reply(text="", finish=_OF_THIS_TEXT[code])
        if (status in _PASSING or status >= 500) and code not in _NEVER_PASSING:
            raise Again(f"status {status}", read_wait(error.response.headers))
        advice = {
            401: "Check OPENAI_API_KEY.",
            403: "Check what the key may do.",
            404: "Check --api-model and OPENAI_BASE_URL.",
            429: "Check what is left of the account's quota.",
        }.get(status, "Check --api-model, --temperature and --max-new-tokens.")
        raise UserError(
            f"{self.address} refuses (status {status}): {self._mask(error.message)}\n{advice} Replies so far are kept."
        )

    def _mask(self, message: str) -> str:
        """Return what the endpoint says, without the key or password that it may repeat."""
        parts = urlsplit(self._address)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        message = shorten(message, 500)
        for secret in (os.environ.get("OPENAI_API_KEY") or "", password, basic):
            if secret.strip(":"):
                message = message.replace(secret, "***")
        # And what looks like a secret behind Bearer, Basic or sk-.
        message = re.sub(r"(?i)\b(bearer|basic)\s+[^\s'\",;]+", r"\1 ***", message)
        return re.sub(r"\bsk-[\w*-]+", "sk-***", message)

    def _give_up(self, request: Request, reason: str) -> None:
        """Leave a text without a reply; several in a row mean that the endpoint is down."""
        with self._lock:
            self._given_up[request.text] = reason
            self._in_a_row += 1
            down = self._in_a_row >= max(self._settings.concurrency, _FEWEST_GIVEN_UP)
        if down:
            raise UserError(
                f"{self.address} does not answer: the last {self._in_a_row} texts failed {self._settings.retries + 1} "
                f"times each ({reason}). Replies so far are kept: run the same command again to go on."
            )


def read_reply(text: str) -> Reply:
    """Return the reply in the body of an answer."""
    try:
        body = parse_json(text)
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        refusal = message.get("refusal")
        filtered = bool(refusal) or finish == "content_filter"
        return Reply(
            text=message.get("content") or refusal or "",
            finish="refused" if filtered else "length" if finish == "length" else "stop",
            sent=usage.get("prompt_tokens"),
            received=usage.get("completion_tokens"),
        )
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise Again("broken reply", maybe_billed=True) from None


def read_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a Retry-After header, which may also hold a date; None if none can be read."""
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after", "")
    try:
        if milliseconds is not None:
            wait = float(milliseconds) / 1000
        elif re.search("[A-Za-z]{3}", text):
            wait = parsedate_to_datetime(text).timestamp() - time.time()
        else:
            wait = float(text)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return max(0.0, wait) if wait <= _LONGEST_ASKED else None


def _code_of(body: Any) -> str:
    """Return the code or type of an error's body, such as insufficient_quota."""
    error = body.get("error", body) if isinstance(body, Mapping) else {}
    found = [error.get(name) for name in ("code", "type")] if isinstance(error, Mapping) else []
    return next((each for each in found if isinstance(each, str)), "")


def _check_address(address: str) -> str:
    """Return the address of an endpoint, to which a path is appended."""
    try:
        parts = urlsplit(address.strip().rstrip("/"))
        _ = parts.port
    except ValueError as error:
        raise SpecError(
            f"OPENAI_BASE_URL is not an address ({error}). Expected one such as {DEFAULT_ADDRESS}."
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.hostname.isprintable():
        raise SpecError(f"OPENAI_BASE_URL is not a web address. Expected one such as {DEFAULT_ADDRESS}.")
    if parts.query or parts.fragment:
        raise SpecError(
            f"OPENAI_BASE_URL holds a query (what follows ?), to which no path can be added. Set it to "
            f"{_without_secrets(address)}, and give a key as OPENAI_API_KEY."
        )
    return urlunsplit(parts)


def _without_secrets(address: str) -> str:
    """Return the address without the user, password and query that it may carry."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _client(address: str, timeout: float) -> Any:
    if importlib.util.find_spec("openai") is None:
        raise MissingExtra("Asking an endpoint needs the package `openai`: pip install 'vestige[openai]'")
    import openai

    key = os.environ.get("OPENAI_API_KEY")
    if not key and address == DEFAULT_ADDRESS:
        raise SpecError(
            "There is neither a key nor an address: set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint of your own."
        )
    if key and not (key.isascii() and key.isprintable()):
        raise SpecError("OPENAI_API_KEY holds letters that no key has (only ASCII can be sent). Copy the key again.")
    # A server of one's own often wants no key, but the client does. It does not send anything again by itself: its own
    # way gives up on Retry-After above a minute, and takes a broken reply for one.
    return openai.OpenAI(api_key=key or "none", base_url=address, timeout=timeout, max_retries=0)
