"""`vestige data paraphrase`: every row in other words, with the id of the row that it came from."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vestige.data import Example
from vestige.errors import DataError, SpecError
from vestige.prepare import Prepared, check_same_result, fingerprint_of, read_rows, row_of, write_prepared
from vestige.progress import announce
from vestige.settings import with_settings
from vestige_recipes.commands import PARTS, ParaphraseSettings
from vestige_recipes.prepare.endpoint import Endpoint
from vestige_recipes.prepare.generation import LocalModel
from vestige_recipes.prepare.replies import (
    Paraphraser,
    Reply,
    ReplyCache,
    Request,
    Rules,
    describe_problems,
    problem_of,
    request_for,
)

KIND = "paraphrase"
WITHOUT_EFFECT = frozenset({"concurrency", "retries", "timeout", "price_in", "price_out", "cache", "dry_run"})
_ROLES = {"prompt": "user", "answer": "assistant"}
_BYTES_PER_TOKEN = 4
"""Of English text; other scripts have fewer bytes to a token, so their estimate is too low by as much."""
_AROUND = 8
"""Tokens that a conversation adds to its two texts."""


Place = tuple[str, int | None]
"""Where a text stands inside a row: prompt, answer or text; and in which turn of a conversation."""


class Draft(NamedTuple):
    """One paraphrase of a row, and the requests for its texts."""

    example: Example
    number: int
    """Which one, from 1."""
    requests: Mapping[Place, Request]


@with_settings(ParaphraseSettings)
def paraphrase(settings: ParaphraseSettings) -> Prepared:
    """Say every row in other words, as rows of their own in `out`, each with the `original_id` of the row it came from.

    The paraphrases of row `a` have the ids `a-p1`, `a-p2` and so on. Replies are kept in a cache under a hash of what
    was asked: killed at any moment, the same call asks only for what is missing, and equal texts are asked for once.
    Replies that are empty, refused, cut or not different from the text go to flagged.jsonl, each with its `problem`.

    Raises:
        SpecError: Not exactly one of `rules`, `model` and `api_model` was given.
        DataError: The data is absent or broken, or a row lacks a part.
        UserError: The endpoint cannot be used, or left texts without a reply.
    """
    paraphraser = _paraphraser(settings)
    examples = read_rows(settings)
    fingerprint = fingerprint_of(examples)
    if not settings.dry_run:
        check_same_result(settings, KIND, fingerprint, WITHOUT_EFFECT)
    drafts = []
    for example in examples:
        texts = _texts_of(example, settings.fields)
        for number in range(1, settings.paraphrases + 1):
            requests = {place: request_for(paraphraser.identity, text, number) for place, text in texts.items()}
            drafts.append(Draft(example, number, requests))
    work = Work((request for draft in drafts for request in draft.requests.values()), settings)
    if settings.dry_run:
        return Prepared(KIND, settings.out, 0, notes=(work.plan(), "Dry run: nothing was asked, nothing was written."))
    announce(work.plan())
    started = time.monotonic()
    work.run(paraphraser)
    rows, flagged = _rows(drafts, work.replies, keep_flagged=settings.keep_flagged)
    details: dict[str, Any] = {"seconds": round(time.monotonic() - started, 3)}
    notes = describe_problems(rows, flagged)
    if isinstance(paraphraser, Endpoint):
        details |= work.account(paraphraser)
        notes = [*work.bill(paraphraser), *notes]
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, flagged=flagged, details=details, notes=notes)


def _paraphraser(settings: ParaphraseSettings) -> Paraphraser:
    given = [name for name in ("rules", "model", "api_model") if getattr(settings, name) not in (None, False)]
    if len(given) != 1:
        raise SpecError(
            f"Who paraphrases? Expected one of --rules, --model and --api-model, got {', '.join(given) or 'none'}."
        )
    if settings.rules:
        return Rules(settings.seed)
    return LocalModel(settings) if settings.api_model is None else Endpoint(settings)


class Work:
    """Some requests, each once; `replies` holds what has come, by the key of its request."""

    def __init__(self, requests: Iterable[Request], settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._cache = None if settings.rules else ReplyCache(settings.cache or settings.out / "replies")
        distinct = {request.key: request for request in requests}
        # A text of nothing has no paraphrase, and is not worth a request.
        self.replies = {key: Reply(text="") for key, request in distinct.items() if not request.text}
        self._asked = [request for request in distinct.values() if request.text]
        if self._cache is not None:
            self.replies |= self._cache.find(request.key for request in self._asked)
        self._waiting = [request for request in self._asked if request.key not in self.replies]
        self._kept = len(self._asked) - len(self._waiting)

    def run(self, paraphraser: Paraphraser) -> None:
        """Ask for every reply that is missing; each is on disk before the next step sees it."""

        def keep(request: Request, reply: Reply) -> None:
            if self._cache is not None:
                self._cache.put(request, reply)
            # One assignment, which threads may do at once.
            self.replies[request.key] = reply

        paraphraser.ask(self._waiting, keep)

    def plan(self) -> str:
        """Return what is about to be asked, and what it should cost: a paraphrase is about as long as its text."""
        text = f"{len(self._asked):,} texts, of which {self._kept:,} have a reply from before."
        if self._settings.api_model is None or not self._waiting:
            return text
        longest = self._settings.max_new_tokens or math.inf
        lengths = [_estimate_tokens(request.text) for request in self._waiting]
        overhead = _estimate_tokens(self._settings.instruction) + _AROUND
        sent, received = sum(lengths) + overhead * len(lengths), sum(min(length, longest) for length in lengths)
        return f"{text} The others take about {self._price(sent, int(received))}."

    def bill(self, endpoint: Endpoint) -> list[str]:
        """Return what was asked, and what it did cost."""
        now = self._count_tokens(self._waiting)
        lines = [
            f"{len(self._waiting):,} texts asked for now, {self._kept:,} kept from before: "
            f"{self._price(now['sent'], now['received'])}."
        ]
        if now["untold"]:
            lines.append(f"{now['untold']:,} replies did not say how many tokens they took and are not counted.")
        if endpoint.failed:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in endpoint.failed.most_common())
            failed = f"{endpoint.failed.total():,} of {endpoint.sent:,} requests"
            lines.append(f"{failed} failed and were sent again: {reasons}.")
        if endpoint.maybe_billed:
            lines.append(f"The endpoint may have charged for {endpoint.maybe_billed:,} of those.")
        return lines

    def account(self, endpoint: Endpoint) -> dict[str, Any]:
        """Return the same for the record; `all` is what the replies of the whole result took, whenever they came."""
        return {
            "address": endpoint.address,
            "now": self._count_tokens(self._waiting),
            "all": self._count_tokens(self._asked),
            "requests": endpoint.sent,
            "failed": dict(endpoint.failed),
        }

    def _count_tokens(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the tokens that the endpoint says it counted, their cost, and how many replies did not say."""
        replies = [self.replies[request.key] for request in requests]
        sent, received = sum(reply.sent or 0 for reply in replies), sum(reply.received or 0 for reply in replies)
        untold = sum(reply.sent is None or reply.received is None for reply in replies)
        return {"sent": sent, "received": received, "untold": untold, "cost": self._cost(sent, received)}

    def _cost(self, sent: int, received: int) -> float | None:
        """Return the cost in the currency of the prices, which are for a million tokens; None without prices."""
        price_in, price_out = self._settings.price_in, self._settings.price_out
        if price_in is None and price_out is None:
            return None
        return (sent * (price_in or 0) + received * (price_out or 0)) / 1e6

    def _price(self, sent: int, received: int) -> str:
        text, cost = f"{sent:,} tokens sent and {received:,} received", self._cost(sent, received)
        if cost is None:
            return f"{text} (--price-in and --price-out turn them into a cost)"
        price_in, price_out = self._settings.price_in or 0, self._settings.price_out or 0
        return f"{text}, cost {cost:.4g} (at {price_in:g} and {price_out:g} a million)"


