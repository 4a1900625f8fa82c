"""What an endpoint will cost, and what it did cost."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from vestige_recipes.prepare._replies import Reply, Request

_BYTES_PER_TOKEN = 4
"""Of English text; other scripts have fewer bytes to a token, so their estimate is too low by as much."""
_AROUND = 8
"""Tokens that a conversation adds to its two texts."""


class Tokens(NamedTuple):
    """Tokens sent and received, and how many replies did not say."""

    sent: int
    received: int
    untold: int = 0

    def cost(self, price_in: float | None, price_out: float | None) -> float | None:
        """In the currency of the prices, which are for a million tokens; None without prices."""
        if price_in is None and price_out is None:
            return None
        return (self.sent * (price_in or 0) + self.received * (price_out or 0)) / 1e6

    def told(self, price_in: float | None, price_out: float | None) -> str:
        """In words."""
        cost = self.cost(price_in, price_out)
        text = f"{self.sent:,} tokens sent and {self.received:,} received"
        if cost is None:
            return f"{text} (--price-in and --price-out turn them into a cost)"
        return f"{text}, cost {cost:.4g} (at {price_in or 0:g} and {price_out or 0:g} a million)"


def estimate(requests: Iterable[Request], instruction: str, longest: int | None) -> Tokens:
    """What the requests should take, before any is sent: a paraphrase is about as long as its text."""
    overhead, sent, received = _tokens(instruction) + _AROUND, 0, 0
    for request in requests:
        tokens = _tokens(request.text)
        sent += overhead + tokens
        received += tokens if longest is None else min(tokens, longest)
    return Tokens(sent, received)


def used(replies: Iterable[Reply]) -> Tokens:
    """What the endpoint says that it counted."""
    replies = list(replies)
    untold = sum(1 for reply in replies if reply.sent is None or reply.received is None)
    return Tokens(sum(reply.sent or 0 for reply in replies), sum(reply.received or 0 for reply in replies), untold)


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)
