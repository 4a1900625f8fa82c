"""What was asked and what came back, kept on disk so that nothing is paid for twice, and what is wrong with it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.storage import make_folder, write_durably

Finish = Literal["stop", "length", "refused", "too-long"]
"""It ended by itself; it was cut; the endpoint's filter took it; the text does not fit into the model."""

PROBLEMS = {
    "nothing": "there was no text to paraphrase",
    "empty": "the reply is empty",
    "refused": "the model or its filter refused",
    "cut": "the reply was cut at its greatest length",
    "too-long": "the text does not fit into the model",
    "same": "the reply is the text itself",
    "repeated": "the reply is an earlier paraphrase of the same row",
}

_REFUSAL = re.compile(
    r"(i['’]?m|i am)\s+(really\s+|very\s+)?(sorry|unable|afraid)\b.{0,40}\b(can|could|able|unable|not|assist|help)|"
    r"(sorry|unfortunately),?\s+(but\s+)?(i|as an ai)\b.{0,40}(n['’]t|not|unable)|"
    r"i\s+(can['’]?t|cannot|can not|won['’]?t|will not)\s+(help|assist|comply|paraphrase|rephrase|do that|provide)|"
    r"as an ai\b",
    re.IGNORECASE,
)


class Request(NamedTuple):
    """A text to be said in other words, or a prompt to be answered."""

    key: str
    """sha256 over everything that the reply follows from."""
    text: str
    number: int
    """Which paraphrase of the text this is, from 1."""


class Reply(BaseModel):
    """What came back."""

    model_config = ConfigDict(frozen=True)

    text: str
    finish: Finish = "stop"
    sent: int | None = None
    """Tokens of the question, as the endpoint counts them; None where it does not say."""
    received: int | None = None
    """Tokens of the reply."""


Keep = Callable[[Request, Reply], None]
"""Stores a reply; may be called from any thread, and when it returns, the reply survives a power cut."""


class Paraphraser(Protocol):
    """Says texts in other words."""

    identity: Mapping[str, Any]
    """Everything beside the text and its number that a reply follows from, in JSON terms."""

    def ask(self, requests: Sequence[Request], keep: Keep) -> None:
        """Hand the reply to every request to `keep`, each as it comes."""
        ...


def request_for(identity: Mapping[str, Any], text: str, number: int) -> Request:
    """Return the request for one paraphrase of a text, with the key under which its reply is kept."""
    content = json.dumps([identity, text, number], sort_keys=True, ensure_ascii=False)
    return Request(hashlib.sha256(content.encode()).hexdigest(), text, number)


class ReplyCache:
    """Replies in a folder, a file each, which several results may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Return the replies that are there and can be read, by the keys of their requests."""
        return {key: reply for key in keys if (reply := self._read(key)) is not None}

    def put(self, request: Request, reply: Reply) -> None:
        """Write the reply, whole, with the text that it answers."""
        path = self._path(request.key)
        make_folder(path.parent)
        content = {"text": request.text, "number": request.number, "reply": reply.model_dump()}
        write_durably(path, [json.dumps(content, ensure_ascii=False).encode()])

    def _read(self, key: str) -> Reply | None:
        path = self._path(key)
        try:
            return Reply.model_validate(parse_json(path.read_text(encoding="utf-8"))["reply"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            announce(f"{path} is damaged ({type(error).__name__}) and is asked for again.")
            return None

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def problem_of(original: str, reply: Reply, earlier: Collection[str] = ()) -> str | None:
    """Return what is wrong with a reply, a key of `PROBLEMS`, or None for a paraphrase.

    A refusal is recognised by how the reply begins, unless the text itself begins so. Two texts are the same if they
    differ in capitals, blanks and marks only.
    """
    text = reply.text.strip()
    if not original:
        return "nothing"
    if reply.finish in ("refused", "too-long"):
        return reply.finish
    if not text:
        return "empty"
    if reply.finish == "length":
        return "cut"
    if _REFUSAL.match(text) and not _REFUSAL.match(original):
        return "refused"
    if bare(text) == bare(original):
        return "same"
    return "repeated" if bare(text) in {bare(each) for each in earlier} else None


def bare(text: str) -> str:
    """Return the letters and digits of a text in lower case; a text of marks alone as it is."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def describe_problems(rows: Sequence[Mapping[str, Any]], flagged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each problem of rows that were kept and of rows that were left out."""
    lines = []
    for where, some in (("left out, in flagged.jsonl", flagged), ("kept, marked in `problem`", rows)):
        counts = Counter(str(row["problem"]) for row in some if "problem" in row)
        lines += [f"{count:,} {where}: {PROBLEMS[problem]}." for problem, count in counts.items()]
    return lines


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
        # The tables are part of the program, whose version is in the record.
        self.identity: Mapping[str, Any] = {"paraphraser": "rules", "seed": seed}

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