def _estimate_tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def _rows(
    drafts: Sequence[Draft], replies: Mapping[str, Reply], *, keep_flagged: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return good rows, and flagged ones."""
    rows: list[dict[str, Any]] = []
    flagged: list[dict[str, Any]] = []
    earlier: dict[tuple[str, Place], list[str]] = {}
    for draft in drafts:
        problems = []
        for place, request in draft.requests.items():
            before = earlier.setdefault((draft.example.id, place), [])
            reply = replies[request.key]
            problems.append(problem_of(request.text, reply, before))
            before.append(reply.text)
        problem = next((each for each in problems if each), None)
        texts = {place: replies[request.key].text.strip() for place, request in draft.requests.items()}
        row = {"id": f"{draft.example.id}-p{draft.number}", "original_id": draft.example.id, "paraphrase": draft.number}
        said = row_of(_with_texts(draft.example, texts))
        row |= {name: value for name, value in said.items() if name not in row and name != "problem"}
        row |= {"problem": problem} if problem else {}
        (rows if problem is None or keep_flagged else flagged).append(row)
    return rows, flagged


def _texts_of(example: Example, parts: Sequence[str]) -> dict[Place, str]:
    """Return the texts of the row that `parts` name, without the blanks around them."""
    found: dict[Place, str] = {}
    for part in parts:
        here = _places(example, part)
        if not here:
            has = ", ".join(each for each in PARTS if _places(example, each)) or "none of them"
            raise DataError(
                f"Row {example.row} (id {example.id!r}) has no {part} to paraphrase; of prompt, answer and text it has "
                f"{has}. Choose with --fields."
            )
        found |= here
    return {place: text.strip() for place, text in found.items()}


def _with_texts(example: Example, texts: Mapping[Place, str]) -> Example:
    """Return the row with these texts in their places, the blanks around them as before."""
    messages = list(example.messages)
    fields: dict[str, str] = {}
    for (part, turn), text in texts.items():
        before = _places(example, part)[part, turn]
        if before.strip():
            # The blanks at both ends separate a text from what stands beside it: they are not the paraphraser's.
            start = len(before) - len(before.lstrip())
            said = before[:start] + text + before[len(before.rstrip()) :]
        else:
            said = text or before
        if turn is not None:
            messages[turn] = replace(messages[turn], content=said)
        else:
            fields["completion" if part == "answer" else part] = said
    return replace(example, messages=tuple(messages), **fields)


def _places(example: Example, part: str) -> dict[Place, str]:
    if example.messages:
        role = _ROLES.get(part)
        return {(part, turn): message.content for turn, message in enumerate(example.messages) if message.role == role}
    text = {"prompt": example.prompt, "answer": example.completion, "text": example.text}[part]
    return {} if text is None else {(part, None): text}
