"""The replies that a paraphrase needs: which are there already, which have to be asked for, what they cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vestige.data import Example
from vestige_recipes.data_commands import ParaphraseSettings
from vestige_recipes.prepare._cost import estimate, used
from vestige_recipes.prepare._endpoint import Endpoint
from vestige_recipes.prepare._replies import Paraphraser, Reply, ReplyCache, Request
from vestige_recipes.prepare._texts import Place


class Asked(NamedTuple):
    """One text of one paraphrase of a row."""

    place: Place
    text: str
    request: Request


class Draft(NamedTuple):
    """One paraphrase of a row, with what it needs."""

    example: Example
    number: int
    """Which one, from 1."""
    asked: tuple[Asked, ...]


class Work:
    """All requests of some drafts, each once; `replies` holds what has come, by the key of its request."""

    def __init__(self, drafts: Sequence[Draft], settings: ParaphraseSettings) -> None:
        self._settings = settings
        self._cache = None if settings.rules else ReplyCache(settings.cache or settings.out / "replies")
        requests = {asked.request.key: asked.request for draft in drafts for asked in draft.asked}
        # A text of nothing has no paraphrase, and is not worth a request.
        self.replies = {key: Reply(text="") for key, request in requests.items() if not request.text}
        self._asked = [request for key, request in requests.items() if key not in self.replies]
        if self._cache is not None:
            found = {request.key: self._cache.get(request.key) for request in self._asked}
            self.replies |= {key: reply for key, reply in found.items() if reply is not None}
        self._waiting = [request for request in self._asked if request.key not in self.replies]
        self._kept = len(self._asked) - len(self._waiting)

    def do(self, paraphraser: Paraphraser) -> None:
        """Every request has its reply; each is on disk before the next step sees it."""

        def keep(request: Request, reply: Reply) -> None:
            if self._cache is not None:
                self._cache.put(request, reply)
            # One assignment, which threads may do at once.
            self.replies[request.key] = reply

        paraphraser.ask(self._waiting, keep)

    def plan(self) -> str:
        """What is about to be asked, and what it should cost."""
        text = f"{len(self._asked):,} texts, of which {self._kept:,} have a reply from before."
        if self._settings.api_model is None or not self._waiting:
            return text
        given = self._settings
        tokens = estimate(self._waiting, given.instruction, given.max_new_tokens)
        return f"{text} The others take about {tokens.told(given.price_in, given.price_out)}."

    def bill(self, paraphraser: Paraphraser) -> list[str]:
        """What was asked, and what it did cost."""
        if not isinstance(paraphraser, Endpoint):
            return []
        given, tokens = self._settings, used(self._new())
        lines = [
            f"{len(self._waiting):,} texts asked for now, {self._kept:,} kept from before: "
            f"{tokens.told(given.price_in, given.price_out)}."
        ]
        if tokens.untold:
            lines.append(f"{tokens.untold:,} replies did not say how many tokens they took and are not counted.")
        if paraphraser.failed:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in paraphraser.failed.most_common())
            failed = f"{paraphraser.failed.total():,} of {paraphraser.sent:,} requests"
            lines.append(f"{failed} failed and were sent again: {reasons}.")
        if paraphraser.maybe_billed:
            lines.append(f"The endpoint may have charged for {paraphraser.maybe_billed:,} of those.")
        return lines

    def account(self, paraphraser: Paraphraser) -> dict[str, Any]:
        """The same for the record; `all` is what the replies of the whole result took, whenever they came."""
        if not isinstance(paraphraser, Endpoint):
            return {}
        given = self._settings
        now, every = used(self._new()), used(self.replies[request.key] for request in self._asked)
        prices = (given.price_in, given.price_out)
        return {
            "address": paraphraser.address,
            "now": {**now._asdict(), "cost": now.cost(*prices)},
            "all": {**every._asdict(), "cost": every.cost(*prices)},
            "requests": paraphraser.sent,
            "failed": dict(paraphraser.failed),
        }

    def _new(self) -> list[Reply]:
        return [self.replies[request.key] for request in self._waiting]
