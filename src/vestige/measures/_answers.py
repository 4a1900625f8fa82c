"""Where in an example its answer stands, and which other answers there were to choose from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.data import Encoder, Example, TokenizedData
from vestige.errors import DataError

MOST_CHOICES = 16
"""More different completions than these are answers in words, not choices."""
NO_CHOICES = "no multiple-choice answers: give the possible completions in a column `choices`"


class Answers(NamedTuple):
    """Positions of the answer's tokens; first = last = 0 where an example is all text and has no answer of its own."""

    first: Int[np.ndarray, "example"]
    last: Int[np.ndarray, "example"]
    """One past the last token, an end token not counted."""


class Choices(NamedTuple):
    """The token at which the choices part, and what each of them has there."""

    place: Int[np.ndarray, "example"]
    """Position of that token; 0 where there are no choices."""
    tokens: Int[np.ndarray, "example choice"]
    offered: Bool[np.ndarray, "example choice"]
    right: Int[np.ndarray, "example"]
    reasons: dict[str, int]
    """Why examples have none, and how many."""

    @property
    def known(self) -> Bool[np.ndarray, "example"]:
        """Examples that have choices."""
        return self.place > 0


def find_answers(data: TokenizedData, end_token: int | None) -> Answers:
    """Find the last run of target tokens of every example that does not consist of targets alone."""
    first, last = (np.zeros(len(data), dtype=np.int64) for _ in range(2))
    for row, (ids, targets) in enumerate(zip(data.input_ids, data.targets, strict=True)):
        places = np.flatnonzero(targets)
        if not len(places) or bool(targets[1:].all()):
            continue
        breaks = np.flatnonzero(np.diff(places) > 1)
        begin, end = places[breaks[-1] + 1 if len(breaks) else 0], places[-1] + 1
        if end - begin > 1 and end_token is not None and ids[end - 1] == end_token:
            end -= 1
        first[row], last[row] = begin, end
    return Answers(first, last)


def find_choices(data: TokenizedData, encoder: Encoder, field: str) -> Choices:
    """Find the choices of every example with a prompt and a completion.

    They come from the column `field`, else, where few different completions occur again and again, from those. Each is
    put after the prompt and tokenised; the first token at which they differ decides.

    Raises:
        DataError: The column does not hold lists of texts.
    """
    listed = [_listed(example, field) for example in data.examples]
    pool = [] if any(listed) else _recurring(data.examples)
    wanted = [
        choices or (pool if example.completion else []) for choices, example in zip(listed, data.examples, strict=True)
    ]
    most = max(map(len, wanted), default=0)
    found = Choices(
        np.zeros(len(data), dtype=np.int64),
        np.zeros((len(data), max(most, 1)), dtype=np.int64),
        np.zeros((len(data), max(most, 1)), dtype=bool),
        np.zeros(len(data), dtype=np.int64),
        {},
    )
    reasons: Counter[str] = Counter()
    for row, choices in enumerate(wanted):
        reason = _place(data, encoder, row, choices, found) if choices else NO_CHOICES
        reasons.update([reason] if reason else [])
    return found._replace(reasons=dict(reasons))


def _place(data: TokenizedData, encoder: Encoder, row: int, choices: Sequence[str], found: Choices) -> str | None:
    """Fill in one row; the reason where that is not possible."""
    example, own = data.examples[row], data.input_ids[row]
    completion = example.completion or ""
    bare = [choice.strip() for choice in choices]
    if completion.strip() not in bare:
        return "the completion is not among its choices"
    if len(set(bare)) < len(bare) or len(bare) < 2:
        return "fewer than two different choices"
    head, tail = completion.partition(completion.strip())[::2]
    encoded = encoder.encode([replace(example, completion=f"{head}{choice}{tail}") for choice in bare]).input_ids
    shortest = min(map(len, encoded))
    same = np.all(np.stack([ids[:shortest] for ids in encoded]) == encoded[0][:shortest], axis=0)
    place = int(same.argmin()) if not same.all() else shortest
    tokens = [int(ids[place]) if place < len(ids) else -1 for ids in encoded]
    if place < 1 or place >= len(own) or -1 in tokens:
        return "the answer was cut off"
    if len(set(tokens)) < len(tokens):
        return "two choices begin with the same token"
    right = bare.index(completion.strip())
    if int(own[place]) != tokens[right]:
        return "the completion is not tokenised as its choice is"
    found.place[row], found.right[row] = place, right
    found.tokens[row, : len(tokens)], found.offered[row, : len(tokens)] = tokens, True
    return None


def _listed(example: Example, field: str) -> list[str]:
    value: Any = example.extra.get(field)
    if value is None:
        return []
    if isinstance(value, dict) and isinstance(value.get("text"), list | tuple):
        value = value["text"]
    if not isinstance(value, list | tuple | np.ndarray) or not all(isinstance(each, str) for each in value):
        raise DataError(
            f"Example {example.id!r} has {value!r} in the column {field!r}, expected a list of the completions to "
            "choose from. Name another column with --choices-field."
        )
    return list(value)


def _recurring(examples: Sequence[Example]) -> list[str]:
    counts: Counter[str] = Counter()
    for example in examples:
        if example.completion and example.completion.strip():
            counts[example.completion.strip()] += 1
            if len(counts) > MOST_CHOICES:
                return []
    return sorted(counts) if len(counts) > 1 and min(counts.values()) > 1 else []
