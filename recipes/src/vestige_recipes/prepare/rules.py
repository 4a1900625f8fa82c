"""Other words by rules: no model, the same on every machine. For tests, for trying out, and as a weak paraphraser."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vestige_recipes.prepare.replies import Keep, Reply, Request, bare

WORDS: Mapping[str, tuple[str, ...]] = {
    "about": ("roughly", "around"),
    "answer": ("reply", "response"),
    "because": ("since",),
    "begin": ("start",),
    "big": ("large", "great"),
    "buy": ("purchase",),
    "capital": ("chief city",),
    "children": ("kids",),
    "city": ("town",),
    "difficult": ("hard",),
    "easy": ("simple",),
    "explain": ("describe", "clarify"),
    "famous": ("well-known",),
    "fast": ("quick",),
    "find": ("discover",),
    "full": ("filled",),
    "give": ("offer",),
    "good": ("fine",),
    "happy": ("glad", "joyful"),
    "help": ("assist",),
    "important": ("significant",),
    "large": ("big",),
    "live": ("dwell",),
    "make": ("produce", "create"),
    "mostly": ("chiefly", "mainly"),
    "need": ("require",),
    "often": ("frequently",),
    "people": ("persons",),
    "show": ("display",),
    "small": ("little",),
    "use": ("employ",),
    "very": ("quite", "extremely"),
    "want": ("wish",),
    "write": ("compose", "pen"),
    "wrote": ("composed", "penned"),
}
"""Words that may stand for a word."""

CONTRACTIONS: Mapping[str, str] = {
    "don't": "do not",
    "doesn't": "does not",
    "didn't": "did not",
    "can't": "cannot",
    "won't": "will not",
    "isn't": "is not",
    "aren't": "are not",
    "it's": "it is",
    "i'm": "I am",
    "what's": "what is",
    "let's": "let us",
}

QUESTION_FRAMES = (
    "I would like to know: {text}",
    "Could you say: {text}",
    "Here is a question: {text}",
    "Please answer this: {text}",
    "One thing I ask myself: {text}",
)
STATEMENT_FRAMES = (
    "In other words: {text}",
    "That is to say, {text}",
    "Put differently: {text}",
    "To be clear: {text}",
)

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_TRIES = 8


class Rules:
    """Exchanges words for like ones, writes contractions out, and puts a phrase before the text."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the seed; the tables are part of the program, whose version is in the record."""
        return {"paraphraser": "rules", "seed": self._seed}

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request at once."""
        for request in requests:
            keep(request, Reply(text=paraphrase_by_rules(request.text, self._seed, request.number)))


def paraphrase_by_rules(text: str, seed: int = 0, number: int = 1) -> str:
    """Return the text in other words, which follow from text, seed and number alone; never the text itself.

    The paraphrases 1 to `number` of a text differ from each other as long as there are enough phrases and words.
    """
    found = {bare(text)}
    said = text
    for each in range(1, number + 1):
        said = next((one for one in _versions(text, seed, each) if bare(one) not in found), said)
        found.add(bare(said))
    return said


def _versions(text: str, seed: int, number: int) -> Iterator[str]:
    """Yield the text with other words, without a phrase and with every phrase in turn."""
    frames = QUESTION_FRAMES if text.rstrip().endswith("?") else STATEMENT_FRAMES
    first = _draw(len(frames) + 1, text, seed, number, "frame")
    for attempt in range(_TRIES):
        exchanged = _exchange_words(text, seed, number, attempt)
        chosen = (first + attempt) % (len(frames) + 1)
        yield exchanged if chosen == len(frames) else frames[chosen].format(text=exchanged)


def _exchange_words(text: str, seed: int, number: int, attempt: int) -> str:
    def other(match: re.Match[str]) -> str:
        word = match.group()
        known = word.casefold().replace("’", "'")
        choices = (CONTRACTIONS[known],) if known in CONTRACTIONS else (word, *WORDS.get(known, ()))
        said = choices[_draw(len(choices), text, seed, number, attempt, match.start())]
        return said[0].upper() + said[1:] if word[0].isupper() else said

    return _WORD.sub(other, text)


def _draw(choices: int, *what: object) -> int:
    digest = hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "big") % choices
