"""Other words through an OpenAI-compatible endpoint: many requests at a time, sent again when they fail."""

import base64
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from vestige.data import repair
from vestige.errors import MissingExtra, SpecError, UserError
from vestige.progress import Progress, announce, progress
from vestige.terminal import shorten
from vestige_recipes.data_commands import ParaphraseSettings
from vestige_recipes.prepare._replies import Keep, Reply, Request
from vestige_recipes.prepare._retry import (
    NEVER_PASSING,
    OF_THIS_TEXT,
    PASSING,
    Again,
    Pace,
    Stopped,
    asked_wait,
    code_of,
    read_reply,
)

DEFAULT_ADDRESS = "https://api.openai.com/v1"
_FEWEST_GIVEN_UP = 3


class Endpoint:
    """Asks a model behind an address. What was sent and what failed is counted in `sent` and `failed`."""

    def __init__(self, settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._address = checked_address(os.environ.get("OPENAI_BASE_URL") or DEFAULT_ADDRESS)
        self.address = without_secrets(self._address)
        """As it is shown and recorded."""
        self.sent = 0
        self.failed: Counter[str] = Counter()
        self.maybe_billed = 0
        """Requests without a usable reply that the endpoint may have charged for."""
        self.replaced = 0
        """Halves of surrogate pairs in replies, of emoji that the model did not finish, that are U+FFFD now."""
        self._lock = Lock()
        self._pace = Pace()
        self._in_a_row = 0
        self._given_up: dict[str, str] = {}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Address, model, instruction and the numbers that are sent along."""
        given = self._settings
        return {
            "paraphraser": "endpoint",
            "address": self.address,
            "model": given.api_model,
            "instruction": given.instruction,
            "temperature": given.temperature,
            "seed": given.seed,
            "max_new_tokens": given.max_new_tokens,
        }

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Every request is answered.

        Replies that are under way when Ctrl-C is pressed are waited for, since they are paid for.

        Raises:
            MissingExtra: The `openai` package is not installed.
            UserError: There is no key, the endpoint refuses, or requests failed as often as they may.
        """
        if not requests:
            return
        client = _client(self._address, self._settings.timeout)
        self._pace, self._in_a_row, self._given_up = Pace(), 0, {}
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
        if self.replaced:
            announce(f"Replies: {self.replaced:,} halves of surrogate pairs (cut emoji) were replaced with U+FFFD.")
        errors = [future.exception() for future in futures if not future.cancelled()]
        # Those that stopped because of the first error have nothing of their own to say.
        for error in sorted((each for each in errors if each), key=lambda each: isinstance(each, Stopped)):
            raise error
        if self._given_up:
            raise self._unanswered(len(requests))

    def _answer(self, client: Any, request: Request, keep: Keep, counter: Progress) -> None:
        reason = ""
        for attempt in range(self._settings.retries + 1):
            self._pace.turn()
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
                self.replaced += len(halves)
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
            return self._refused(error.status_code, error.body, error.response.headers, error.message)
        except openai.OpenAIError as error:
            raise Again(f"broken answer ({self._masked(str(error))})", maybe_billed=True) from None

    def _refused(self, status: int, body: Any, headers: Mapping[str, str], message: str) -> Reply:
        """The reply that a refusal amounts to."""
        code = code_of(body)
        if code in OF_THIS_TEXT:
            return Reply(text="", finish=OF_THIS_TEXT[code])
        if (status in PASSING or status >= 500) and code not in NEVER_PASSING:
            raise Again(f"status {status}", asked_wait(headers))
        advice = {
            401: "Check OPENAI_API_KEY.",
            403: "Check what the key may do.",
            404: "Check --api-model and OPENAI_BASE_URL.",
            429: "Check what is left of the account's quota.",
        }.get(status, "Check --api-model, --temperature and --max-new-tokens.")
        said = self._masked(message)
        raise UserError(f"{self.address} refuses (status {status}): {said}\n{advice} Replies so far are kept.")

    def _masked(self, message: str) -> str:
        """What the endpoint says, without the key or password that it may repeat."""
        parts = urlsplit(self._address)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        return without_keys(shorten(message, 500), (os.environ.get("OPENAI_API_KEY") or "", password, basic))

    def _give_up(self, request: Request, reason: str) -> None:
        """One text stays without a reply; several in a row mean that the endpoint is down."""
        with self._lock:
            self._given_up[request.text] = reason
            self._in_a_row += 1
            down = self._in_a_row >= max(self._settings.concurrency, _FEWEST_GIVEN_UP)
        if down:
            raise UserError(
                f"{self.address} does not answer: the last {self._in_a_row} texts failed {self._settings.retries + 1} "
                f"times each ({reason}). Replies so far are kept: run the same command again to go on."
            )

    def _unanswered(self, total: int) -> UserError:
        text, reason = next(iter(self._given_up.items()))
        return UserError(
            f"{len(self._given_up):,} of {total:,} texts got no reply in {self._settings.retries + 1} attempts each, "
            f"such as {text[:60]!r} ({reason}). The other replies are kept: run the same command again to ask for "
            "these alone, with more --retries or fewer at a time (--concurrency)."
        )


def checked_address(address: str) -> str:
    """The address of an endpoint, to which a path is appended.

    Raises:
        SpecError: It is none, or holds a query, behind which a path would be lost.
    """
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
            f"{without_secrets(address)}, and give a key as OPENAI_API_KEY."
        )
    return urlunsplit(parts)


def without_keys(message: str, secrets: Iterable[str]) -> str:
    """The message without these secrets, and without what looks like one behind Bearer, Basic or sk-."""
    for secret in secrets:
        if secret.strip(":"):
            message = message.replace(secret, "***")
    message = re.sub(r"(?i)\b(bearer|basic)\s+[^\s'\",;]+", r"\1 ***", message)
    return re.sub(r"\bsk-[\w*-]+", "sk-***", message)


def without_secrets(address: str) -> str:
    """The address without the user, password and query that it may carry."""
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
